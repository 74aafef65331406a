"""The person in front of a simulated device, who works through what the engine leaves to one."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from entidb.db import OverruledValue
from entidb.db.subjects import count_others, sendable
from entidb.errors import ConflictError
from entidb.sync import Conflict, ConflictResolution
from entidb.sync.drive import Drive
from entidb.testing.between import BetweenEngine
from entidb.testing.faults import FaultyStorage
from entidb.testing.hands import Hands
from entidb.testing.invariants import GROUP_COLLECTION
from entidb.testing.watch import DeviceWatch
from entidb.testing.workload import Workload
from entidb.testing.world import World


class Person:
    """The part of a device that is its user's."""

    world: World
    name: str
    workload: Workload
    rng: random.Random
    watch: DeviceWatch
    storage: FaultyStorage
    engine: BetweenEngine
    restarts: int
    due: frozenset[bytes]
    cancelled: bool
    guarded: Callable[[Callable[[], object]], bool]
    hands: Hands
    drive: Drive | None
    renew_token: Callable[[], None]
    #: A conflict that the person has seen and not decided yet.
    looked_at: Conflict | None = None

    # ------------------------------------------------------------ who it is (R36)

    def change_hands(self) -> None:
        """Somebody else takes the device; or their token comes to it, and nobody says so."""
        who = self.hands.another()
        if self.hands.signed is not None and self.hands.coin():
            self.world.trace("another's token", self.name, who)
            self.world.tell(f"{self.name} gets the token of {who}")
            self.held_by(who)
        elif self.drive is None:
            self.sign_out(who)
        else:
            return
        self.world.fired("people")

    def sign_out(self, who: str) -> None:
        """Whoever has the device leaves it to ``who``."""
        self.world.trace("signs out", self.name, who)
        self.world.tell(f"{self.name} is taken over by {who}")
        self.hands.leaving = True
        leave = partial(self.engine.logout, "keep", subject=self.hands.who)
        if not self.guarded(leave):
            # It may or may not have happened; they look again.
            armed, self.storage.armed = self.storage.armed, False
            self.engine.logout("keep", subject=self.hands.who)
            self.storage.armed = armed
        self.hands.gone()
        self.held_by(who)

    def held_by(self, who: str) -> None:
        self.hands.who = who
        self.renew_token()

    def let_in_who_waits(self) -> None:
        """Somebody whose work waits comes and syncs, when whoever is there has nothing to push."""
        with self.engine.database.view() as view:
            waiting = set(count_others(view.snapshot, view.sync_state))
            busy = sendable(view, view.sync_state)
        if waiting and not busy and self.drive is None:
            self.sign_out(self.hands.one_of(waiting))

    # ------------------------------------------------------------ what they decide

    def person(self) -> None:
        """The person works through conflicts and discarded transactions."""
        self.due = frozenset()  # what is released now is for the sync after this one
        restarts = self.restarts
        kept = self.watch.unreported, self.watch.unreported_conflicts
        losers = self.watch.losers.set_aside()
        self.watch.unreported, self.watch.unreported_conflicts = {}, {}
        self.guarded(self._decide_something)
        if restarts == self.restarts:
            self.watch.unreported, self.watch.unreported_conflicts = kept
            self.watch.losers.take_back(losers)
        self.watch.by_person_ids = ()
        self.watch.by_person = {}
        self.watch.losers.by_person = None

    def _decide_something(self) -> None:
        conflicts, discarded = self.engine.conflicts(), self.engine.discarded()
        overruled = self.engine.overruled()
        self.world.checks.that(
            [replace(each, subject=None) for each in overruled]
            == [kept for _, kept in sorted(self.watch.losers.kept.items())],
            "SURFACED-ONCE",
            f"{self.name} lists other overruled values than it keeps",
        )
        listed = [_place(conflict) for conflict in conflicts]
        self.world.checks.that(
            sorted(listed) == sorted(self.watch.open_conflicts)
            and [entry.transaction_id for entry in discarded]
            == [self.watch.discarded[key] for key in sorted(self.watch.discarded)],
            "SURFACED-ONCE",
            f"{self.name} lists other conflicts or discarded transactions than it has",
        )
        for entry in discarded:
            self.hands.listed(entry)
        for value in overruled:
            self.hands.listed(value)
        if conflicts and (not discarded or self.rng.random() < 0.7):
            conflict = self.rng.choice(conflicts)
            if self._decide_late():
                return
            self.looked_at = self.rng.choice(conflicts)
            choices = [ConflictResolution.keep_local(), ConflictResolution.accept_remote()]
            if conflict.collection != GROUP_COLLECTION:
                choices.append(ConflictResolution.merge(self.workload.value()))
            resolution = self.rng.choice(choices)
            self.world.trace("resolve", self.name, resolution.action.value)
            self._decide(conflict, resolution)
            self.world.fired("person")
        elif overruled and (not discarded or self.rng.random() < 0.5):
            self._deal_with(self.rng.choice(overruled))
            self.world.fired("person")
        elif discarded:
            entry = self.rng.choice(discarded)
            self.watch.by_person_ids = (entry.transaction_id,)
            again = self.rng.random() < 0.3
            self.world.trace("recommit" if again else "prune", self.name)
            if again:
                aside = self.watch.losers.set_aside()  # what this keeps is in no cycle's report
                self.watch.recommits = {(name, raw): (0, b"") for name, raw, _ in entry.operations}
                for name, raw, version, writer, _, _ in entry.lost_to:
                    if (name, raw) in self.watch.recommits:
                        self.watch.recommits[name, raw] = version, writer
                try:
                    self.engine.recommit(entry)
                finally:
                    self.watch.recommits = {}
                    self.watch.losers.take_back(aside)
                self.watch.on_recommitted(self.storage.records, entry)
            else:
                self.engine.prune(entry)
            self.world.fired("person")

    def _deal_with(self, value: OverruledValue) -> None:
        """The person writes an overruled value back, or forgets it."""
        self.watch.losers.by_person = value.number
        again = value.collection != GROUP_COLLECTION and self.rng.random() < 0.3
        self.world.trace("write back" if again else "forget", self.name)
        if not again:
            self.engine.prune(value)
            return
        self.watch.put_back = value
        aside = self.watch.losers.set_aside()
        try:
            self.engine.recommit(value)
        except ConflictError as error:
            self.world.trace("refused", error.code)
            return
        finally:
            self.watch.put_back = None
            self.watch.losers.take_back(aside)
        self.watch.on_written_back(self.storage.records, value)

    def _decide_late(self) -> bool:
        """Now and then the person decides about a conflict as they saw it some time ago; whether
        they did. It counts only if the server's side is still the same."""
        seen, self.looked_at = self.looked_at, None
        if seen is None or self.world.quiet or self.rng.random() < 0.5:
            return False
        now = [c.remote_version for c in self.engine.conflicts() if _place(c) == _place(seen)]
        self.world.trace("resolve late", self.name)
        try:
            self._decide(seen, ConflictResolution.keep_local())
        except ConflictError as error:
            self.world.trace("refused", error.code)
            return True
        self.world.fired("person")
        self.world.checks.that(
            now == [seen.remote_version],
            "SURFACED-ONCE",
            f"{self.name} took a decision on another state of the server than it was made on",
        )
        return True

    def _decide(self, conflict: Conflict, resolution: ConflictResolution) -> None:
        """A person who decides about one of a group decides the same about all of it, and is not
        cut off in between: a policy that looks at the base would merge what is decided and what is
        not into different values, as it should, and the group would not be whole any more."""
        if conflict.collection != GROUP_COLLECTION:
            self._resolve(conflict, resolution)
            return
        armed, self.storage.armed = self.storage.armed, False
        try:
            self._resolve(conflict, resolution)
            for other in self.engine.conflicts():
                if _group(other) == _group(conflict):
                    self._resolve(other, resolution)
        finally:
            self.storage.armed = armed

    def _resolve(self, conflict: Conflict, resolution: ConflictResolution) -> None:
        self.watch.by_person = {_place(conflict): None}
        self.watch.on_report(self.engine.resolve(conflict, resolution))


def _place(conflict: Conflict) -> tuple[str, bytes]:
    return conflict.collection, conflict.id_bytes


def _group(conflict: Conflict) -> tuple[str, bytes]:
    """What the ids of a group have in common: all but the number of the member."""
    return conflict.collection, conflict.id_bytes[:-1]


__all__ = ["Person"]
