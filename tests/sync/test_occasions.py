"""When the next sync of a background engine is due."""

from __future__ import annotations

import pytest

from entidb.sync.config import RetryConfig
from entidb.sync.occasions import Occasions

NOW = 1000.0


def failed_once(*, patient: bool, retry_after: float | None = None) -> float:
    """Seconds until the next sync, of an engine that rests for an hour unless something asks, and
    failed at what the server had named."""
    occasions = Occasions(RetryConfig(), draw=lambda: 1.0)
    occasions.hear(7, first=False)
    occasions.begin()
    occasions.failed(NOW, passes=True, patient=patient, retry_after=retry_after)
    occasions.wait(NOW, 3600.0)
    left, commit = occasions.left_s(NOW, lambda: 6)
    assert not commit
    return left


def test_a_sync_that_tried_once_is_followed_as_a_first_attempt_is() -> None:
    assert failed_once(patient=False) == RetryConfig().delay_s(1, 1.0) == 0.5


def test_a_sync_that_tried_as_often_as_it_may_is_followed_later() -> None:
    retry = RetryConfig()
    assert failed_once(patient=True) == retry.delay_s(retry.attempts_max + 1, 1.0) > 10


@pytest.mark.parametrize("patient", [True, False])
def test_no_sync_follows_before_the_time_for_which_the_server_has_asked(patient: bool) -> None:
    assert failed_once(patient=patient, retry_after=40.0) == 40 + failed_once(patient=patient)


def test_tries_of_one_attempt_do_not_make_the_wait_longer() -> None:
    occasions = Occasions(RetryConfig(), draw=lambda: 1.0)
    for _ in range(20):
        occasions.commit()
        occasions.begin()
        occasions.failed(NOW, passes=True, patient=False)
    occasions.wait(NOW, 3600.0)
    assert occasions.left_s(NOW, lambda: 0) == (0.5, True)


@pytest.mark.parametrize("patient", [True, False])
def test_what_fails_at_once_is_no_loop_without_a_pause(patient: bool) -> None:
    for retry in (RetryConfig(delay_initial_s=0.0, delay_max_s=0.0), RetryConfig()):
        occasions = Occasions(retry, draw=lambda: 0.0)
        occasions.call()
        occasions.begin()
        occasions.failed(NOW, passes=True, patient=patient)
        occasions.wait(NOW, 3600.0)
        left, commit = occasions.left_s(NOW, lambda: 0)
        assert left == pytest.approx(0.05)
        assert not commit
