"""What is true: every state a server database ever had, kept beside the real one.

A ``History`` is one life of a server database (R29). It learns from the storage commits of the
real server and from the requests that were being decided, never from the server's answers. It
decides nothing; what must hold is in ``invariants``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Final

from entidb.types import SeenCommit

Ref = tuple[str, bytes]
#: (version, payload): what an entity is at some cursor; version 0 is "never there".
State = tuple[int, bytes | None]

NEVER: Final[State] = (0, None)
#: (device id, timestamp) of a commit.
Mark = tuple[bytes, int]


class History:
    """All commits of one history, by version."""

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        #: Entities written by each commit; position 0 is unused, so that versions are positions.
        self.commits: list[list[Ref]] = [[]]
        #: Transaction id and digest of each commit; None for programs on the server.
        self.writers: list[tuple[bytes, bytes] | None] = [None]
        #: Device and timestamp of each commit, as the server keeps and sends them.
        self.marks: list[Mark] = [(b"", 0)]
        #: By id: version and digest. One whose id was forgotten can be accepted again (R14).
        self.accepted: dict[bytes, tuple[int, bytes]] = {}
        #: After each commit: how many entities there are, and the bytes of their payloads.
        self.sizes: list[tuple[int, int]] = [(0, 0)]
        #: Of the terms that began in it: the first commit, and the name (R29).
        self.terms: list[tuple[int, bytes]] = []
        self.floor = 0
        self._versions: dict[Ref, list[int]] = {}
        self._payloads: dict[Ref, list[bytes | None]] = {}

    @property
    def head(self) -> int:
        return len(self.commits) - 1

    def append(
        self,
        transaction_id: bytes | None,
        digest: bytes,
        writes: Sequence[tuple[Ref, bytes | None]],
        mark: Mark,
    ) -> int:
        """The next commit; returns its version."""
        version = len(self.commits)
        self.commits.append([ref for ref, _ in writes])
        self.writers.append(None if transaction_id is None else (transaction_id, digest))
        self.marks.append(mark)
        if transaction_id is not None:
            self.accepted[transaction_id] = (version, digest)
        count, size = self.sizes[-1]
        for ref, payload in writes:
            was = self.latest(ref)[1]
            count += (payload is not None) - (was is not None)
            size += len(payload or b"") - len(was or b"")
            versions = self._versions.get(ref)
            if versions is None:
                self._versions[ref] = [version]
                self._payloads[ref] = [payload]
            else:
                versions.append(version)
                self._payloads[ref].append(payload)
        self.sizes.append((count, size))
        return version

    def fork(self, identity: bytes, head: int, floor: int) -> History:
        """What a backup made at ``head`` becomes when it is opened."""
        made = History(identity)
        for version in range(1, head + 1):
            transaction_id, digest = self.writers[version] or (None, b"")
            writes = [(ref, self.state_at(ref, version)[1]) for ref in self.commits[version]]
            made.append(transaction_id, digest, writes, self.marks[version])
        made.terms = [each for each in self.terms if each[0] <= head]
        made.floor = floor
        return made

    def has(self, seen: SeenCommit) -> bool:
        """Whether the commit is one of these."""
        begun = [name for first, name in self.terms if first <= seen.version]
        return seen.version <= self.head and bool(begun) and begun[-1] == seen.term

    def common_with(self, other: History) -> int:
        """Up to which commit the two are the same."""
        for version in range(1, min(self.head, other.head) + 1):
            if self._commit(version) != other._commit(version):
                return version - 1
        return min(self.head, other.head)

    def _commit(self, version: int) -> tuple[object, ...]:
        writes = [(ref, self.state_at(ref, version)[1]) for ref in self.commits[version]]
        return self.writers[version], self.marks[version], writes

    def latest(self, ref: Ref) -> State:
        versions = self._versions.get(ref)
        return NEVER if versions is None else (versions[-1], self._payloads[ref][-1])

    def state_at(self, ref: Ref, cursor: int) -> State:
        """The entity as of commit ``cursor``, inclusive."""
        versions = self._versions.get(ref)
        if versions is None:
            return NEVER
        if versions[-1] <= cursor:
            return versions[-1], self._payloads[ref][-1]
        at = bisect_right(versions, cursor) - 1
        return NEVER if at < 0 else (versions[at], self._payloads[ref][at])

    def state_with(self, ref: Ref, cursor: int, have: Sequence[Sequence[int]]) -> State:
        """As ``state_at``, or the newest version above the cursor that is in ``have`` (R21)."""
        if have:
            versions = self._versions.get(ref)
            if versions is None:
                return NEVER
            for at in range(len(versions) - 1, -1, -1):
                version = versions[at]
                if version <= cursor:
                    return version, self._payloads[ref][at]
                for first, last in have:
                    if first <= version <= last:
                        return version, self._payloads[ref][at]
            return NEVER
        return self.state_at(ref, cursor)

    def written_between(self, ref: Ref, after: int, to: int) -> list[int]:
        """Versions of the entity in ``after < version <= to``."""
        return [version for version in self._versions.get(ref, ()) if after < version <= to]

    def changes(self, after: int, to: int) -> Iterator[tuple[int, Ref, bytes | None]]:
        """The change feed by definition: entities whose latest version is in the range (R11)."""
        for version in range(after + 1, to + 1):
            for ref in self.commits[version]:
                latest = self.latest(ref)
                if latest[0] == version:
                    yield version, ref, latest[1]

    def changes_then(
        self, after: int, to: int, head: int
    ) -> Iterator[tuple[int, Ref, bytes | None]]:
        """As ``changes``, when the head was ``head``."""
        for version in range(after + 1, to + 1):
            for ref in self.commits[version]:
                at, payload = self.state_at(ref, head)
                if at == version:
                    yield version, ref, payload

    def refs(self) -> Iterator[Ref]:
        return iter(self._versions)

    def live(self) -> dict[Ref, State]:
        return {ref: self.latest(ref) for ref in self._versions if self.latest(ref)[1] is not None}


class Histories:
    """Every history of one database, by its 16 bytes. Where files were put back by hand, one has
    several pasts."""

    def __init__(self) -> None:
        self._known: dict[bytes, list[History]] = {}

    def begin(self, identity: bytes) -> History:
        return self._known.setdefault(identity, [History(identity)])[-1]

    def add(self, history: History) -> None:
        """A new one, or what one of before goes on as."""
        self._known.setdefault(history.identity, []).append(history)

    def get(self, identity: bytes | None) -> History | None:
        """As it goes on now."""
        return None if identity is None else self._known.get(identity, [None])[-1]

    def past(self, identity: bytes, seen: SeenCommit | None) -> History | None:
        """The one of which the commit is that was ``seen``; as it goes on now, if that is not
        known."""
        for history in reversed(self._known.get(identity, ())):
            if seen is not None and history.has(seen):
                return history
        return self.get(identity)


def has_version(have: Sequence[Sequence[int]], version: int) -> bool:
    return any(first <= version <= last for first, last in have)


__all__ = ["Histories", "History", "NEVER", "Ref", "State", "has_version"]
