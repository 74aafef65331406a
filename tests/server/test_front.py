"""The front: every server answers through it, and gives back what it used."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from entidb.errors import (
    HistoryChangedError,
    PermissionDeniedError,
    ServerBusyError,
    ServerError,
    StorageError,
    StorageFullError,
)
from entidb.protocol import (
    CONTENT_TYPE,
    HandshakeResponse,
    PullResponse,
    PushResponse,
    SyncRequest,
    SyncResponse,
    Verdict,
    decode_response,
    encode,
    path_of,
)
from entidb.server import Grant, ServerConfig, SyncServer, serving
from entidb.server.auth import Grants, Rights, everything
from entidb.server.front import Front
from entidb.server.place import MemoryPlace
from entidb.server.stores import Store, Stores
from tests.server.support import Client, ManualClock, handshake, pull, push

GRANT = Grant(subject="ada", read=True, write=True)


class Place:
    """A front over databases in memory, whose pushes wait until they are let through."""

    def __init__(self, **settings: Any) -> None:
        self.config = ServerConfig(data_dir=None, insecure_no_auth=True, **settings)
        self.clock = clock = ManualClock()
        self.works: list[Callable[[], None]] = []
        self.stores = Stores(
            self.config,
            clock=clock,
            open_database=MemoryPlace(clock=clock).open,
            schedule=self.works.append,
        )
        self.front = Front(
            self.config, authenticator=everything, stores=self.stores, features=["packed"]
        )

    def use(self) -> Store:
        return self.front.use(handshake(), GRANT)

    def history(self) -> bytes:
        with self.front.using(handshake(), GRANT) as store:
            history = store.database.history
        assert history is not None
        return history


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.stores.close()


def test_every_server_asks_the_front(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def counted(name: str) -> None:
        real = getattr(Front, name)

        def call(*arguments: Any) -> Any:
            asked.append(name)
            return real(*arguments)

        monkeypatch.setattr(Front, name, call)

    for name in ("authenticate", "decode", "permit", "explain"):
        counted(name)
    expected = ["authenticate", "decode", "permit"] * 3 + ["authenticate", "decode", "explain"]
    with SyncServer.in_memory() as server:
        history = server.database("shop").history
        assert history is not None
        requests: list[SyncRequest] = [handshake(), push(history, 1), pull(history)]
        for request in requests:
            sent = {"content-type": CONTENT_TYPE}
            assert server.handle_http("POST", path_of(request), sent, encode(request)).status == 200
        assert server.handle_http("POST", "/v1/pull", sent, b"no message").status == 400
    assert asked == expected
    asked.clear()
    with SyncServer.in_memory() as server, serving(server) as url, Client(url) as client:
        history = client.history()
        asked.clear()
        for request in (handshake(), push(history, 1), pull(history)):
            assert client.send(request).status == 200
        assert client.post("/v1/pull", b"no message").status == 400
    assert asked == expected


def test_what_reads_is_answered_encoded(place: Place):
    with place.front.using(handshake(), GRANT) as store:
        raw = place.front.read(store, handshake(), GRANT)
        answer = decode_response(handshake(), raw)
        assert isinstance(answer, HandshakeResponse)
        assert "packed" in answer.features
        for _ in range(2):  # from the disk, and then from what is known of it
            request = pull(answer.history)
            page = decode_response(request, place.front.read(store, request, GRANT))
            assert isinstance(page, PullResponse) and page.head == 0


def test_pushes_that_are_scheduled_are_decided_together_and_give_the_database_back(place: Place):
    history = place.history()
    answers: list[SyncResponse | Exception] = []
    users: list[int] = []
    store = place.use()
    place.stores.release(store)
    commits = store.database.storage.mark()
    for number in (1, 2, 3):
        request = push(history, number)

        def done(answer: PushResponse | Exception) -> None:
            answers.append(answer)
            users.append(store.users)

        place.front.push(place.use(), request, GRANT, done)
    assert store.users == 3 and not answers
    (work,) = place.works
    work()
    assert [a.results[0].verdict for a in answers if isinstance(a, PushResponse)] == [
        Verdict.ACCEPTED
    ] * 3
    assert users == [2, 1, 0]
    assert store.database.storage.mark() == commits + 1
    work()
    assert len(answers) == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [(StorageFullError("no room"), "storage_full"), (StorageError("broken"), "storage_error")],
)
def test_a_scheduled_push_that_cannot_be_stored_says_so_and_a_database_with_room_is_opened_again(
    error: StorageError, code: str
):
    place = Place()
    history = place.history()
    answers: list[Any] = []
    store = place.use()
    storage: Any = store.database.storage

    def full(batch: object, after: int | None = None) -> None:
        raise error

    storage.commit = full
    place.front.push(store, push(history, 1), GRANT, answers.append)
    place.works.pop()()
    assert [getattr(answer, "code", None) for answer in answers] == [code]
    # Without room nothing was changed, and reading goes on in what is open.
    assert store.broken == (code != "storage_full") and store.users == 0
    place.stores.close()


def test_a_disk_that_is_full_is_a_line_of_the_log_and_no_traceback(
    caplog: pytest.LogCaptureFixture,
):
    place = Place()
    answer = place.front.explain(StorageFullError("opening shop: the disk is full"), "r-1")
    assert answer.code == "storage_full"
    (line,) = caplog.records
    assert line.getMessage() == "request r-1: opening shop: the disk is full"
    assert line.exc_info is None
    place.stores.close()


def test_what_the_system_refuses_is_a_line_of_the_log_and_no_traceback(
    caplog: pytest.LogCaptureFixture,
):
    place = Place()
    error = StorageError("opening shop: the file system is read-only; make it writable")
    error.__cause__ = OSError(errno.EROFS, os.strerror(errno.EROFS))
    answer = place.front.explain(error, "r-1")
    assert answer.code == "storage_error"
    (line,) = caplog.records
    assert line.getMessage() == f"request r-1: {error}"
    assert line.exc_info is None
    place.stores.close()


def test_for_a_moment_after_a_push_found_no_room_none_is_tried():
    place = Place()
    history = place.history()
    answers: list[Any] = []
    storage: Any = place.use().database.storage
    tried, commit = [0], storage.commit

    def full(batch: object, after: int | None = None) -> None:
        tried[0] += 1
        raise StorageFullError("no room")

    storage.commit = full
    place.front.push(place.use(), push(history, 1), GRANT, answers.append)
    place.works.pop()()
    for _ in range(5):
        with pytest.raises(ServerError) as refused:
            place.front.push(place.use(), push(history, 1), GRANT, answers.append)
        assert refused.value.code == "storage_full"
        assert (refused.value.retry_after or 0) >= 10
    assert tried == [1] and not place.works
    place.clock.advance(1.0)
    storage.commit = commit
    place.front.push(place.use(), push(history, 1), GRANT, answers.append)
    place.works.pop()()
    assert answers[-1].results[0].verdict == Verdict.ACCEPTED
    place.stores.close()


def test_closing_commits_what_was_scheduled(place: Place):
    history = place.history()
    answers: list[Any] = []
    place.front.push(place.use(), push(history, 1), GRANT, answers.append)
    place.stores.close()
    assert [answer.results[0].verdict for answer in answers] == [Verdict.ACCEPTED]
    (work,) = place.works
    work()
    assert len(answers) == 1


def test_a_push_that_finds_no_room_gives_the_database_back():
    place = Place(push_queue_max=1)
    history = place.history()
    answers: list[Any] = []
    store = place.use()
    place.front.push(store, push(history, 1), GRANT, answers.append)
    with pytest.raises(ServerBusyError):
        place.front.push(place.use(), push(history, 2), GRANT, answers.append)
    assert store.users == 1
    place.stores.close()
    assert len(answers) == 1 and store.users == 0


def test_permission_is_asked_before_anybody_looks_whether_the_database_exists(place: Place):
    write_only = Grants("ada", {"shop": Rights(read=False, write=True)})
    with pytest.raises(PermissionDeniedError):
        place.front.permit(pull(b"h" * 16), write_only)
    assert place.front.permit(push(b"h" * 16, 1), write_only).write
    with pytest.raises(PermissionDeniedError):
        place.front.permit(handshake("other"), write_only)
    assert place.stores.open_count == 0


def test_a_database_that_is_gone_is_a_changed_history_to_who_could_make_it_anew(place: Place):
    with pytest.raises(HistoryChangedError):
        place.front.use(pull(b"h" * 16), GRANT)
    reader = Grant(subject="ada", read=True, write=False)
    with pytest.raises(PermissionDeniedError) as caught:
        place.front.use(pull(b"h" * 16), reader)
    assert caught.value.code == "unknown_database"
    assert place.front.try_use(handshake()) is None
