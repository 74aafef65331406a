"""A device compared with its server, and put right where it differs (R34).

    sync ─▶ which collections? ─▶ each: digests of blocks ─▶ of the entities of unequal blocks
                                                         ─▶ repair: those entities, one commit each

Like a cycle it is a generator without I/O. It runs at the end of one, under the same right: while
it does, nothing moves the device's cursor, and commits of programs do not matter, because digests
are over what the server has. ``db.digests`` computes them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Final

from msgspec import Struct, field
from msgspec.structs import replace

from entidb.db.digests import Settled, blocks_between, digest_of, settled
from entidb.db.records import META_ADOPT
from entidb.db.writer import Writer
from entidb.errors import ProtocolError, ServerError, SyncStateError, VersionMismatchError
from entidb.events import SafeEvent
from entidb.protocol import (
    DIGEST_IDS_MAX,
    DigestRequest,
    DigestResponse,
    SyncResponse,
)
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.exchange import Connection, Exchange, Step, history_of
from entidb.sync.state import SyncCycleResult

#: Entities of one block; 32 bytes or so on the wire for each block, and for each entity of a block
#: that differs.
BLOCK: Final = 512
#: Differences that one comparison names and repairs; a device with more needs a reset.
DIFFERENCES_MAX: Final = 10_000
#: Requests of one comparison: at 20,000 entities each, those of two billion.
REQUESTS_MAX: Final = 100_000
_KINDS: Final = {
    "missing": "the server has it, this device does not",
    "extra": "this device has it from version {}, the server does not have it",
    "other": "this device has another value or version ({}) than the server",
}


class Difference(Struct, frozen=True):
    """An entity of which the device knows something else than what the server has. ``kind`` is
    ``missing`` (only the server has it), ``extra`` (only the device), or ``other``; ``version`` the
    server's commit that the device has it from, None if it has none."""

    collection: str
    id_bytes: bytes
    kind: str
    version: int | None

    @property
    def id(self) -> uuid.UUID:
        """The entity."""
        return uuid.UUID(bytes=self.id_bytes)

    def __str__(self) -> str:
        says = _KINDS[self.kind].format(self.version)
        return f"{self.collection} {self.id}: {says}"


class Verification(Struct):
    """What a comparison with the server found, as of its commit ``cursor``: how many ``entities``
    of how many ``collections`` were compared, and which differ. ``skipped`` are collections that
    cannot be compared, because their entities are of another history (R29). ``more``: there are
    more differences than are named. ``repaired`` counts those put right, ``withdrawn`` the pending
    transactions that a policy decided against in that (R4), ``unresolved`` the conflicts that it
    left for a person."""

    cursor: int = 0
    collections: int = 0
    entities: int = 0
    differences: list[Difference] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    more: bool = False
    repaired: int = 0
    withdrawn: int = 0
    unresolved: int = 0
    requests: int = 0

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return not self.differences and not self.more


