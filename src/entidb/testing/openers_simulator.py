"""Several processes on one store, simulated: real databases on a store in memory, at virtual pace,
with every choice drawn from a seed.

Each *process* is a ``Database`` on an opener of its own. It begins transactions and commits or
forgets them, changes the catalogue, reads, listens, runs a sync engine, and dies at any point,
inside its turn too; another takes its place. A ledger holds what was acknowledged.

Invariants, each checked at every step or at the end:

    LEDGER   what was acknowledged is there, once, and each transaction whole
    DENSE    every transaction has the next sequence
    SOUND    ``verify`` finds nothing
    FRESH    what is read is what was committed last, by whomever; a moment that is current is true
    TURN     whoever waits for nobody alive gets the turn; one has it at a time
    FENCE    who lost the turn without noticing, and commits after others have, changes nothing
    HEARD    observers hear of every commit once, in order, and of their own as their own
    ENGINE   one process has the engine; if the one that has it dies, another gets it

Not here: devices and servers (``simulator``), and real processes (``torture_openers``).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from entidb.db import Database
from entidb.db.moment import Moment
from entidb.db.observers import CommitEvent
from entidb.db.transaction import Transaction
from entidb.errors import CommitStaleError, EntiDBError, TransactionError
from entidb.storage import MemoryStorage

PROCESSES = 3
STEPS = 60


class Broken(AssertionError):
    """An invariant failed; ``invariant`` is its name."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{invariant}: {what}")
        self.invariant = invariant


@dataclass
class OpenerProcess:
    """One process that is alive."""

    database: Database
    transaction: Transaction | None = None
    marks: list[str] = field(default_factory=list)
    heard: list[CommitEvent] = field(default_factory=list)
    listens_since: int = -1
    own: set[int] = field(default_factory=set)
    engine: bool = False
    #: How many commits there were when it lost the turn of its transaction without noticing.
    lost_at: int | None = None
    moment: tuple[Moment, int] | None = None


