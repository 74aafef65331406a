"""A database that has to be opened again after an error: whoever is at it for long, the next push
is taken within moments (R17)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.errors import CommitStaleError, DatabaseClosedError, ServerBusyError, StorageError
from entidb.protocol import PushResponse
from entidb.server.admin import backups, browse, care, databases, erase
from entidb.server.admin.tasks import Task
from entidb.server.segments.cutting import cut
from entidb.server.stores import Store
from entidb.storage.lmdb.copying import copy_file
from tests.server.support import push
from tests.server.test_backups import ROOT, Place

pytestmark = pytest.mark.process
VALUE = {"text": "ada"}
WANTED = {"notes": {"text": "ada"}}
#: Seconds within which the database is opened again; what holds it up goes on for far longer.
SOON_S = 5.0


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, segments_min_entities=1)
    made.server.handle("/v1/push", None, push(made.history(), 1, 2, 3, value=VALUE))
    yield made
    made.server.close()


class Held:
    """Something that goes on until it is told to end, or ends itself at a look; ``begun`` when it
    is at it."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.enough = threading.Event()

    def go_on(self, look: Callable[[], object]) -> None:
        self.begun.set()
        while not self.enough.is_set():
            look()
            time.sleep(0.005)


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    made.enough.set()


def breaks(place: Place) -> Store:
    """The database, in which a read or a commit has found an error."""
    store: Store = place.server.stores._stores["shop"]
    store.broken = True
    return store


def pushes_go_on(place: Place, old: Store, number: int) -> None:
    """As a device: who is told to come again comes again."""
    assert old.database.history is not None
    message = push(old.database.history, number)
    end = time.monotonic() + SOON_S
    while not isinstance(answer := place.server.handle("/v1/push", None, message), PushResponse):
        assert time.monotonic() < end, answer
        time.sleep(0.05)
    assert place.server.stores._stores["shop"] is not old


def slow_copy(monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    real = copy_file

    def slowly(env: Any, directory: str, go_on: Callable[[], None] | None = None) -> None:
        if go_on is not None:
            held.go_on(go_on)
        real(env, directory, go_on)

    monkeypatch.setattr("entidb.storage.lmdb.store.copy_file", slowly)


def test_who_looks_when_the_server_ends_is_told_that_it_ends(place: Place):
    def look() -> None:
        with place.server.stores.lasting("shop"):
            place.server.stores.close()
            raise DatabaseClosedError("closed")

    with pytest.raises(ServerBusyError) as raised:
        look()
    assert raised.value.code == "shutting_down"


def test_a_commit_that_another_opener_has_overtaken_says_nothing_against_a_database(place: Place):
    store: Store = place.server.stores._stores["shop"]
    store.report(CommitStaleError.of("there", 174, 175))
    assert not store.broken
    store.report(StorageError("no page"))
    assert store.broken


def test_a_database_whose_pushes_are_overtaken_each_time_is_opened_again(place: Place):
    """A group is decided again first; that it is overtaken for ever may come from its file."""
    store: Store = place.server.stores._stores["shop"]
    store.committer._on_failure(CommitStaleError.of("there", 174, 175))
    assert store.broken


@pytest.mark.parametrize("kind", ["backup", "verify"])
def test_a_copy_that_is_made_keeps_no_broken_database_from_being_opened_again(
    place: Place, held: Held, monkeypatch: pytest.MonkeyPatch, kind: str
):
    slow_copy(monkeypatch, held)
    begin = backups.backup if kind == "backup" else care.verify
    task = begin(place.office, ROOT, "shop")
    assert held.begun.wait(10)
    pushes_go_on(place, breaks(place), 4)
    ended = place.over(task)
    assert ended.state == "failed"
    assert ended.error == (
        "database 'shop' had to be opened again after an error meanwhile, which ended this: do it "
        "once more"
    )
    assert place.ids() == []
    assert [path.name for path in place.root.iterdir() if path.is_dir()] == ["shop.entidb"]
    assert list(place.backups.rglob("*.mdb")) == []
    # And so it is once more.
    held.enough.set()
    again = place.over(begin(place.office, ROOT, "shop"))
    assert again.state == "done", again.error


@pytest.mark.parametrize("kind", ["purge", "erase"])
def test_what_is_done_in_steps_ends_where_the_database_is_to_be_opened_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, kind: str
):
    steps = 0

    def step(*arguments: object) -> int:
        nonlocal steps
        steps += 1
        breaks(place)
        return 0

    if kind == "purge":
        place.push(*range(4, 40))
        monkeypatch.setattr(care, "purge_tombstones", step)
        task: Task = care.purge(place.office, ROOT, "shop", 0.0)
    else:
        monkeypatch.setattr(erase, "_BATCH", 1)
        monkeypatch.setattr(place.server.stores._stores["shop"].database, "on_commit", step)
        seen = erase.preview(place.office, ROOT, "shop", WANTED)
        task = erase.erase(place.office, ROOT, "shop", WANTED, seen.confirm)
    ended = place.over(task)
    assert ended.state == "failed" and "opened again after an error" in str(ended.error)
    assert steps == 1
    place.push(50)
    assert databases.row(place.office, ROOT, "shop").entities


def test_a_person_who_looks_keeps_no_broken_database_from_being_opened_again(
    place: Place, held: Held, monkeypatch: pytest.MonkeyPatch
):
    def slowly(found: Any, key: Any, value: Any, *, short: bool) -> browse.BrowsedEntity:
        held.go_on(lambda: found.info(key))
        return real(found, key, value, short=short)

    real = browse._row
    monkeypatch.setattr(browse, "_row", slowly)
    raised: list[BaseException] = []

    def look() -> None:
        try:
            browse.entities(place.office, ROOT, "shop", "notes")
        except BaseException as error:
            raised.append(error)

    looking = threading.Thread(target=look)
    looking.start()
    assert held.begun.wait(10)
    pushes_go_on(place, breaks(place), 4)
    looking.join(10)
    assert isinstance(raised[0], ServerBusyError)
    held.enough.set()
    assert len(browse.entities(place.office, ROOT, "shop", "notes").rows) == 4


def test_an_image_that_is_made_keeps_no_broken_database_from_being_opened_again(
    place: Place, held: Held, monkeypatch: pytest.MonkeyPatch
):
    def slowly(*arguments: Any) -> Any:
        for made in real(*arguments):
            held.begun.set()
            for _ in range(1000):
                if held.enough.is_set():
                    break
                yield made  # each of them is looked at first

    real = cut
    monkeypatch.setattr("entidb.server.segments.building.cut", slowly)
    images = place.server.images
    making = threading.Thread(target=lambda: images._do("shop"))
    making.start()
    assert held.begun.wait(10)
    pushes_go_on(place, breaks(place), 4)
    making.join(10)
    assert not making.is_alive()
