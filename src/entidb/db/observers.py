"""Calling observers after commits: in commit order, outside all locks, in the thread that
committed.

Not here: adding one (``listeners``), and what a commit contains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from msgspec import Struct

from entidb import cbor
from entidb.db.feed import ChangeEvent, load_events, read_events
from entidb.db.listeners import report_bug
from entidb.db.rows import SnapshotRows
from entidb.storage.turns import Turn, Turns


class CommitEvent(Struct, frozen=True):
    """What observers are called with, once per storage commit that changed what readers see.
    ``origin`` is ``"local"`` or ``"sync"``; or ``"process"`` for one of another process, of which
    it holds what no later commit has changed again."""

    sequence: int
    origin: str
    events: list[ChangeEvent]


Observer = Callable[[CommitEvent], None]


class Observers:
    """Who is called after commits, and what they have still to be called with."""

    def __init__(self) -> None:
        self.listeners: list[Observer] = []
        #: Called when the database is closed: whoever waits for commits learns that none comes.
        self.when_closed: list[Callable[[], None]] = []
        #: The newest commit that was delivered, since there are listeners; -1: there were none yet.
        self.told = -1
        #: The first sequence of this process's own commit while it is under way: it and what
        #: comes after it are not another process's to be told. 0: none.
        self.committing = 0
        #: What puts commits into the order in which they are delivered.
        self.telling = Turns()
        #: What ``deliver`` has still to call them with.
        self.deliveries: deque[CommitEvent] = deque()
        self._delivering = Turns()

    def tell(
        self,
        reading: AbstractContextManager[SnapshotRows],
        sequence: int,
        feed: list[tuple[tuple[int, int, bytes], bytes]],
        origin: str,
        calls: Sequence[CommitEvent] = (),
    ) -> None:
        """Keep for ``deliver`` what this process's commit ``sequence`` changed: the rows ``feed``,
        read as the commit left them, or ``calls`` where several transactions share the commit;
        behind those of others that came before."""
        first = feed[0][0][0]
        with self.telling.hold(), reading as rows:
            if 0 <= self.told < first - 1:
                self._tell_others(rows, first)
            if not calls:
                entities = [place for place, _ in feed if place[1]]
                events = load_events(rows.snapshot, rows.catalogue, entities)
                for place, record in feed:
                    if not place[1]:
                        names = cbor.decode_trusted(record)
                        events += [ChangeEvent(place[0], "reset", name, "remote") for name in names]
                calls = [CommitEvent(sequence, origin, events)]
            self.deliveries.extend(calls)
            self.told = sequence
            self.committing = 0

    def begin(self, sequence: int) -> None:
        """Observers that are added from now on have seen what was committed up to ``sequence``."""
        with self.telling.hold():
            self.told = max(self.told, sequence)

    def tell_others(self, reading: AbstractContextManager[SnapshotRows]) -> int:
        """Keep for ``deliver`` what other processes have committed; the mark up to which that
        is."""
        with self.telling.hold(), reading as rows:
            # Looked at behind the snapshot: what of this process is in it was announced before.
            self._tell_others(rows, self.committing)
            return rows.snapshot.mark

    def _tell_others(self, rows: SnapshotRows, before: int) -> None:
        """``before`` this sequence; 0: all there is."""
        more = True
        while more:
            events, reached, more = read_events(rows.snapshot, rows.catalogue, self.told)
            by_commit: dict[int, list[ChangeEvent]] = {}
            for event in events:
                by_commit.setdefault(event.sequence, []).append(event)
            for sequence, found in by_commit.items():
                if before and sequence >= before:
                    reached, more = before - 1, False
                    break
                self.deliveries.append(CommitEvent(sequence, "process", found))
            if before:
                reached = min(reached, before - 1)
            self.told = max(self.told, reached)

    def deliver(self) -> None:
        """Call the observers with the commits since they were called last."""
        # Commits made by an observer queue up and are delivered by the loop that is running.
        while self.deliveries and self._delivering.idle():
            turn = Turn()
            try:
                if not self._delivering.take(turn, 0):
                    return
                while self.deliveries:
                    self._call_observers(self.deliveries.popleft())
                self._delivering.give_back(turn)
            except BaseException:
                self._delivering.give_back(turn)
                raise

    def is_called_by(self, thread: int | None) -> bool:
        """Whether ``thread`` is calling observers now."""
        return any(turn.thread == thread for turn in self._delivering.first())

    def _call_observers(self, event: CommitEvent) -> None:
        self._call_each(iter(list(self.listeners)), event)

    def _call_each(self, observers: Iterator[Observer], event: CommitEvent) -> None:
        for observer in observers:
            try:
                observer(event)
            except Exception as error:
                report_bug(error, observer)
            except BaseException:
                self._call_each(observers, event)
                raise
