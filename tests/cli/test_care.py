"""``verify``, ``inspect``, ``compact``, ``backup``, ``status``: what an operator gets to read."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from entidb.cli.exits import Exit
from entidb.cli.output import size_text, time_text
from entidb.db import Database, Role
from entidb.version import VERSION
from tests.cli.support import document, documents, done, dumped, entidb, failed, put


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop"
    for number in range(3):
        put(path, "notes", number, {"n": number})
    return path


def test_verify_says_that_all_is_well(shop: Path):
    assert done("verify", shop) == f"{shop} has no faults: every record was checked\n"
    assert document(done("verify", shop, "--json")) == {
        "path": str(shop),
        "ok": True,
        "faults": [],
    }


def test_verify_lists_each_fault_and_then_what_to_do(shop: Path):
    data = shop / "data.mdb"
    raw = bytearray(data.read_bytes())
    # Every copy of one record's value, so that the live one is among them.
    wanted, at = b"\xa1an\x02", -1
    while (at := raw.find(wanted, at + 1)) >= 0:
        raw[at + 3] ^= 1
    data.write_bytes(raw)
    result = entidb("verify", shop)
    faults = result.stdout.splitlines()
    assert faults and all("checksum" in fault for fault in faults)
    assert "restore a backup" in failed(result, Exit.FAULTS, "faults")
    result = entidb("verify", shop, "--json")
    assert (result.exit_code, document(result.stdout)["faults"]) == (Exit.FAULTS, faults)


def test_inspect_shows_sizes_counters_and_identity(shop: Path):
    done("init", shop, "--local", "drafts")
    put(shop, "drafts", 1, "mine alone")
    found = document(done("inspect", shop, "--json"))
    assert (found["role"], found["sequence"], found["pending"]) == ("device", 4, 3)
    drafts = found["collections"]["drafts"]
    assert (drafts["entities"], drafts["synced"]) == (1, False)
    said = done("inspect", shop)
    assert "3 entities" in said and "1 entity, local" in said
    assert found["device_id"] in said
    lines = dict(line.split(None, 1) for line in said.splitlines())
    assert lines["pending"] == "3" and lines["history"] == "-"
    assert time_text(found["created_ms"]) in said


def test_compact_gives_room_back_and_says_how_much(shop: Path):
    with Database.open(shop) as database:
        notes = database.collection("big", local=True)
        ids = [notes.add("x" * 1000) for _ in range(2000)]
        for each in ids:
            del notes[each]
    before = (shop / "data.mdb").stat().st_size
    found = document(done("compact", shop, "--json"))
    assert found["before_bytes"] == before
    assert found["after_bytes"] == (shop / "data.mdb").stat().st_size < before
    assert done("compact", shop).endswith(" now\n")
    assert len(dumped(shop, "notes")) == 3


def test_a_backup_is_a_database_that_can_be_opened(shop: Path, tmp_path: Path):
    said = done("backup", shop, tmp_path / "copy")
    assert said.startswith(f"backed up {shop} to {tmp_path / 'copy'} (")
    assert dumped(tmp_path / "copy", "notes") == dumped(shop, "notes")
    found = document(done("backup", shop, tmp_path / "again", "--json"))
    assert found["bytes"] == sum(f.stat().st_size for f in (tmp_path / "again").iterdir())


def test_a_backup_never_writes_over_anything(shop: Path, tmp_path: Path):
    (tmp_path / "there").mkdir()
    failed(entidb("backup", shop, tmp_path / "there"), Exit.USAGE, "exists")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_backup_of_a_server_begins_another_history(tmp_path: Path):
    with Database.open(tmp_path / "server", role=Role.SERVER) as database:
        database.collection("notes").add(1)
        history = database.history
        assert history is not None
    done("backup", tmp_path / "server", tmp_path / "copy")
    assert document(done("inspect", tmp_path / "server", "--json"))["history"] == history.hex()
    with Database.open(tmp_path / "copy") as copy:
        assert copy.history not in (None, history)


def test_version_names_what_a_report_of_a_problem_needs(monkeypatch: pytest.MonkeyPatch):
    found = document(done("version", "--json"))
    assert found["entidb"] == VERSION
    assert found["packages"]["lmdb"] == importlib.metadata.version("lmdb")
    there = importlib.metadata.version

    def without(name: str) -> str:
        if name == "uvicorn":
            raise importlib.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    lines = dict(line.split(None, 1) for line in done("version").splitlines())
    assert (lines["entidb"], lines["uvicorn"]) == (VERSION, "not installed")
    assert document(done("version", "--json"))["packages"]["uvicorn"] is None
    assert done("--version") == f"entidb {VERSION}\n"


def test_status_says_in_words_what_waits(shop: Path):
    said = done("status", shop)
    assert "never synchronised: `entidb sync` does" in said
    assert "3 transactions: see `entidb pending`" in said
    assert "all that is not local" in said
    assert done("pending", shop).count("written in notes") == 3


def test_lists_with_nothing_in_them_say_so_beside_the_output(tmp_path: Path):
    done("init", tmp_path / "a")
    for words, says in {
        ("pending",): "nothing is pending",
        ("conflicts",): "no conflicts are open",
        ("discarded",): "nothing was withdrawn",
        ("list",): "no collections yet",
    }.items():
        result = entidb(words[0], tmp_path / "a")
        assert (result.exit_code, result.stdout) == (0, "")
        assert says in result.stderr


def test_collections_are_listed_with_what_they_hold_and_whether_they_travel(shop: Path):
    done("init", shop, "--local", "drafts")
    put(shop, "drafts", 1, "mine alone")
    rows = [line.split() for line in done("list", shop).splitlines()]
    assert rows[0] == ["collection", "holds", "synchronised"]
    assert sorted(rows[1:]) == [["drafts", "1", "entity", "no,", "local"],
                                ["notes", "3", "entities", "yes"]]  # fmt: skip
    assert {each["collection"] for each in documents(done("list", shop, "--json"))} == {
        "drafts",
        "notes",
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_sizes_are_written_for_people(count: int, text: str):
    assert size_text(count) == text


def test_a_time_beyond_the_calendar_is_still_shown():
    assert time_text(2**48) == f"{2**48} ms after 1970"


@pytest.mark.parametrize("words", [(), ("list",), ("list", "{shop}", "notes", "more")])
def test_a_line_that_lacks_words_or_has_too_many_is_a_usage_error(
    words: tuple[str, ...], shop: Path
):
    result = entidb(*[word.format(shop=shop) for word in words])
    assert result.exit_code == Exit.USAGE


def test_a_command_that_does_not_exist_is_a_usage_error():
    assert "frobnicate" in failed(entidb("frobnicate"), Exit.USAGE, "usage")


def test_an_unknown_option_names_the_help_of_its_command(shop: Path):
    assert "`entidb list --help`" in failed(entidb("list", shop, "--no"), Exit.USAGE, "usage")