class Several:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"openers {seed}")
        self.store = MemoryStorage()
        self.ledger: list[str] = []
        self.collections: set[str] = set()
        self.alive: list[OpenerProcess] = []
        self.number = 0
        #: Of the store, those without a sequence too.
        self.commits = 0
        while len(self.alive) < PROCESSES:
            self.begin()

    def run(self) -> None:
        """Raises ``Broken``."""
        steps: list[tuple[Callable[[OpenerProcess], None], int]] = [
            (self.open_transaction, 4),
            (self.write_one, 5),
            (self.end_transaction, 6),
            (self.lose_turn, 1),
            (self.declare, 2),
            (self.read, 4),
            (self.remember, 3),
            (self.listen, 1),
            (self.hear, 4),
            (self.take_engine, 2),
            (self.die, 2),
        ]
        does, weights = zip(*steps, strict=True)
        for _ in range(STEPS):
            (step,) = self.rng.choices(does, weights)
            try:
                step(self.rng.choice(self.alive))
            except EntiDBError as error:
                raise Broken("SOUND", f"{type(error).__name__}: {error}") from error
        self.end()

    # ---- what a process does

    def begin(self) -> None:
        self.alive.append(OpenerProcess(Database(self.store.another(), busy_timeout_s=0.0)))

    def turn_is_free(self, process: OpenerProcess) -> bool:
        """Whether nobody who is alive has the turn, but ``process``."""
        others = [each for each in self.alive if each is not process]
        return all(each.transaction is None or each.lost_at is not None for each in others)

    def open_transaction(self, process: OpenerProcess) -> None:
        if process.transaction is not None:
            return
        try:
            process.transaction = process.database.transaction()
        except TransactionError as error:
            if self.turn_is_free(process):
                raise Broken("TURN", f"nobody alive has it: {error}") from error
            return
        if not self.turn_is_free(process):
            raise Broken("TURN", "two have it")

    def _write(self, tx: Transaction) -> str:
        mark = f"m{self.number}"
        self.number += 1
        for n in range(2):
            tx.collection(self.rng.choice(("a", "b"))).add({"mark": mark, "n": n})
        return mark

    def lose_turn(self, process: OpenerProcess) -> None:
        """As a process that was paused, where a store gives its turn to others then."""
        if process.transaction is not None and process.lost_at is None:
            process.lost_at = self.commits
            process.database.storage.turn.give_back()

    def write_one(self, process: OpenerProcess) -> None:
        self.open_transaction(process)
        if process.transaction is not None and not process.marks:
            process.marks.append(self._write(process.transaction))
        if self.rng.random() < 0.5:
            self.end_transaction(process)

    def end_transaction(self, process: OpenerProcess) -> None:
        tx, process.transaction = process.transaction, None
        marks, process.marks = process.marks, []
        lost_at, process.lost_at = process.lost_at, None
        if tx is None:
            return
        if not marks or self.rng.random() < 0.2 or not self.turn_is_free(process):
            tx.abort()
            return
        try:
            sequence = tx.commit()
        except CommitStaleError as error:
            if lost_at in (None, self.commits):
                raise Broken("FENCE", "refused, and nobody has committed since") from error
            return
        if lost_at not in (None, self.commits):
            raise Broken("FENCE", "committed on an older state")
        self.commits += 1
        self.ledger += marks
        process.own.add(sequence)
        if sequence != len(self.ledger):
            raise Broken("DENSE", f"commit {len(self.ledger)} has sequence {sequence}")

    def declare(self, process: OpenerProcess) -> None:
        if process.transaction is not None or not self.turn_is_free(process):
            return
        name = f"local {self.rng.randrange(6)}"
        if name not in self.collections:
            self.commits += 1
        process.database.declare_local(name)
        self.collections.add(name)

    def read(self, process: OpenerProcess) -> None:
        database = process.database
        if database.sequence != len(self.ledger):
            raise Broken("FRESH", f"{database.sequence} after {len(self.ledger)} commits")
        there = set(database.collections())
        if not self.collections <= there:
            raise Broken("FRESH", f"without {sorted(self.collections - there)}")
        if process.moment is not None:
            moment, sequence = process.moment
            if moment.is_current() and sequence != len(self.ledger):
                raise Broken("FRESH", f"what was read at {sequence} counts as new")

    def remember(self, process: OpenerProcess) -> None:
        """As a cache does: what is read, with its moment."""
        self.read(process)
        with process.database.view() as view:
            process.moment = view.moment, view.head.sequence

    def listen(self, process: OpenerProcess) -> None:
        if process.listens_since < 0:
            process.listens_since = len(self.ledger)
            process.database.observe(process.heard.append)

    def hear(self, process: OpenerProcess) -> None:
        """As the thread does that waits for another mark."""
        if process.listens_since < 0:
            return
        process.database.hear_others()
        sequences = [event.sequence for event in process.heard]
        wanted = list(range(process.listens_since + 1, len(self.ledger) + 1))
        if sequences != wanted:
            raise Broken("HEARD", f"{sequences} instead of {wanted}")
        for event in process.heard:
            if (event.origin == "process") is (event.sequence in process.own):
                raise Broken("HEARD", f"commit {event.sequence} is said to be {event.origin}")

    def take_engine(self, process: OpenerProcess) -> None:
        others = [each for each in self.alive if each.engine and each is not process]
        if not process.database.right("background").take(0):
            if not others:
                raise Broken("ENGINE", "nobody alive has it, and nobody gets it")
            return
        if others:
            raise Broken("ENGINE", "two have it")
        process.engine = True

    def die(self, process: OpenerProcess) -> None:
        """As by SIGKILL: nothing of it runs any more; the system closes its files."""
        self.alive.remove(process)
        process.database.storage.close()
        self.begin()

    # ---- the end

    def end(self) -> None:
        for process in list(self.alive):
            self.end_transaction(process)
        for process in list(self.alive):
            self.write_one(process)
            self.end_transaction(process)
            self.read(process)
        for process in self.alive:
            self.hear(process)
            faults = process.database.verify()
            if faults:
                raise Broken("SOUND", faults[0])
        self._compare(self.alive[0].database)

    def _compare(self, database: Database) -> None:
        found: dict[str, int] = {}
        for name in ("a", "b"):
            for value in database[name].values():
                found[value["mark"]] = found.get(value["mark"], 0) + 1
        if found != dict.fromkeys(self.ledger, 2):
            raise Broken("LEDGER", f"{len(found)} transactions for {len(self.ledger)} acknowledged")


def run(seed: int) -> str | None:
    """The name of the invariant that fails under ``seed``; None if all is well."""
    try:
        Several(seed).run()
    except Broken as broken:
        return broken.invariant
    return None


def first_failure(seeds: range) -> tuple[int, str] | None:
    """The first seed that fails, and what."""
    for seed in seeds:
        invariant = run(seed)
        if invariant is not None:
            return seed, invariant
    return None


def main(arguments: list[str] | None = None) -> int:
    """``python -m entidb.testing.openers_simulator A B``: the seeds from A up to, not with, B."""
    import sys

    given: Any = sys.argv[1:] if arguments is None else arguments
    found = first_failure(range(int(given[0]), int(given[1])))
    print("all is well" if found is None else f"seed {found[0]}: {found[1]}")
    return 0 if found is None else 1


if __name__ == "__main__":
    raise SystemExit(main())


__all__ = ["Broken", "Several", "first_failure", "run"]
