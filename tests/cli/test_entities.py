"""``init``, ``put``, ``get``, ``delete``, ``list``, and what all commands understand alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entidb.cli.exits import Exit
from entidb.cli.words import key_id
from entidb.db import Database
from tests.cli.support import document, documents, done, entidb, failed, put


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop"
    done("init", path)
    return path


def test_init_makes_a_database_and_leaves_an_old_one_alone(tmp_path: Path):
    path = tmp_path / "new"
    first = document(done("init", path, "--json"))
    put(path, "notes", 1, "kept")
    second = document(done("init", path, "--json"))
    assert (first["created"], second["created"]) == (True, False)
    assert first["device_id"] == second["device_id"]
    assert document(done("list", path, "--json"))["entities"] == 1


def test_init_can_declare_a_collection_local(tmp_path: Path):
    done("init", tmp_path / "new", "--local", "drafts")
    found = document(done("list", tmp_path / "new", "--json"))
    assert found == {"collection": "drafts", "entities": 0, "synced": False}


def test_what_is_put_can_be_got_by_its_id_and_by_the_beginning_of_it(shop: Path):
    entity_id = done("put", shop, "notes", '{"title": "Größe 北京"}').strip()
    assert json.loads(done("get", shop, "notes", entity_id)) == {"title": "Größe 北京"}
    assert json.loads(done("get", shop, "notes", entity_id[:13])) == {"title": "Größe 北京"}
    assert document(done("get", shop, "notes", entity_id, "--json")) == {
        "collection": "notes",
        "id": entity_id,
        "value": {"title": "Größe 北京"},
    }


def test_put_under_an_id_replaces_the_entity(shop: Path):
    entity_id = put(shop, "notes", 7, "old")
    said = document(done("put", shop, "notes", entity_id, '"new"', "--json"))
    assert said == {"collection": "notes", "id": str(entity_id), "sequence": 2}
    assert json.loads(done("get", shop, "notes", entity_id)) == "new"


def test_a_value_comes_from_a_file_or_from_standard_input(shop: Path, tmp_path: Path):
    (tmp_path / "value.json").write_text('{"from": "file"}', encoding="utf-8")
    one = done("put", shop, "notes", f"@{tmp_path / 'value.json'}").strip()
    two = done("put", shop, "notes", "-", stdin='{"from": "stdin"}').strip()
    assert json.loads(done("get", shop, "notes", one)) == {"from": "file"}
    assert json.loads(done("get", shop, "notes", two)) == {"from": "stdin"}


@pytest.mark.parametrize(
    "text",
    [
        '{"$bytes":"AQI="}',
        '{"$$bytes":"AQI="}',
        '{"$$bytes":5}',
        '{"$$$bytes":null}',
        '{"$bytes":"AQI=","more":1}',
        '[{"a":{"$bytes":""}},18446744073709551615,-1.5,true,null,"\\u001b"]',
    ],
)
def test_every_value_comes_out_as_it_went_in(shop: Path, text: str):
    entity_id = done("put", shop, "notes", text).strip()
    assert json.loads(done("get", shop, "notes", entity_id)) == json.loads(text)


def test_dollar_bytes_is_a_byte_string_and_its_escape_is_a_map(shop: Path):
    one = done("put", shop, "notes", '{"$bytes": "AQI="}').strip()
    two = done("put", shop, "notes", '{"$$bytes": "AQI="}').strip()
    with Database.open(shop) as database:
        stored = {str(key): value for key, value in database.collection("notes").items()}
    assert stored == {one: b"\x01\x02", two: {"$bytes": "AQI="}}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("hello", "a text needs its own quotes"),
        ('{"a":1,"a":2}', "twice"),
        ('{"a":NaN}', "NaN"),
        ('{"a":1e999}', "$.a"),
        ('{"$bytes":"not base64!"}', "base64"),
        ("[" * 100_000, "nested too deep"),
        ("9" * 5000, "digits"),
        ("null", "None"),
    ],
)
def test_a_value_that_cannot_be_stored_is_one_line_and_stores_nothing(
    shop: Path, text: str, part: str
):
    result = entidb("put", shop, "notes", text)
    assert result.exit_code == 11, result.output
    assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert documents(done("list", shop, "--json")) == []


def test_delete_removes_the_entity_once(shop: Path):
    entity_id = put(shop, "notes", 7, "old")
    assert document(done("delete", shop, "notes", entity_id, "--json"))["sequence"] == 2
    failed(entidb("delete", shop, "notes", entity_id), 3, "not_found")


def test_an_ambiguous_id_is_refused_and_changes_nothing(shop: Path):
    with Database.open(shop) as database:
        ids = [database.collection("notes").add(number) for number in range(2)]
    line = failed(entidb("delete", shop, "notes", ids[0].hex[:4]), 2, "ambiguous_id")
    assert str(ids[0]) in line and str(ids[1]) in line
    assert document(done("list", shop, "--json"))["entities"] == 2


def test_the_last_possible_id_can_be_shortened_too(shop: Path):
    last = "f" * 8 + "-ffff-ffff-ffff-" + "f" * 12
    done("put", shop, "notes", last, "1")
    assert done("get", shop, "notes", "ff") == "1\n"
    assert documents(done("list", shop, "notes", "--start", "ff", "--reverse", "--json"))


def test_a_word_that_is_no_id_is_a_usage_error(shop: Path):
    put(shop, "notes", 1, 1)
    failed(entidb("get", shop, "notes", "zz"), 2, "invalid_id")


def test_an_entity_is_found_by_the_key_it_was_imported_with(shop: Path):
    done("put", shop, "airports", str(key_id("airports", "SEA")), '"Seattle"')
    assert done("get", shop, "airports", "key:SEA") == '"Seattle"\n'
    failed(entidb("get", shop, "airports", "key:ORD"), 3, "not_found")


def test_list_goes_on_where_it_says(shop: Path):
    ids = [str(put(shop, "notes", number, number)) for number in range(1, 6)]
    first = entidb("list", shop, "notes", "--limit", 2, "--json")
    assert [row["id"] for row in documents(first.stdout)] == ids[:2]
    assert f"--start {ids[2]}" in first.stderr
    rest = documents(done("list", shop, "notes", "--start", ids[2], "--limit", 0, "--json"))
    assert [row["id"] for row in rest] == ids[2:]


def test_list_goes_downwards_from_the_start_it_is_given(shop: Path):
    ids = [str(put(shop, "notes", number, number)) for number in range(1, 6)]
    rows = documents(done("list", shop, "notes", "--reverse", "--start", ids[2], "--json"))
    assert [row["id"] for row in rows] == ids[2::-1]


def test_list_starts_at_an_id_as_a_narrow_terminal_shows_it(shop: Path):
    ids = [str(put(shop, "notes", number, number)) for number in range(1, 6)]
    for more, expected in (((), ids[2:]), (("--reverse",), ids[2::-1])):
        for start in (f"…{ids[2][-12:]}", f"...{ids[2][-6:]}"):
            said = done("list", shop, "notes", "--start", start, *more, "--json")
            assert [row["id"] for row in documents(said)] == expected
    failed(entidb("list", shop, "notes", "--start", "…"), Exit.USAGE, "invalid_id")
    failed(entidb("list", shop, "notes", "--start", "…abc"), Exit.NOT_FOUND, "not_found")


def test_list_downwards_says_how_to_go_on_downwards(shop: Path):
    ids = [str(put(shop, "notes", number, number)) for number in range(1, 6)]
    first = entidb("list", shop, "notes", "--reverse", "--limit", 2, "--json")
    assert f"--start {ids[2]} --reverse" in first.stderr


def test_no_value_can_steer_the_terminal(shop: Path):
    put(shop, "notes", 1, {"t": "\x1b[31m\x9b31m\u202e\x07\x7f"})
    for shown in (done("list", shop, "notes"), done("get", shop, "notes", "0")):
        assert all(char.isprintable() or char == "\n" for char in shown)
    assert json.loads(done("get", shop, "notes", "0")) == {"t": "\x1b[31m\x9b31m\u202e\x07\x7f"}


def test_an_unknown_collection_says_which_there_are(shop: Path):
    put(shop, "notes", 1, 1)
    assert "notes" in failed(entidb("list", shop, "note"), 3, "no_collection")


# ---------------------------------------------------------------- which word is the database


def test_the_environment_names_the_database(shop: Path):
    env = str(shop)
    entity_id = done("put", "notes", '"a"', ENTIDB_DIR=env).strip()
    done("put", "notes", entity_id, '"b"', ENTIDB_DIR=env)
    assert done("get", "notes", entity_id, ENTIDB_DIR=env) == '"b"\n'
    assert document(done("list", "--json", ENTIDB_DIR=env))["entities"] == 1


def test_a_directory_on_the_command_line_wins_over_the_environment(shop: Path, tmp_path: Path):
    other = tmp_path / "other"
    done("init", other)
    done("put", other, "notes", '"a"', ENTIDB_DIR=str(shop))
    assert documents(done("list", shop, "--json", ENTIDB_DIR=str(other))) == []
    assert document(done("list", other, "--json", ENTIDB_DIR=str(shop)))["entities"] == 1
    assert document(done("status", "--dir", other, "--json"))["entities"] == 1


def test_without_any_directory_the_error_says_how_to_name_one():
    line = failed(entidb("status"), 2, "usage")
    assert "DIR" in line and "ENTIDB_DIR" in line


def test_reading_never_makes_a_database(tmp_path: Path):
    assert "entidb init" in failed(entidb("list", tmp_path / "no"), 3, "no_database")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_few_or_too_many_words_are_a_usage_error(shop: Path, count: int):
    assert entidb("put", *[shop] * count).exit_code == 2
