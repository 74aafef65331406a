"""Several processes on one store, simulated; and bugs put in on purpose, which are noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from entidb.db import Database
from entidb.db.catalogue import Catalogue
from entidb.db.core import Core
from entidb.db.moment import Moment
from entidb.db.observers import Observers
from entidb.db.writer import Writer
from entidb.storage import MemoryStorage
from entidb.storage.base import StoreTurn
from entidb.storage.memory import MemoryTurn
from entidb.testing.openers_simulator import first_failure, main, run

SEEDS_MAX: Final = 300
Plant = Callable[[pytest.MonkeyPatch], None]
BUGS: Final[dict[str, tuple[Plant, set[str]]]] = {}


def bug(name: str, *invariants: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        BUGS[name] = plant, set(invariants)
        return plant

    return register


@bug("turn-of-the-dead-is-kept", "TURN", "ENGINE")
def _turn_kept(patch: pytest.MonkeyPatch) -> None:
    """Nobody ends the turn of a process that died in it."""

    def take(self: MemoryTurn, timeout_s: float | None = None) -> bool:
        if self._me not in self._line:
            self._line.append(self._me)
        if self.mine:
            return True
        self.give_back()
        return False

    def close(self: MemoryStorage) -> None:
        self._closed = True

    patch.setattr(MemoryTurn, "take", take)
    patch.setattr(MemoryStorage, "close", close)


@bug("turn-is-not-exclusive", "TURN", "DENSE", "LEDGER", "SOUND")
def _turn_shared(patch: pytest.MonkeyPatch) -> None:
    """Everybody has the turn at once; no other right."""

    def mine(self: MemoryTurn) -> bool:
        owner = self._me()
        assert owner is not None
        return self._line is owner.turn._line or self._line[:1] == [self._me]

    patch.setattr(MemoryTurn, "mine", property(mine))


@bug("stale-catalogue", "FRESH", "SOUND", "LEDGER")
def _stale_catalogue(patch: pytest.MonkeyPatch) -> None:
    """The catalogue of one's own last commit is good for ever."""
    original = Core.read_catalogue

    def read_catalogue(self: Core, snapshot: Any) -> Catalogue:
        left = self._left
        return original(self, snapshot) if left is None else left[2]

    patch.setattr(Core, "read_catalogue", read_catalogue)


@bug("cached-head-after-anothers-commit", "DENSE", "SOUND", "FRESH")
def _cached_head(patch: pytest.MonkeyPatch) -> None:
    """The head of one's own last commit is good for ever."""
    original = Core._writer

    def writer(self: Core, snapshot: Any) -> Writer:
        if self._left is not None:
            self._left = snapshot.mark, *self._left[1:]
        return original(self, snapshot)

    patch.setattr(Core, "_writer", writer)


@bug("moment-never-passes", "FRESH")
def _eternal_moment(patch: pytest.MonkeyPatch) -> None:
    """What was read is true for ever."""
    patch.setattr(Moment, "is_current", lambda self: True)


@bug("moment-asks-this-process-alone", "FRESH")
def _own_moment(patch: pytest.MonkeyPatch) -> None:
    """Only commits of this process end a moment."""

    def is_current(self: Moment) -> bool:
        source: Any = self.source
        return source._left is None or source._left[0] <= self.mark

    patch.setattr(Moment, "is_current", is_current)


@bug("lost-wake-up", "HEARD")
def _lost_wake_up(patch: pytest.MonkeyPatch) -> None:
    """One's own commit counts as all that was committed before it."""
    original = Observers.tell

    def tell(self: Observers, reading: Any, sequence: int, feed: Any, *rest: Any) -> None:
        self.told = feed[0][0][0] - 1
        original(self, reading, sequence, feed, *rest)

    patch.setattr(Observers, "tell", tell)


@bug("heard-twice", "HEARD")
def _heard_twice(patch: pytest.MonkeyPatch) -> None:
    """One's own commit is told as another process's as well."""
    original = Observers.tell

    def tell(self: Observers, reading: Any, sequence: int, feed: Any, *rest: Any) -> None:
        original(self, reading, sequence, feed, *rest)
        self.told = feed[0][0][0] - 1

    patch.setattr(Observers, "tell", tell)


@bug("two-engines", "ENGINE")
def _two_engines(patch: pytest.MonkeyPatch) -> None:
    """A sync engine looks for others in its own process only."""

    def right(self: Database, name: str) -> StoreTurn:
        return MemoryStorage().claim(name)

    patch.setattr(Database, "right", right)


@bug("engine-of-the-dead-is-kept", "ENGINE", "TURN")
def _engine_kept(patch: pytest.MonkeyPatch) -> None:
    """A process that dies keeps the right to run the engine."""
    original = MemoryTurn.take

    def take(self: MemoryTurn, timeout_s: float | None = None) -> bool:
        me = self._me()
        assert me is not None
        if self._line is not me.turn._line and self._line and self._line[0] is not self._me:
            return False
        return original(self, timeout_s)

    patch.setattr(MemoryTurn, "take", take)


@bug("no-fence", "FENCE", "DENSE")
def _no_fence(patch: pytest.MonkeyPatch) -> None:
    """The store takes what was decided on an older state."""
    original = MemoryStorage.commit

    def commit(self: MemoryStorage, batch: Any, after: int | None = None) -> int:
        return original(self, batch)

    patch.setattr(MemoryStorage, "commit", commit)


def test_several_processes_keep_every_promise() -> None:
    assert first_failure(range(1000)) is None


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_put_in_on_purpose_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, invariants = BUGS[name]
    plant(monkeypatch)
    found = first_failure(range(SEEDS_MAX))
    assert found is not None, f"{name} is not noticed in {SEEDS_MAX} seeds"
    assert found[1] in invariants


def test_a_seed_is_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(3) == run(3) is None
    assert main(["0", "5"]) == 0
    assert capsys.readouterr().out == "all is well\n"


def test_the_program_says_which_seed_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _two_engines(monkeypatch)
    assert main(["0", str(SEEDS_MAX)]) == 1
    assert "ENGINE" in capsys.readouterr().out
