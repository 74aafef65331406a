"""QUOTA: no push makes a database of the server fuller than its operator lets it be; what takes no
more room is never refused for it, and a device that was let in never again.

The oracle counts entities and bytes, commit by commit, and this writes down who was let in. Of the
server it sees durable commits, verdicts, and when it measures its store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from entidb.db.records import unpack_u64
from entidb.errors import SyncError
from entidb.protocol import PushRequest, PushResult, PushTransaction, SyncRequest
from entidb.server.fullness import CODE, MEASURED_S
from entidb.server.newcomers import REASON
from entidb.server.records import Make, Wrote
from entidb.server.watched import Mark
from entidb.storage.base import StorageInfo
from entidb.testing.keeper import Keeper
from entidb.testing.knobs import Knobs
from entidb.testing.oracle import History
from entidb.testing.world import World

OVER_QUOTA: Final = CODE
#: Of devices: of all together, and of one person.
_LIMITS: Final = ("database_devices_max", "subject_devices_max")
#: As many devices as are remembered: room for all of them.
ANY_NUMBER: Final = 10_000


def settings(knobs: Knobs) -> dict[str, Any]:
    """Fields of ``ServerConfig`` of a run."""
    return {
        "database_entities_max": knobs.quota_entities,
        "database_bytes_max": knobs.quota_bytes,
        "database_devices_max": knobs.quota_devices,
        "subject_devices_max": own_devices(knobs),
    }


def own_devices(knobs: Knobs) -> int:
    """How many devices one person may have in a database, where several use them: fewer than it
    may have in all, so that both limits are met. 0: any number."""
    return max(1, knobs.quota_devices - 1) if knobs.people and knobs.quota_devices else 0


def has_quota(knobs: Knobs) -> bool:
    """Whether there is one of what a database holds."""
    return bool(knobs.quota_entities or knobs.quota_bytes)


class QuotaWatch:
    """What one database of the server holds, against what it may."""

    def __init__(
        self, world: World, name: str, newest: Callable[[int, bytes | None], bytes | None]
    ) -> None:
        """``newest`` says what is stored of what a program of a schema has pushed (R33)."""
        self._world = world
        self._name = name
        self._newest = newest
        may = settings(world.knobs)
        self._entities_max: int = may["database_entities_max"]
        self._bytes_max: int = may["database_bytes_max"]
        #: Bytes that are left since the store was measured, by what is durable; none: it was not
        #: since it was opened. Of several nodes one may have measured and not said so yet: then
        #: the others go by what was said before. The least of it while the group of now is
        #: decided; and what commits that failed may have taken.
        self._left: list[int] = []
        self._least = 0
        self._failed = 0
        self._measured_at = 0.0

    def opened(self) -> None:
        """Another process, or the same one again. Of several, the others know what they knew."""
        if self._world.nodes == 1:
            self._left, self._failed = [], 0

    def moved(self) -> None:
        """Another store lies there, which counts what it has seen itself."""
        self._left, self._failed = [], 0

    def begins(self) -> None:
        """A group is decided."""
        self._least = min(self._left, default=0)

    def measured(self, info: StorageInfo) -> None:
        """The server has looked how large its store is."""
        left = self._bytes_max - info.used_bytes
        # A measure is only its node's until a commit says it, and goes when the node dies before.
        self._left = [left] if self._world.nodes == 1 else [*self._left, left]
        self._least = min(self._left)
        self._failed = 0
        self._measured_at = self._world.server_clock.monotonic()

    def said(self, used: bytes | None) -> None:
        """A commit says that so much is taken: of what nodes knew, that is what counts for all."""
        if used is None:
            return
        most = self._bytes_max
        left = most - unpack_u64(used)
        self._left = sorted(self._left, key=lambda known: abs(min(known, most) - left))[:1]

    def failed(self, request: PushRequest) -> None:
        """The commit of a push found no room on the disk."""
        for op in (op for transaction in request.transactions for op in transaction.operations):
            self._failed += len(self._newest(request.schema, op.payload) or b"")

    def accepted(self, history: History) -> None:
        """The newest commit of ``history`` is of a push, and durable."""
        (before, size_before), (after, size_after) = history.sizes[-2:]
        checks, grown = self._world.checks, size_after - size_before
        if self._entities_max:
            checks.that(
                after <= max(before, self._entities_max),
                "QUOTA",
                f"a push left {after} entities in {self._name}, where {before} were and "
                f"{self._entities_max} may be",
            )
        if not self._bytes_max or (not self._left and self._world.nodes > 1):
            return
        since = self._world.server_clock.monotonic() - self._measured_at
        checks.that(
            bool(self._left) and since < MEASURED_S,
            "QUOTA",
            f"{self._name} took a push, and had not measured its store for {since} s",
        )
        most = max(self._left)
        checks.that(
            grown <= max(0, most),
            "QUOTA",
            f"a push made {self._name} grow by {grown} bytes, where {most} were left",
        )
        self._left = [left - grown for left in self._left]
        self._least = min(self._least, *self._left)

    def refused(
        self,
        request: PushRequest,
        transaction: PushTransaction,
        result: PushResult,
        history: History,
        head_before: int,
    ) -> None:
        """A transaction was ``over_quota``: on what was there before its group, or with some of
        its group, it would have taken more room, and more than there was."""
        names = request.collections
        writes = [
            ((names[op.collection], op.entity_id), self._newest(request.schema, op.payload))
            for op in transaction.operations
        ]
        entities = "database_entities_max" in result.message
        self._world.fired("quota_entities" if entities else "quota_bytes")
        true = False
        for version in range(head_before, history.head + 1):
            added = grown = 0
            for ref, payload in writes:
                was = history.state_at(ref, version)[1]
                added += (payload is not None) - (was is not None)
                grown += len(payload or b"") - len(was or b"")
            if entities:
                true |= added > 0 and history.sizes[version][0] + added > self._entities_max > 0
            else:
                true |= 0 < grown > self._least - self._failed and self._bytes_max > 0
        self._world.checks.that(
            true, "QUOTA", f"{self._name} had room for what was refused ({result.message})"
        )


class DevicesWatch:
    """Which devices each database has met, and who is one too many."""

    def __init__(self, world: World, keeper: Keeper) -> None:
        self._world = world
        self._keeper = keeper
        self._most = world.knobs.quota_devices
        self._own = own_devices(world.knobs)
        #: With the person who had each when it came first.
        self._met: dict[str, dict[bytes, str]] = {}

    def everybody(self) -> None:
        """The operator allows any number from now on."""
        self._most = self._own = ANY_NUMBER

    def let_in(self, request: SyncRequest, who: str) -> None:
        if not self._most:
            return
        met = self._met.setdefault(request.db_id, {})
        full = self._full(request.db_id, who)
        self._world.checks.that(
            request.device_id in met or not full,
            "QUOTA",
            f"{request.db_id} has {len(met)} devices, and let {request.device_id.hex()} of {who} "
            f"in too, which is beyond {full}",
        )
        met.setdefault(request.device_id, who)

    def kept_out(self, request: SyncRequest, who: str, error: SyncError) -> None:
        """The server has no use for a request; where it is for the number of devices, that is
        so."""
        if error.details.get("reason") != REASON:
            return
        self._world.fired("quota_devices")
        known = request.device_id in self._met.get(request.db_id, ())
        said = next(name for name in _LIMITS if name in error.message)
        full = self._full(request.db_id, who)
        self._world.checks.that(
            not known and said in full,
            "QUOTA",
            f"{request.device_id.hex()} of {who} is one too many in {request.db_id} for {said}; it "
            f"was met: {known}, and these are full: {full}",
        )

    def _full(self, db_id: str, who: str) -> list[str]:
        """The limits of a database that one more device of ``who`` would pass."""
        counted = [
            owner
            for device_id, owner in self._met.get(db_id, {}).items()
            if not self._keeper.locks(device_id, db_id)
        ]
        numbers = (len(counted), self._most), (counted.count(who), self._own)
        return [name for name, (has, most) in zip(_LIMITS, numbers, strict=True) if 0 < most <= has]


class RecordsInMemory:
    """What the processes of a simulated server keep beside its databases: durable at once."""

    far: Final = False

    def __init__(self) -> None:
        self._content: dict[str, bytes] = {}
        self._changes = 0

    def where(self, name: str) -> str:
        return name

    def read(self, name: str) -> bytes | None:
        return self._content.get(name)

    def mark(self, name: str) -> Mark:
        return (self._changes,)

    def change(self, name: str, make: Make, wrote: Wrote) -> None:
        content = make(self.read(name))
        if content is not None:
            self._content[name] = content
            self._changes += 1
            wrote(self.mark(name))

    def rename(self, name: str, to: str | None) -> None:
        content = self._content.pop(name, None)
        if to is not None and content is not None:
            self._content[to] = content

    def has_database(self, db_id: str) -> bool:
        return True


__all__ = [
    "_LIMITS",
    "OVER_QUOTA",
    "DevicesWatch",
    "QuotaWatch",
    "RecordsInMemory",
    "has_quota",
    "settings",
]