class Comparing:
    """One comparison; ``result`` is what it has found."""

    def __init__(self, applier: DatabaseApplier, *, repair: bool = False) -> None:
        self.result = Verification()
        self._applier = applier
        self._repair = repair

    def run(self, exchange: Exchange) -> Generator[Step, SyncResponse | None, None]:
        """Raises ``VersionMismatchError`` if the server cannot be compared with, and
        ``SyncStateError`` if the device does not have everything yet, or is moved meanwhile. What
        was repaired until then stays."""
        self.result = Verification()
        check_can_compare(exchange.connection)
        question = self._question(exchange)
        listed = yield from self._ask(exchange, question)
        for name in self._names(listed.collections):
            self.result.collections += 1
            found: list[Difference] = []
            asked = replace(question, collection=name, block=BLOCK)
            yield from self._compare(exchange, asked, found)
            self.result.differences += found
            if self._repair and found:
                yield from self._mend(exchange, asked, found)
            if self.result.more:
                return

    def _question(self, exchange: Exchange) -> DigestRequest:
        look = self._applier.look()
        state = look.state
        if state.full or look.stage is not None or look.adopting or look.inflight is not None:
            raise SyncStateError("this device has not synchronised everything yet; sync again")
        self.result.cursor = state.reached
        return DigestRequest(
            db_id=exchange.config.db_id,
            device_id=self._applier.device_id,
            history=history_of(state),
            cursor=state.reached,
            collections=look.scope,
            schema=exchange.connection.schema,
        )

    def _names(self, listed: Sequence[str]) -> list[str]:
        """The collections to compare: those of the server, and those that only the device has."""
        with self._applier.database.view() as view:
            state, catalogue = view.sync_state, view.catalogue
            mine = {info.name for info in catalogue.by_name.values() if info.synced}
            wanted = {name for name in listed if catalogue.in_scope(name)} | mine
            unknown = {*state.foreign_names, *state.uncovered}
            granted = {name for name in wanted if state.grants(name)}
        self.result.skipped = sorted(granted & unknown)
        return sorted(granted - unknown)

    # ------------------------------------------------------------ one request

    def _ask(
        self, exchange: Exchange, request: DigestRequest
    ) -> Generator[Step, SyncResponse | None, DigestResponse]:
        self.result.requests += 1
        if self.result.requests > REQUESTS_MAX:
            raise ServerError("the server's digests do not come to an end; verify again later")
        response = yield from exchange.ask(request, DigestResponse)
        granted = None if response.granted is None else sorted(response.granted)
        with self._applier.database.view() as view:
            state = view.sync_state
            moved = (state.history, state.reached) != (request.history, request.cursor)
            if moved or state.granted != granted or view.get(META_ADOPT) is not None:
                raise SyncStateError("this device was synchronised meanwhile; verify again")
        return response

    # ------------------------------------------------------------ comparing

    def _compare(
        self, exchange: Exchange, asked: DigestRequest, found: list[Difference]
    ) -> Generator[Step, SyncResponse | None, None]:
        more = True
        while more and not self._is_enough(found):
            response = yield from self._ask(exchange, asked)
            lasts = _checked(asked, response)
            if asked.block == 1:
                self._name(asked, response, found)
            else:
                self.result.entities += sum([block.count for block in response.blocks])
                for start, last in self._unequal(asked, response, lasts):
                    inner = replace(asked, after=start, last=last, block=1)
                    yield from self._compare(exchange, inner, found)
            more = response.more
            asked = replace(asked, after=lasts[-1]) if more else asked

    def _is_enough(self, found: list[Difference]) -> bool:
        if len(self.result.differences) + len(found) >= DIFFERENCES_MAX:
            self.result.more = True
        return self.result.more

    def _unequal(
        self, asked: DigestRequest, response: DigestResponse, lasts: Sequence[bytes]
    ) -> list[tuple[bytes | None, bytes]]:
        """The ranges of the blocks in which the device has something else."""
        with self._applier.database.view() as view:
            rows = _rows(view, asked, lasts[-1])
            mine = blocks_between(rows, lasts, frozenset(response.newer))
        starts = [asked.after, *lasts]
        return [
            (starts[at], block.last)
            for at, (block, own) in enumerate(zip(response.blocks, mine, strict=True))
            if (block.count, block.digest) != own
        ]

    def _name(
        self, asked: DigestRequest, response: DigestResponse, found: list[Difference]
    ) -> None:
        """The entities that differ, of blocks of one each."""
        assert asked.collection is not None, "a range is one of a collection"
        theirs = {block.last: block.digest for block in response.blocks if block.count}
        newer = frozenset(response.newer)
        with self._applier.database.view() as view:
            mine = {
                entity_id: (version, digest_of(entity_id, version, payload))
                for entity_id, version, payload in _rows(view, asked, response.blocks[-1].last)
                if payload is not None and entity_id not in newer
            }
        for entity_id in sorted({*mine, *theirs}):
            version, digest = mine.get(entity_id, (None, None))
            if digest == theirs.get(entity_id):
                continue
            kind = "missing" if digest is None else "other" if entity_id in theirs else "extra"
            found.append(Difference(asked.collection, entity_id, kind, version))

    # ------------------------------------------------------------ repairing

    def _mend(
        self, exchange: Exchange, asked: DigestRequest, found: list[Difference]
    ) -> Generator[Step, SyncResponse | None, None]:
        ids = [difference.id_bytes for difference in found]
        while ids:
            request = replace(asked, ids=ids[:DIGEST_IDS_MAX])
            response = yield from self._ask(exchange, request)
            done = {state.entity_id for state in response.states} | set(response.newer)
            if not done or not done <= set(request.ids):
                raise ProtocolError("the server's answer names other entities than it was asked")
            exchange.check()
            report = self._applier.repair(request, response)
            self.result.repaired += len(response.states)
            self.result.withdrawn += len(report.withdrawn)
            self.result.unresolved += len(report.unresolved)
            exchange.report(report)
            ids = [entity_id for entity_id in ids if entity_id not in done]


def check_can_compare(connection: Connection) -> None:
    """Raises ``VersionMismatchError`` if the server does not know how."""
    if "digest" not in connection.features:
        raise VersionMismatchError(
            "this server cannot be compared with: it is older than EntiDB 0.5. Update the server, "
            'or pull everything anew with reset(keep="device")'
        )


def _rows(view: Writer, asked: DigestRequest, last: bytes) -> Iterator[Settled]:
    assert asked.collection is not None, "a range is one of a collection"
    info = view.catalogue.by_name.get(asked.collection)
    return iter(()) if info is None else settled(view, info, asked.after, last)


def _checked(asked: DigestRequest, response: DigestResponse) -> list[bytes]:
    """Where the blocks end. Raises ``ProtocolError`` if they are not what was asked for."""
    lasts = [block.last for block in response.blocks]
    after = asked.after or b""
    if not lasts or lasts[0] <= after or lasts[-1] > asked.last:
        raise ProtocolError("the server's digests are of another range than it was asked")
    if not response.more and lasts[-1] != asked.last:
        raise ProtocolError("the server's digests end before the range that it was asked")
    if response.more and lasts[-1] == asked.last:
        raise ProtocolError("the server says there is more after the end of the range")
    return lasts


class Verifying:
    """The part of an engine that compares with the server."""

    applier: DatabaseApplier
    run_cycle: Callable[..., SyncCycleResult]

    def verify_with_server(self, *, repair: bool = False) -> Verification:
        """Synchronise, and compare what this device knows of the server with what the server has:
        every entity in scope, its version and its value (R34). With ``repair`` what differs is put
        right; what is pending there goes on top by the usual rules, so that a policy may decide
        against it, and keep it in ``discarded()`` then.

        Raises as ``sync``, and ``VersionMismatchError`` if the server is too old for it. What was
        repaired until then stays; another call goes on from there.
        """
        comparing = Comparing(self.applier, repair=repair)
        self.run_cycle(SafeEvent(), then=comparing)
        return comparing.result


__all__ = ["Comparing", "Difference", "Verification", "Verifying"]
