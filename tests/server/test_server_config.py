"""Settings of the server, and which names become which directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb.errors import ConfigError, InvalidNameError
from entidb.server import ServerConfig
from entidb.server.config import check_db_id, db_id_of, directory_name

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)


def config(**settings: Any) -> ServerConfig:
    return ServerConfig(**{"data_dir": None, "insecure_no_auth": True, **settings})


def test_the_defaults_are_valid_and_every_transaction_of_a_device_fits():
    made = config()
    assert made.limits().transaction_bytes_max == 16 * 2**20
    assert made.limits().message_bytes_max > made.limits().transaction_bytes_max


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_dir", ""),
        ("audience", ""),
        ("leeway_s", -1),
        ("leeway_s", float("nan")),
        ("leeway_s", True),
        ("body_bytes_max", 16 * 2**20),
        ("body_bytes_max", 20.5 * 2**20),
        ("transaction_bytes_max", 1),
        ("in_flight_bytes_max", 21 * 2**20),
        ("push_operations_max", 0),
        ("pull_operations_max", "many"),
        ("pull_bytes_max", 0),
        ("collections_max", 0),
        ("push_queue_max", 0),
        ("connections_max", True),
        ("databases_open_max", 0),
        ("compression_min_bytes", -1),
        ("head_timeout_s", 0),
        ("body_timeout_s", float("inf")),
        ("write_timeout_s", None),
        ("shutdown_timeout_s", 0),
        ("tombstone_retention_days", -1),
        ("purge_interval_s", 0),
        ("idle_close_s", -1),
        ("create_databases", "yes"),
        ("compression", 1),
        ("access_log", None),
        ("metrics", 0),
        ("validate", "no colon"),
        ("validate", 7),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(name: str, value: object):
    with pytest.raises(ConfigError, match=name):
        config(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"insecure_no_auth": False},
        {"jwt_secret_file": "secret"},
        {"insecure_no_auth": False, "jwt_secret_file": "s", "jwt_public_key_file": "k"},
        {"insecure_no_auth": False, "authenticator": "not a function"},
    ],
)
def test_there_is_exactly_one_way_to_tell_who_may_do_what(settings: dict[str, Any]):
    with pytest.raises(ConfigError, match="authenticator"):
        config(**settings)


def hook(context: object, transaction: object) -> None:
    return None


def test_a_validate_hook_is_loaded_from_its_module():
    assert config(validate="textwrap:indent").load_validate() is not None
    assert config(validate=hook).load_validate() is hook
    assert config().load_validate() is None


@pytest.mark.parametrize(
    "name", ["no_such_module_at_all:f", "textwrap:no_such_function", "string:digits"]
)
def test_a_validate_hook_that_is_not_there_is_said_before_the_first_request(name: str):
    with pytest.raises(ConfigError, match="validate"):
        config(validate=name).load_validate()


@pytest.mark.parametrize(
    ("setting", "given", "more"),
    [
        ("validate", "textwrap:dedent", {}),
        ("validate", lambda transaction: None, {}),
        ("upcast", hook, {}),
        ("authenticator", hook, {"insecure_no_auth": False}),
    ],
)
def test_a_hook_that_cannot_be_called_as_it_will_be_is_refused(
    setting: str, given: Any, more: dict[str, Any]
):
    """A ``validate`` hook with another number of arguments would refuse every transaction, which
    its device then withdraws."""
    with pytest.raises(ConfigError, match=rf"{setting}.* is called with the "):
        config(**more, **{setting: given}).load_validate()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-x", "a/b", "a\\b", "../x", "a\0b", "ä", "a b", "x" * 101, "a\n"],
)
def test_a_name_that_could_lead_elsewhere_is_refused(name: str):
    with pytest.raises(InvalidNameError):
        check_db_id(name)
    with pytest.raises(InvalidNameError):
        directory_name(name)


@given(NAMES)
def test_a_directory_leads_back_to_its_database_and_stays_where_it_is(name: str):
    directory = directory_name(name)
    assert db_id_of(directory) == name
    assert Path("/data", directory).resolve().parent == Path("/data").resolve()
    assert len(directory) < 255


@given(NAMES, NAMES)
def test_two_databases_never_share_a_directory_even_if_case_is_ignored(one: str, other: str):
    same = directory_name(one).casefold() == directory_name(other).casefold()
    assert same == (one == other)


@pytest.mark.parametrize("name", ["con", "NUL", "com1", "aux.data", "LPT9"])
def test_a_name_that_windows_reserves_becomes_another_directory(name: str):
    stem = directory_name(name).partition(".")[0]
    assert stem.startswith("=")
    assert db_id_of(directory_name(name)) == name


@pytest.mark.parametrize(
    "name", ["shop", ".entidb", "Shop.entidb", "==shop.entidb", "a b.entidb", "con.entidb"]
)
def test_a_directory_that_no_database_has_is_not_taken_for_one(name: str):
    assert db_id_of(name) is None


def test_all_settings_are_given_by_keyword():
    made: Callable[..., Any] = ServerConfig
    with pytest.raises(TypeError):
        made("/data")
