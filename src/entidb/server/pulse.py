"""What a server did lately, for who watches it: figures of every two seconds, and what became of
pushes and refused requests. It is kept in memory, within bounds, by a server that shows a console;
it decides nothing, and several processes each know what they did themselves.

Not here: counters for Prometheus (``metrics``), devices (``registry``), who may see it (``admin``).
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, Protocol

from msgspec import Struct

from entidb.protocol import (
    PullRequest,
    PushRequest,
    PushResponse,
    PushTransaction,
    RoundRequest,
    SyncRequest,
    Verdict,
)
from entidb.types import Clock

#: Milliseconds of one beat, and how many are kept: five minutes.
BEAT_MS: Final = 2000
BEATS_KEPT: Final = 150
#: Pushes, and refusals, that are kept.
HAPPENED_KEPT: Final = 1000
#: Entities that are named of a refused transaction, and bytes of their values that are kept.
_TOUCHED_MAX: Final = 8
_VALUE_BYTES_MAX: Final = 4096
_TEXT_MAX: Final = 500
#: Upper ends, in milliseconds, of the classes in which answers are counted by how long they took.
BOUNDS_MS: Final = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 25, 50, 75, 100, 250, 500, 1000, 2500, 10_000)
_OWN_PAGES: Final = ("/console", "/v1/admin/")

What = Literal["pushed", "conflict", "rejected", "refused"]


class Beat(Struct):
    """Two seconds from ``at_ms``, in milliseconds since 1970; requests are those of devices.
    ``half_ms`` and ``most_ms`` are the times below which half of the answers, and 99 of 100,
    were."""

    at_ms: int
    requests: int = 0
    failed: int = 0
    pushes: int = 0
    pulls: int = 0
    accepted: int = 0
    conflicts: int = 0
    rejected: int = 0
    half_ms: float = 0.0
    most_ms: float = 0.0


class Touched(Struct, frozen=True):
    """An entity that a refused transaction wanted to write; ``payload`` None: to delete, or not
    ``kept`` because it is large."""

    collection: str
    id: str
    base: int
    payload: bytes | None
    kept: bool = True


class Happened(Struct, frozen=True, omit_defaults=True):
    """``pushed``: transactions were accepted, ``count`` of them; ``conflict`` and ``rejected``: one
    was not; ``refused``: a whole request."""

    number: int
    at_ms: int
    what: What
    database: str
    device_id: str
    subject: str
    count: int = 1
    version: int | None = None
    transaction: str | None = None
    code: str | None = None
    message: str | None = None
    touched: tuple[Touched, ...] = ()
    #: Entities that the transaction touched beside these.
    more: int = 0


class Answered(Protocol):
    """A request that was answered."""

    @property
    def path(self) -> str: ...
    @property
    def status(self) -> int: ...
    @property
    def code(self) -> str | None: ...
    @property
    def subject(self) -> str | None: ...
    @property
    def request(self) -> SyncRequest | None: ...
    @property
    def verdicts(self) -> PushResponse | None: ...


class Gauges(Struct, frozen=True):
    """What can be read of a running server at any moment."""

    in_flight_bytes: Callable[[], int]
    waiting: Callable[[], int]


class Pulse:
    """Notes every answer; thread-safe."""

    def __init__(self, clock: Clock, gauges: Gauges) -> None:
        self.gauges: Final = gauges
        self._clock = clock
        self._lock = threading.Lock()
        self._beats: deque[Beat] = deque(maxlen=BEATS_KEPT)
        self._beat = Beat(0)
        self._took = [0] * (len(BOUNDS_MS) + 1)
        self._number = 0
        self._pushed: deque[Happened] = deque(maxlen=HAPPENED_KEPT)
        self._refused: deque[Happened] = deque(maxlen=HAPPENED_KEPT)

    # ------------------------------------------------------------ noting

    def answered(self, answered: Answered, seconds: float, *, streamed: bool) -> None:
        """One request was answered, ``streamed`` with an answer that went on for long."""
        if answered.path.startswith(_OWN_PAGES):
            return  # who watches must not see himself
        now = self._clock.now_ms()
        with self._lock:
            self._turn(now)
            beat = self._beat
            beat.requests += 1
            beat.failed += answered.status >= 400
            if not streamed:
                self._took[bisect.bisect_left(BOUNDS_MS, seconds * 1000)] += 1
            request, verdicts = answered.request, answered.verdicts
            if request is None:
                return
            pushed = isinstance(request, PushRequest | RoundRequest)
            beat.pushes += pushed
            beat.pulls += isinstance(request, PullRequest | RoundRequest)
            if verdicts is not None:
                self._decided(now, answered, request, verdicts)
            elif answered.code is not None:
                self._add(now, answered, request, "refused", code=answered.code[:_TEXT_MAX])

    def _decided(
        self, now: int, answered: Answered, request: SyncRequest, verdicts: PushResponse
    ) -> None:
        push = request.push if isinstance(request, RoundRequest) else request
        assert isinstance(push, PushRequest)
        accepted = version = 0
        for transaction, result in zip(push.transactions, verdicts.results, strict=False):
            if result.verdict in (Verdict.ACCEPTED, Verdict.SUPERSEDED):
                accepted += 1
                version = max(version, result.version)
                continue
            conflict = result.verdict == Verdict.CONFLICT
            self._beat.conflicts += conflict
            self._beat.rejected += not conflict
            touched = tuple(_touched(push, transaction))
            self._add(
                now,
                answered,
                push,
                "conflict" if conflict else "rejected",
                transaction=transaction.transaction_id.hex(),
                code=result.code[:_TEXT_MAX] or None,
                message=result.message[:_TEXT_MAX] or None,
                touched=touched,
                more=len(transaction.operations) - len(touched),
            )
        self._beat.accepted += accepted
        if accepted:
            self._add(now, answered, push, "pushed", count=accepted, version=version)

    def _add(
        self,
        now: int,
        answered: Answered,
        request: SyncRequest,
        what: What,
        *,
        count: int = 1,
        version: int | None = None,
        transaction: str | None = None,
        code: str | None = None,
        message: str | None = None,
        touched: tuple[Touched, ...] = (),
        more: int = 0,
    ) -> None:
        self._number += 1
        ring = self._pushed if what == "pushed" else self._refused
        ring.append(
            Happened(
                number=self._number,
                at_ms=now,
                what=what,
                database=request.db_id,
                device_id=request.device_id.hex(),
                subject=answered.subject or "",
                count=count,
                version=version,
                transaction=transaction,
                code=code,
                message=message,
                touched=touched,
                more=more,
            )
        )

    # ------------------------------------------------------------ reading

    def beats(self, since_ms: int = 0) -> list[Beat]:
        """The finished beats that began after ``since_ms``, oldest first, also those in which
        nothing happened."""
        with self._lock:
            self._turn(self._clock.now_ms())
            return [each for each in self._beats if each.at_ms > since_ms]

    def happened(self, wanted: Callable[[Happened], bool], limit: int) -> list[Happened]:
        """Newest first."""
        with self._lock:
            both = [*self._pushed, *self._refused]
        found = sorted(filter(wanted, both), key=lambda each: -each.number)
        return found[:limit]

    def _turn(self, now: int) -> None:
        """Begin a new beat if the present one is over; those without a request are added too."""
        at = now - now % BEAT_MS
        if at == self._beat.at_ms:
            return
        if self._beat.at_ms:
            self._beat.half_ms, self._beat.most_ms = _part(self._took, 0.5), _part(self._took, 0.99)
            self._beats.append(self._beat)
            first = max(self._beat.at_ms + BEAT_MS, at - BEATS_KEPT * BEAT_MS)
            self._beats.extend(Beat(each) for each in range(first, at, BEAT_MS))
        self._beat = Beat(at)
        self._took = [0] * len(self._took)


def _touched(push: PushRequest, transaction: PushTransaction) -> Iterator[Touched]:
    room = _VALUE_BYTES_MAX
    for operation in transaction.operations[:_TOUCHED_MAX]:
        payload = operation.payload
        size = 0 if payload is None else len(payload)
        kept = size <= room
        room -= size if kept else 0
        yield Touched(
            _name(push.collections, operation.collection),
            operation.entity_id.hex(),
            operation.base_version,
            bytes(payload) if payload is not None and kept else None,
            kept,
        )


def _name(names: list[str], index: int) -> str:
    return names[index][:_TEXT_MAX] if index < len(names) else "?"


def _part(took: Iterable[int], part: float) -> float:
    """The upper end of the class in which that part of the answers ends."""
    counts = list(took)
    left = part * sum(counts)
    if not left:
        return 0.0
    for bound, count in zip((*BOUNDS_MS, BOUNDS_MS[-1]), counts, strict=True):
        left -= count
        if left <= 1e-9:
            return float(bound)
    return float(BOUNDS_MS[-1])


__all__ = ["BEAT_MS", "Beat", "Gauges", "Happened", "Pulse", "Touched"]
