"""What the two halves of a cycle share: the device, the connection, and one request at a time.

A half is a generator of ``Step``s that is sent responses. ``pulling`` and ``pushing`` decide what
is asked for in which order; ``cycle`` puts them together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from msgspec import Struct

from entidb.db.replica import ReplicaState
from entidb.errors import ProtocolError
from entidb.protocol import (
    DigestResponse,
    HandshakeResponse,
    Limits,
    Manifest,
    PullRequest,
    PullResponse,
    PushResponse,
    PushResult,
    RoundResponse,
    SyncRequest,
    SyncResponse,
)
from entidb.sync.apply.report import RebaseReport
from entidb.sync.apply.seam import SyncApplier
from entidb.sync.carried import Carried
from entidb.sync.config import SyncConfig
from entidb.sync.refusal import Path
from entidb.sync.segment_files import Fetch
from entidb.sync.state import SyncCycleResult, SyncProgress, SyncState


class SendAhead(Struct, frozen=True):
    """A hint to the driver: this request will be asked for next, or after the one that is under
    way. It may be sent as soon as that one has its answer, while what came before is being staged
    or settled. Answered with None at once; ignoring it is fine."""

    request: SyncRequest


R = TypeVar(
    "R", HandshakeResponse, PullResponse, PushResponse, RoundResponse, DigestResponse, Manifest
)
Step = SyncRequest | SendAhead | Fetch
Flow = Generator[Step, SyncResponse | None, SyncCycleResult]


@dataclass
class Connection:
    """What a handshake brought; kept between cycles until the transport reconnects (R10)."""

    history: bytes = b""
    limits: Limits | None = None
    features: list[str] = field(default_factory=list)
    path: Path = field(default_factory=Path)
    #: What pulls and pushes say of the program's schema: nothing to a server that does not look at
    #: it (R33).
    schema: int = 0
    #: What the handshake named as granted; pulls name it again, and may name something else.
    granted: list[str] | None = None
    #: Whether segments can be fetched over it at all; the driver says so.
    fetches: bool = False
    #: How often in a row the way to the server failed just when an image was asked for.
    image_failures: int = 0
    #: How often in a row a round failed with its outcome open, and how many were left out since
    #: that was too often.
    round_failures: int = 0
    rounds_left_out: int = 0
    #: Who the handshake said the token is for (R36).
    subject: str | None = None
    #: The newest request for what changed, with what it was made from: while a device stays as it
    #: is, it asks for the same.
    asked: tuple[ReplicaState, int, list[str] | None, PullRequest] | None = None
    #: What came with a hint since the newest cycle began.
    carried: Carried = field(default_factory=Carried)

    @property
    def made(self) -> bool:
        return self.limits is not None

    def knows(self, subject: str | None) -> bool:
        """Whether ``subject`` is who a handshake over it named, and so who is there now. A server
        that names nobody keeps nobody's work apart."""
        return self.history != b"" and self.subject in (None, subject)

    def forget(self) -> None:
        self.limits = self.asked = None
        self.path.try_again()


@dataclass
class Exchange:
    """One cycle's dealings with the server; ``Cycle`` says what the callables are for."""

    applier: SyncApplier
    config: SyncConfig
    connection: Connection
    enter: Callable[[SyncState], None]
    progress: Callable[[SyncProgress], None]
    check: Callable[[], None]
    #: The server's clock, as the newest pull said it.
    server_ms: int = 0
    result: SyncCycleResult = field(default_factory=SyncCycleResult)
    #: An image was asked for in this cycle: it has one try (R35).
    image_asked: bool = False
    #: The verdicts on each batch, with the sequences of its transactions.
    answers: deque[tuple[list[int], list[PushResult]]] = field(default_factory=deque)

    def ask(self, request: SyncRequest, kind: type[R]) -> Generator[Step, SyncResponse | None, R]:
        """One request and its answer, which is of ``kind``; raises ``ProtocolError`` if not."""
        self.check()
        self.result.requests += 1
        response = yield request
        if not isinstance(response, kind):
            raise ProtocolError(
                f"expected {kind.__name__}, the server answered {type(response).__name__}"
            )
        return response

    def report(self, report: RebaseReport) -> None:
        """Add what one step did to the result of the cycle."""
        self.result.pulled += report.pulled
        self.result.conflicts += report.resolved
        self.result.unresolved += report.unresolved
        self.result.withdrawn += report.withdrawn
        self.result.done += report.done
        self.result.overruled += report.overruled


class Then(Protocol):
    """What is done at the end of a cycle that worked, before another one may begin."""

    def run(self, exchange: Exchange) -> Generator[Step, SyncResponse | None, None]: ...


def pull_request(
    config: SyncConfig,
    connection: Connection,
    device_id: bytes,
    state: ReplicaState,
    scope: list[str] | None,
    cursor: int,
) -> PullRequest:
    """The request for what changed after ``cursor``. The handshake was made."""
    server = connection.limits
    assert server is not None
    return PullRequest(
        db_id=config.db_id,
        device_id=device_id,
        history=history_of(state),
        cursor=cursor,
        have=[(first, last) for first, last in state.have if last > cursor],
        limit=max(1, min(config.pull_operations_max, server.pull_operations_max)),
        bytes_max=config.pull_bytes_max,
        collections=scope,
        schema=connection.schema,
        seen=state.seen,
    )


def history_of(state: ReplicaState) -> bytes:
    assert state.history is not None, "the handshake bound the history"
    return state.history
