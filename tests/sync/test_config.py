"""Settings: every wrong one is refused where it is made, and every wait keeps its bounds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb.errors import ConfigError
from entidb.sync.config import HttpConfig, RetryConfig, SyncConfig
from entidb.sync.whole_policies import client_wins

MIB = 1024 * 1024


def test_the_defaults_are_the_documented_ones() -> None:
    config = SyncConfig(db_id="notes")
    assert config.collections is None
    assert (config.push_operations_max, config.push_bytes_max) == (5000, 4 * MIB)
    assert (config.pull_operations_max, config.pull_bytes_max) == (5000, 4 * MIB)
    assert (config.rounds_max, config.interval_s) == (5, 30)
    assert (config.default_policy, dict(config.policies)) == ("server_wins", {})
    assert (config.compression, config.compression_min_bytes) == ("auto", 1024)
    assert config.allow_insecure_token is False
    assert config.retry == RetryConfig(
        attempts_max=5, delay_initial_s=0.5, delay_max_s=60, multiplier=2.0, jitter=True
    )


def test_settings_cannot_be_changed_afterwards() -> None:
    config = SyncConfig(db_id="notes", policies={"notes": "client_wins"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.db_id = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.policies["notes"] = "server_wins"  # type: ignore[index]


def test_policies_are_copied_so_the_caller_cannot_change_them_later() -> None:
    mine = {"notes": "client_wins"}
    config = SyncConfig(db_id="notes", policies=mine)
    mine["notes"] = "server_wins"
    assert config.policies["notes"] == "client_wins"


def test_a_list_of_collections_becomes_a_tuple() -> None:
    assert SyncConfig(db_id="d", collections=["a", "b"]).collections == ("a", "b")  # type: ignore[arg-type]


def test_a_sync_config_is_an_http_config() -> None:
    assert isinstance(SyncConfig(db_id="d", read_timeout_s=3), HttpConfig)


SYNC_MISTAKES: list[tuple[str, Any]] = [
    ("db_id", ""),
    ("db_id", "x" * 256),
    ("db_id", "é" * 128),
    ("db_id", "a\nb"),
    ("db_id", "a\x7fb"),
    ("db_id", "\ud800"),
    ("db_id", None),
    ("db_id", b"notes"),
    ("client", "x" * 256),
    ("client", "a\r\nb"),
    ("client", None),
    ("collections", ()),
    ("collections", "notes"),
    ("collections", 7),
    ("collections", ("a", "a")),
    ("collections", ("a", "")),
    ("collections", ("a", 1)),
    ("push_operations_max", 0),
    ("push_operations_max", True),
    ("push_operations_max", 1.5),
    ("pull_operations_max", -1),
    ("push_bytes_max", 0),
    ("pull_bytes_max", 2**40),
    ("rounds_max", 0),
    ("rounds_max", "5"),
    ("interval_s", -1),
    ("interval_s", math.nan),
    ("interval_s", math.inf),
    ("connect_timeout_s", 0),
    ("read_timeout_s", None),
    ("total_timeout_s", -3.0),
    ("response_bytes_max", 0),
    ("compression", "brotli"),
    ("compression", None),
    ("compression_min_bytes", -1),
    ("allow_insecure_token", "yes"),
    ("default_policy", ""),
    ("default_policy", 3),
    ("default_policy", "newest_wins"),
    ("default_policy", None),
    ("policies", ["client_wins"]),
    ("policies", {"notes": None}),
    ("policies", {"": "server_wins"}),
    ("policies", {"notes": "newest_wins"}),
    ("retry", 5),
    ("retry", None),
]


@pytest.mark.parametrize(("name", "value"), SYNC_MISTAKES)
def test_a_wrong_setting_is_refused_by_name(name: str, value: Any) -> None:
    settings: dict[str, Any] = {"db_id": "notes", name: value}
    with pytest.raises(ConfigError) as caught:
        SyncConfig(**settings)
    assert name in caught.value.message


def test_a_policy_for_a_collection_that_is_not_synced_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'tasks', which collections leaves out"):
        SyncConfig(db_id="d", collections=("notes",), policies={"tasks": "manual"})


def test_a_function_that_does_not_take_a_conflict_is_no_policy() -> None:
    policy: Any = lambda mine, theirs: mine  # noqa: E731
    with pytest.raises(ConfigError, match=r"policies\['notes'\]: a policy is called with the"):
        SyncConfig(db_id="d", policies={"notes": policy})


def test_a_function_is_a_policy() -> None:
    config = SyncConfig(db_id="d", policies={"notes": client_wins})
    assert config.policies["notes"] is client_wins


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts_max", 0),
        ("attempts_max", 1.0),
        ("attempts_max", 10**9),
        ("delay_initial_s", -0.1),
        ("delay_initial_s", math.nan),
        ("delay_max_s", math.inf),
        ("delay_max_s", 0.1),
        ("multiplier", 0.5),
        ("multiplier", "2"),
        ("jitter", 1),
        ("retry_after_max_s", -1),
    ],
)
def test_a_wrong_retry_setting_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        RetryConfig(**{name: value})
    assert name in caught.value.message


def test_delays_double_up_to_the_cap_without_jitter() -> None:
    retry = RetryConfig(delay_initial_s=0.5, delay_max_s=3, jitter=False)
    assert [retry.delay_s(n, 0.3) for n in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_jitter_spreads_over_the_whole_delay() -> None:
    retry = RetryConfig(delay_initial_s=2)
    assert (retry.delay_s(1, 0.0), retry.delay_s(1, 0.25), retry.delay_s(1, 1.0)) == (0, 0.5, 2)


def test_the_ten_thousandth_attempt_still_has_a_delay() -> None:
    assert RetryConfig(jitter=False).delay_s(10_000, 0.0) == 60.0
    assert RetryConfig(delay_initial_s=0, jitter=False).delay_s(10_000, 0.0) == 0.0
    assert RetryConfig(delay_initial_s=0, multiplier=100, jitter=False).delay_s(155, 0.0) == 0.0


def test_a_server_cannot_silence_a_device_for_ever() -> None:
    assert RetryConfig(jitter=False).delay_s(1, 0.0, retry_after=1e12) == 3600.5
    assert RetryConfig(jitter=False).delay_s(1, 0.0, retry_after=math.inf) == 3600.5
    assert RetryConfig(jitter=False).delay_s(1, 0.0, retry_after=math.nan) == 0.5
    assert RetryConfig(jitter=False).delay_s(1, 0.0, retry_after=-4) == 0.5


def test_the_presets_say_what_they_do() -> None:
    assert RetryConfig.none().attempts_max == 1
    assert RetryConfig.aggressive().attempts_max > RetryConfig().attempts_max
    assert RetryConfig.aggressive().delay_max_s < RetryConfig().delay_max_s


retries = st.builds(
    RetryConfig,
    delay_initial_s=st.floats(0, 10),
    delay_max_s=st.floats(10, 1000),
    multiplier=st.floats(1, 100),
    jitter=st.booleans(),
)


@given(retries, st.integers(1, 2**63), st.floats(0, 1))
def test_every_delay_is_within_its_bounds(retry: RetryConfig, attempt: int, random: float) -> None:
    assert 0 <= retry.delay_s(attempt, random) <= retry.delay_max_s


@given(retries, st.integers(1, 50))
def test_the_longest_delay_never_shrinks(retry: RetryConfig, attempt: int) -> None:
    assert retry.delay_s(attempt, 1.0) <= retry.delay_s(attempt + 1, 1.0)


@given(retries, st.integers(1, 50), st.floats(0, 1), st.floats(0, 3600))
def test_no_delay_is_earlier_than_the_server_asked(
    retry: RetryConfig, attempt: int, random: float, retry_after: float
) -> None:
    assert retry.delay_s(attempt, random, retry_after=retry_after) >= retry_after


@given(retries, st.integers(1, 50), st.floats(0, 1))
def test_the_same_question_has_the_same_answer(
    retry: RetryConfig, attempt: int, random: float
) -> None:
    assert retry.delay_s(attempt, random) == retry.delay_s(attempt, random)
