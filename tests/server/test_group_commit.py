"""What becomes of a group of pushes whose commit fails (R16, R17)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from entidb.errors import CommitStaleError, EntiDBError, ServerError, SyncError
from entidb.protocol import PushRequest, PushResponse, RoundRequest
from entidb.server.group_commit import GroupCommitter
from entidb.server.hooks import Grant

ANSWER = PushResponse(results=[], collections=[], head=7, time=0)
PUSH = PushRequest(
    db_id="d",
    device_id=bytes(16),
    history=bytes(16),
    cursor=0,
    collections=[],
    transactions=[],
)


class Overtaken:
    """Decides; but so many times another opener commits before it is stored."""

    db_id = "d"

    def __init__(self, times: int) -> None:
        self.times = times
        self.decided = 0

    def push_many(
        self, members: Sequence[tuple[PushRequest | RoundRequest, Grant]]
    ) -> list[PushResponse | SyncError]:
        self.decided += 1
        if self.decided <= self.times:
            raise CommitStaleError.of("there", 174, 175)
        return [ANSWER for _ in members]


def pushed(service: Overtaken) -> tuple[PushResponse | SyncError, list[EntiDBError]]:
    failures: list[EntiDBError] = []
    answers: list[PushResponse | SyncError] = []
    came = threading.Event()

    def done(answer: PushResponse | SyncError) -> None:
        answers.append(answer)
        came.set()

    committer = GroupCommitter(service, on_failure=failures.append)
    try:
        committer.submit(PUSH, Grant("a", read=True, write=True), done)
        assert came.wait(10)
    finally:
        committer.stop()
    return answers[0], failures


def test_a_group_that_was_overtaken_is_decided_again(caplog: pytest.LogCaptureFixture) -> None:
    """Another opener committed between deciding and storing, so the store refused it and changed
    nothing: the device is not told of an error, and the database stays open."""
    service = Overtaken(1)
    answer, failures = pushed(service)
    assert answer is ANSWER
    assert (service.decided, failures) == (2, [])
    assert "decided again" in caplog.text and "174" in caplog.text


def test_a_group_that_is_overtaken_for_ever_is_given_up() -> None:
    service = Overtaken(1000)
    answer, failures = pushed(service)
    assert isinstance(answer, ServerError) and answer.code == "storage_error"
    assert service.decided == 3
    assert [failure.code for failure in failures] == ["commit_stale"]
