"""``import`` and ``export``: nothing is lost on the way out and back, and bad rows are named."""

from __future__ import annotations

import csv
import json
import os
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.cli import transfer
from entidb.cli.exits import Exit
from entidb.cli.rows import Row, infer_cell
from entidb.cli.words import key_id
from entidb.db import Database
from entidb.db.observers import Observers
from entidb.db.writer import Writer
from entidb.errors import StorageFullError
from tests.cli.support import (
    document,
    documents,
    done,
    dumped,
    entidb,
    failed,
    process,
    put,
)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop"
    done("init", path)
    return path


def any_value(source: random.Random, depth: int = 0) -> Any:
    kinds: list[Any] = [
        None,
        source.random() < 0.5,
        source.randint(-(2**64), 2**64 - 1),
        source.random() * 10.0 ** source.randint(-300, 300),
        "".join(chr(source.choice((0, 10, 34, 0x1F600, 0x2028, 65, 0x9B))) for _ in range(4)),
        source.randbytes(source.randrange(5)),
    ]
    if depth < 3 and source.random() < 0.4:
        if source.random() < 0.5:
            return [any_value(source, depth + 1) for _ in range(source.randrange(4))]
        names = ("$bytes", "$$bytes", "$id", "$value", "a", "Größe", "")
        chosen = source.sample(names, source.randrange(4))
        return {name: any_value(source, depth + 1) for name in chosen}
    return source.choice(kinds)


def test_ten_thousand_values_of_every_kind_survive_the_round_trip(shop: Path, tmp_path: Path):
    source = random.Random(20)
    with Database.open(shop) as database, database.transaction() as tx:
        for _ in range(10_000):
            value = any_value(source)
            tx.collection("things").add("none" if value is None else value)
    file = tmp_path / "things.ndjson"
    assert process("export", shop, "things", "-o", file).returncode == 0
    assert process("init", tmp_path / "copy").returncode == 0
    imported = process("import", tmp_path / "copy", "things", file, "--json")
    assert document(imported.stdout.decode()) == {
        "collection": "things",
        "rows": 10_000,
        "new": 10_000,
        "replaced": 0,
        "unchanged": 0,
        "repeated": 0,
        "bad": 0,
        "transactions": 10,
    }
    before = dumped(shop, "things")
    assert len(before) == 10_000
    assert dumped(tmp_path / "copy", "things") == before


def test_export_goes_through_a_pipe_into_import(shop: Path, tmp_path: Path):
    put(shop, "notes", 1, {"a": [1]})
    done("init", tmp_path / "copy")
    rows = process("export", shop, "notes").stdout
    assert process("import", tmp_path / "copy", "notes", "-", stdin=rows).returncode == 0
    assert dumped(tmp_path / "copy", "notes") == dumped(shop, "notes")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_a_pipe_with_a_name_is_read_like_a_file(shop: Path, tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writing = threading.Thread(target=pipe.write_text, args=("k,v\n1,2\n",), daemon=True)
    writing.start()
    assert "1 new" in done("import", shop, "piped", pipe, "--format", "csv")
    writing.join()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("NaN", "NaN is not JSON, and no entity can hold it; "),
        ("9" * 5000, "is a number with more digits than an entity can hold: write it as text; "),
    ],
)
def test_a_number_that_cannot_be_is_refused_in_plain_words(shop: Path, value: str, says: str):
    said = failed(entidb("put", shop, "notes", value), Exit.VALUE, "invalid_json")
    assert says in said and "is NaN is" not in said and "limit" not in said


def test_plain_rows_get_new_ids(shop: Path):
    done("import", shop, "notes", "-", stdin='{"a":1}\n\n[2]\n"three"')
    values = [row["value"] for row in documents(done("list", shop, "notes", "--json"))]
    assert values == [{"a": 1}, [2], "three"]


def test_a_key_makes_the_same_id_every_time_and_nothing_is_written_twice(shop: Path):
    rows = "".join(json.dumps({"code": f"K{n}", "n": n}) + "\n" for n in range(2500))
    first = document(done("import", shop, "t", "-", "--key", "code", "--json", stdin=rows))
    again = document(done("import", shop, "t", "-", "--key", "code", "--json", stdin=rows))
    assert (first["new"], first["transactions"]) == (2500, 3)
    assert (again["unchanged"], again["transactions"]) == (2500, 0)
    assert json.loads(done("get", shop, "t", "key:K7")) == {"code": "K7", "n": 7}
    namespace = uuid.uuid5(uuid.NAMESPACE_DNS, "import.entidb")
    assert key_id("t", "K7") == uuid.uuid5(namespace, "t/K7")


def test_several_key_fields_make_one_key(shop: Path):
    done("import", shop, "t", "-", "--key", "day,hour", stdin='{"day":"mon","hour":7}')
    expected = key_id("t", json.dumps(["mon", "7"]))
    assert document(done("list", shop, "t", "--json"))["id"] == str(expected)


def test_a_row_whose_key_stands_twice_counts_as_replaced(shop: Path):
    rows = '{"k":"a","n":1}\n{"k":"a","n":2}\n'
    said = document(done("import", shop, "t", "-", "--key", "k", "--json", stdin=rows))
    assert (said["new"], said["replaced"]) == (1, 1)
    assert json.loads(done("get", shop, "t", "key:a"))["n"] == 2


def test_an_id_field_of_the_users_own_goes_out_and_in(shop: Path, tmp_path: Path):
    put(shop, "notes", 1, {"a": 1})
    rows = process("export", shop, "notes", "--id-field", "id").stdout
    assert set(json.loads(rows)) == {"id", "a"}
    done("init", tmp_path / "copy")
    done("import", tmp_path / "copy", "notes", "-", "--id-field", "id", stdin=rows)
    assert dumped(tmp_path / "copy", "notes") == dumped(shop, "notes")


def test_an_id_field_that_the_values_use_themselves_is_refused(shop: Path, tmp_path: Path):
    put(shop, "notes", 1, {"id": 1})
    out = tmp_path / "out"
    result = entidb("export", shop, "notes", "--id-field", "id", "-o", out)
    failed(result, 11, "invalid_input")
    assert [each.name for each in tmp_path.iterdir()] == ["shop"]
    result = entidb("export", shop, "notes", "--id-field", "id", "--format", "csv", "-o", out)
    failed(result, 2, "usage")


def test_csv_with_inference_survives_the_round_trip(shop: Path, tmp_path: Path):
    for number in range(1, 200):
        value = {"n": number, "f": number / 7, "t": f'a "{number}",\r\nb', "ok": number % 2 == 0}
        put(shop, "t", number, {**value, "deep": {"x": [number]}, "zip": f"0{number}"})
    file = tmp_path / "t.csv"
    done("export", shop, "t", "--output", file)
    done("init", tmp_path / "copy")
    done("import", tmp_path / "copy", "t", file, "--infer")
    assert dumped(tmp_path / "copy", "t") == dumped(shop, "t")


def test_cells_are_text_unless_types_are_named(shop: Path):
    rows = "\ufeffn,f,b,j,t\n1,1.5,true,[1],\n,,,,x\n"
    kinds = "n=int,f=float,b=bool,j=json"
    done("import", shop, "text", "-", "--format", "csv", stdin=rows)
    done("import", shop, "typed", "-", "--format", "csv", "--types", kinds, stdin=rows)
    texts = [row["value"] for row in documents(done("list", shop, "text", "--json"))]
    typed = [row["value"] for row in documents(done("list", shop, "typed", "--json"))]
    assert texts[0] == {"n": "1", "f": "1.5", "b": "true", "j": "[1]", "t": ""}
    assert typed == [{"n": 1, "f": 1.5, "b": True, "j": [1], "t": ""}, {"t": "x"}]


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("0", 0),
        ("-7", -7),
        ("007", "007"),
        ("+7", "+7"),
        ("-0", "-0"),
        ("-0.0", "-0.0"),
        ("0.0", 0.0),
        ("1e3", "1e3"),
        ("0E0", "0E0"),
        ("1E4", "1E4"),
        ("1.10", "1.10"),
        ("1.1", 1.1),
        ("1e+16", 1e16),
        ("2026-01-01", "2026-01-01"),
        ("1e999", "1e999"),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", "18446744073709551616"),
        ("99999999999999999999999", "99999999999999999999999"),
        ("nan", "nan"),
        ("1_000", "1_000"),
        ("true", True),
        ("True", "True"),
        ('{"a":1}', {"a": 1}),
        ('{"a": 1}', '{"a": 1}'),
        ('{"aa":1,"b":2}', '{"aa":1,"b":2}'),
        ("[1,2.50]", "[1,2.50]"),
        ("{a}", "{a}"),
        (" 1", " 1"),
    ],
)
def test_only_what_can_be_nothing_else_is_inferred(cell: str, value: object):
    found = infer_cell(cell)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("rows", "options", "part"),
    [
        ('{"a":1}\nnot json\n', (), "line 2"),
        ("[1,\n2]", (), "a JSON array"),
        (b"\xff\n", (), "line 1 is not UTF-8"),
        ("null", (), "null"),
        ('{"a":1e999}', (), "row 1: $.a"),
        ('{"$id":"nonsense"}', (), "no UUID"),
        ('{"a":1}', ("--id-field", "id"), "--id-field"),
        ('{"a":1}', ("--key", "k"), "--key"),
        ("a,b\n1\n", ("--format", "csv"), "row 1"),
        ("a,a\n", ("--format", "csv"), "twice"),
        ('a\n"x', ("--format", "csv"), "row 1"),
        (b"a\n\xff\n", ("--format", "csv"), "UTF-8"),
        ("a\nx\n", ("--format", "csv", "--types", "a=int"), "no int"),
        ("a\nnan\n", ("--format", "csv", "--types", "a=float"), "no float"),
    ],
)
def test_a_bad_row_is_named_and_nothing_of_its_batch_is_committed(
    shop: Path, rows: str | bytes, options: tuple[str, ...], part: str
):
    result = entidb("import", shop, "t", "-", *options, stdin=rows)
    assert result.exit_code == 11, result.output
    assert part in result.stderr and "nothing was committed" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert documents(done("list", shop, "--json")) == []


def test_an_import_that_leaves_out_all_rows_says_so(shop: Path):
    result = entidb("import", shop, "t", "-", "--skip", 10, stdin='{"n":1}\n{"n":2}\n')
    assert result.exit_code == 0
    assert "standard input has 2 rows, and --skip 10 leaves out all of them" in result.stderr
    assert not entidb("import", shop, "t", "-", "--skip", 1, stdin="{}\n{}\n").stderr


def test_an_import_goes_on_after_the_rows_it_has_committed(shop: Path):
    rows = "".join(f'{{"n":{n}}}\n' for n in range(25))
    bad = rows + "oops\n"
    line = failed(entidb("import", shop, "t", "-", "--batch", 10, stdin=bad), 11, "invalid_json")
    assert "20 rows before it are committed" in line and "--skip 20" in line
    done("import", shop, "t", "-", "--batch", 10, "--skip", 20, stdin=rows)
    found = documents(done("list", shop, "t", "--limit", 0, "--json"))
    assert [row["value"]["n"] for row in found] == list(range(25))


def test_options_that_contradict_each_other_are_usage_errors(shop: Path, tmp_path: Path):
    file = tmp_path / "x.ndjson"
    file.write_text("{}", encoding="utf-8")
    for options in (
        ("--key", "a", "--id-field", "b"),
        ("--infer",),
        ("--batch", "0"),
        ("--format", "csv", "--types", "a=date"),
        ("--format", "csv", "--delimiter", "::"),
        ("--format", "xml"),
    ):
        assert entidb("import", shop, "t", file, *options).exit_code == 2, options
    failed(entidb("import", shop, "t", tmp_path / "none"), 3, "no_file")


def test_csv_with_every_kind_of_line_end_in_its_cells_comes_back_as_it_was(
    shop: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ends.csv"
    texts = ["a\rb", "\r", "c\r\nd", "e\nf", 'g"\r"h', "plain"]
    rows = "".join(json.dumps({"$id": str(uuid.uuid4()), "x\ry": t}) + "\n" for t in texts)
    done("import", shop, "ends", "-", stdin=rows)
    done("export", shop, "ends", "--format", "csv", "--output", file)
    assert "6 unchanged" in done("import", shop, "ends", file)


def test_csv_columns_can_be_chosen(shop: Path):
    put(shop, "t", 1, {"a": 1, "b": None, "c": b"\x01"})
    said = process("export", shop, "t", "--format", "csv", "--fields", "c,a,zz").stdout.decode()
    header, row = said.splitlines()
    assert header == "$id,c,a,zz"
    assert row.endswith(',"{""$bytes"":""AQ==""}",1,')


def test_what_is_no_map_is_no_csv_row(shop: Path):
    put(shop, "t", 1, [1])
    assert "ndjson" in failed(entidb("export", shop, "t", "--format", "csv"), 11, "invalid_input")


# ---------------------------------------------------------------- keys and what replaces what


CODES = "code,name\n0E0,Moriarty\n0E8,Crownpoint\n007,Bond\n7,Seven\n+7,Plus\n"


@pytest.mark.parametrize("options", [(), ("--infer",), ("--types", "code=text"), ("--na", "x")])
def test_a_key_is_the_text_of_its_cell_whatever_the_cell_becomes(
    shop: Path, options: tuple[str, ...]
):
    words = ("import", shop, "t", "-", "--format", "csv", "--key", "code", "--json", *options)
    said = document(done(*words, stdin=CODES))
    assert (said["new"], said["replaced"], said["repeated"]) == (5, 0, 0)
    for code, name in (("0E0", "Moriarty"), ("0E8", "Crownpoint"), ("007", "Bond")):
        assert json.loads(done("get", shop, "t", f"key:{code}"))["name"] == name
    assert document(done(*words, stdin=CODES))["unchanged"] == 5


def test_a_key_of_a_typed_column_is_its_text_too(shop: Path):
    rows = "n\n07\n7\n"
    said = done("import", shop, "t", "-", "--format", "csv", "--types", "n=int", "--key", "n",
                "--json", stdin=rows)  # fmt: skip
    assert document(said)["new"] == 2


def test_whatever_is_inferred_is_exported_as_it_was_read(shop: Path, tmp_path: Path):
    words = "0E0 1E4 007 1.10 +5 1_000 nan True true 5 1.5 -0 1e5 0x10 [1] null 1e-7 1e-07 .5 5."
    cells = [*words.split(), " 5", "5 ", "2026-01-01", "[1, 2]"]
    rows = "n,cell\n" + "".join(f'{n},"{cell}"\n' for n, cell in enumerate(cells))
    done("import", shop, "t", "-", "--format", "csv", "--infer", "--key", "n", stdin=rows)
    out = tmp_path / "out.csv"
    done("export", shop, "t", "-o", out, "--fields", "n,cell")
    with out.open(encoding="utf-8", newline="") as file:
        found = {row["n"]: row["cell"] for row in csv.DictReader(file)}
    assert found == {str(n): cell for n, cell in enumerate(cells)}


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_rows_that_replace_each_other_within_a_file_are_counted_and_warned_of(
    shop: Path, batch: int
):
    rows = "k,n\na,1\nb,1\na,2\na,2\nb,3\n"
    words = ("import", shop, "t", "-", "--format", "csv", "--key", "k", "--batch", batch)
    for _ in range(2):
        result = entidb(*words, stdin=rows)
        assert result.exit_code == 0
        assert "row 3 has the id of an earlier row" in result.stderr
        assert "2 rows replaced an earlier row of the same file" in result.stderr
    result = entidb(*words, "--json", stdin="k,n\na,9\nc,1\n")
    assert (document(result.stdout)["replaced"], document(result.stdout)["repeated"]) == (1, 0)
    assert result.stderr == ""


# ---------------------------------------------------------------- what a file may look like


def csv_import(shop: Path, rows: str | bytes, *options: object) -> Any:
    return entidb("import", shop, "t", "-", "--format", "csv", *options, stdin=rows)


@pytest.mark.parametrize("option", ["--key", "--id-field"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(shop: Path, option: str):
    line = failed(csv_import(shop, "iata,name\n", option, "nosuch"), 2, "usage")
    assert f"{option} names 'nosuch'" in line and "iata, name" in line
    line = failed(entidb("import", shop, "t", "-", "--key", "k", stdin='{"a":1,"b":2}'), 11,
                  "invalid_input")  # fmt: skip
    assert "'k'" in line and "'a', 'b'" in line
    line = failed(csv_import(shop, "a,b\n,2\n", "--key", "a"), 11, "invalid_input")
    assert "row 1" in line and "'a'" in line and "empty" in line


@pytest.mark.parametrize(("between", "name"), [(";", ";"), ("\t", "tab"), ("|", "|")])
def test_a_file_with_another_delimiter_is_not_taken_for_one_column(
    shop: Path, between: str, name: str
):
    rows = f"a{between}b{between}c\n1{between}2{between}3\n"
    line = failed(csv_import(shop, rows), 2, "usage")
    assert f"--delimiter {name!r}" in line and "3" in line
    assert csv_import(shop, rows, "--delimiter", name, "--json").exit_code == 0
    assert document(done("list", shop, "t", "--json"))["value"] == {"a": "1", "b": "2", "c": "3"}
    assert csv_import(shop, rows, "--delimiter", ",").exit_code == 0


def test_a_tsv_file_has_tabs_between_its_cells(shop: Path, tmp_path: Path):
    file = tmp_path / "t.tsv"
    file.write_text("a\tb\n1\tx,y\n", encoding="utf-8")
    done("import", shop, "t", file)
    assert document(done("list", shop, "t", "--json"))["value"] == {"a": "1", "b": "x,y"}
    done("export", shop, "t", "-o", file)
    assert file.read_text(encoding="utf-8").splitlines()[0] == "$id\ta\tb"


def test_cells_that_say_there_is_nothing_leave_their_field_out(shop: Path):
    csv_import(shop, "a,b,c\nNA,1,-\n", "--na", "NA", "--na", "-", "--infer")
    assert document(done("list", shop, "t", "--json"))["value"] == {"b": 1}


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "latin-1"])
def test_files_in_other_encodings_are_read_when_told(shop: Path, encoding: str):
    rows = "name\nGröße\n".encode(encoding)
    assert "--encoding" in failed(csv_import(shop, rows), 11, "invalid_input")
    assert csv_import(shop, rows, "--encoding", encoding).exit_code == 0
    assert document(done("list", shop, "t", "--json"))["value"] == {"name": "Größe"}
    lines = '{"name":"Größe"}\n'.encode(encoding)
    done("import", shop, "n", "-", "--encoding", encoding, stdin=lines)
    assert document(done("list", shop, "n", "--json"))["value"] == {"name": "Größe"}


def test_an_encoding_nobody_knows_is_a_usage_error(shop: Path):
    assert "--encoding" in failed(csv_import(shop, "a\n", "--encoding", "klingon"), 2, "usage")
    rows = "name\nGröße\n".encode()
    assert "--encoding" in failed(
        csv_import(shop, rows, "--encoding", "ascii"), 11, "invalid_input"
    )


@pytest.mark.parametrize("batch", [1, 1000])
def test_bad_rows_can_be_left_out_and_are_counted_and_named(shop: Path, batch: int):
    rows = b'n,m\n1,1\n2\n3,x\n4,"a"b\n5,\xff\n6,6\n'
    words = ("--skip-bad", "--types", "m=int", "--batch", batch)
    result = csv_import(shop, rows, *words, "--json")
    assert result.exit_code == 0
    assert (document(result.stdout)["rows"], document(result.stdout)["bad"]) == (2, 4)
    for row in (2, 3, 4, 5):
        assert f"left out: row {row}: " in result.stderr
    found = documents(done("list", shop, "t", "--json"))
    assert [row["value"]["n"] for row in found] == ["1", "6"]
    lines = '{"a":1}\nnull\noops\n{"a":1e999}\n{"a":2}\n'
    said = document(done("import", shop, "n", "-", "--skip-bad", "--json", stdin=lines))
    assert (said["rows"], said["bad"]) == (2, 3)


def test_many_bad_rows_are_not_all_named(shop: Path):
    rows = "a,b\n" + "1\n" * 500
    result = csv_import(shop, rows, "--skip-bad")
    assert "500 left out" in result.stdout and len(result.stderr.splitlines()) == 11


def test_bad_rows_count_for_where_to_go_on(shop: Path):
    rows = "n\n" + "".join(f"{n}\n" for n in range(7)) + '"x"y\n8\n9\noops\n'
    result = csv_import(shop, rows, "--types", "n=int", "--batch", 2)
    assert "--skip 6" in failed(result, 11, "invalid_input")
    result = csv_import(shop, rows, "--types", "n=int", "--batch", 2, "--skip", 6, "--skip-bad")
    assert (result.exit_code, "2 left out" in result.stdout) == (0, True)
    found = documents(done("list", shop, "t", "--json"))
    assert [row["value"]["n"] for row in found] == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def test_put_and_import_make_the_database_and_say_so(tmp_path: Path):
    for number, words in enumerate((("put", "t", "1"), ("import", "t", "-"))):
        path = tmp_path / f"db{number}"
        result = entidb(words[0], path, *words[1:], stdin="{}")
        assert result.exit_code == 0 and f"made a database in {path}" in result.stderr
        result = entidb(words[0], path, *words[1:], stdin="{}")
        assert result.exit_code == 0 and "made" not in result.stderr
        assert len(documents(done("list", path, "t", "--json"))) == 2


def test_an_import_that_cannot_begin_makes_no_database(tmp_path: Path):
    path = tmp_path / "db"
    for words, stdin in (
        (("import", path, "t", tmp_path / "none"), ""),
        (("import", path, "t", "-", "--format", "csv", "--key", "x"), "a\n1\n"),
        (("import", path, "t", "-"), "oops"),
        (("import", path, "a\nb", "-"), "{}"),
        (("put", path, "t", "oops"), ""),
    ):
        assert entidb(*words, stdin=stdin).exit_code != 0
        assert not path.exists(), words


@pytest.mark.parametrize(
    ("interrupt", "code"),
    [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (StorageFullError("disk full"), 7)],
    ids=lambda value: type(value).__name__,
)
def test_an_interrupted_import_names_where_to_go_on(
    shop: Path, monkeypatch: pytest.MonkeyPatch, interrupt: BaseException, code: int
):
    def rows(*_: object) -> Iterator[Row]:
        yield from ((n, {"n": n}, None) for n in range(1, 26))
        raise interrupt

    monkeypatch.setattr(transfer, "_rows_of", rows)
    result = entidb("import", shop, "t", "-", "--batch", 10)
    assert result.exit_code == code and len(result.stderr.splitlines()) == 1
    assert "20 rows before it are committed: go on with --skip 20" in result.stderr
    assert len(dumped(shop, "t")) == 20


def test_an_interrupt_behind_a_commit_counts_what_was_committed(
    shop: Path, monkeypatch: pytest.MonkeyPatch
):
    store, before, newest = Database._store, Observers.deliver, [0]

    def note(database: Database, writer: Writer, origin: str) -> None:
        store(database, writer, origin)
        newest[0] = writer.head.sequence

    def deliver(observers: Observers) -> None:
        before(observers)
        if newest[0] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Database, "_store", note)
    monkeypatch.setattr(Observers, "deliver", deliver)
    result = entidb("import", shop, "t", "-", "--batch", 10, stdin='{"n":1}\n' * 30)
    assert result.exit_code == 130
    assert len(dumped(shop, "t")) == 20 and "--skip 20" in result.stderr


# ---------------------------------------------------------------- the order of columns


def header_of(path: Path, file: Path) -> list[str]:
    done("export", path, "t", "-o", file)
    return file.read_text(encoding="utf-8").splitlines()[0].split(",")


def test_columns_are_exported_in_the_order_they_were_imported_in(shop: Path, tmp_path: Path):
    out = tmp_path / "out.csv"
    csv_import(shop, "zeta,a,Mitte,bb\n,1,2,3\n1,2,3,4\n", "--infer", "--key", "a")
    assert header_of(shop, out) == ["$id", "zeta", "a", "Mitte", "bb"]
    csv_import(shop, "new,a,zeta\n1,9,3\n", "--key", "a")
    assert header_of(shop, out) == ["$id", "new", "a", "zeta", "Mitte", "bb"]
    put(shop, "t", 1, {"zz": 1, "y": 2})
    assert header_of(shop, out) == ["$id", "new", "a", "zeta", "Mitte", "bb", "y", "zz"]
    done("backup", shop, tmp_path / "copy")
    assert header_of(tmp_path / "copy", out)[1] == "new"
    assert done("verify", shop)


def test_the_order_of_json_rows_counts_too_and_columns_that_are_gone_do_not(
    shop: Path, tmp_path: Path
):
    done("import", shop, "t", "-", "--key", "k", stdin='{"z":1,"k":"a"}\n{"k":"b","y":1,"z":2}\n')
    assert header_of(shop, tmp_path / "out.csv") == ["$id", "z", "k", "y"]
    done("delete", shop, "t", "key:b")
    assert header_of(shop, tmp_path / "out.csv") == ["$id", "z", "k"]


def test_an_order_of_very_many_columns_is_not_kept(shop: Path, tmp_path: Path):
    names = [f"{n:05}" + "x" * 60 for n in range(2000, 0, -1)]
    assert csv_import(shop, ",".join(names) + "\n" + "1," * 1999 + "1\n").exit_code == 0
    assert header_of(shop, tmp_path / "out.csv") == ["$id", *sorted(names)]


# ---------------------------------------------------------------- files that are something else


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"PK\x03\x04\x14\0\n\n", ".xlsx"),
        (b"\x1f\x8b\x08\0\n", "gzip"),
        (b"PAR1\x15\x04\n", "Parquet"),
        ("a,b\n1,2\n".encode("utf-16"), "--encoding utf-16"),
        ("a,b\n1,2\n".encode("utf-16-le"), "--encoding utf-16-le"),
        ("a,b\n1,2\n".encode("utf-16-be"), "--encoding utf-16-be"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "ndjson"])
def test_a_file_that_is_no_text_in_utf8_is_called_what_it_is(
    shop: Path, start: bytes, said: str, kind: str
):
    result = entidb("import", shop, "t", "-", "--format", kind, stdin=start)
    assert said in failed(result, 11, "invalid_input")


@pytest.mark.parametrize("name", ["hex", "rot13", "base64", "zlib", "undefined", "a\0b"])
def test_an_encoding_that_is_none_of_text_is_a_usage_error(shop: Path, name: str):
    assert "--encoding" in failed(csv_import(shop, "a\n1\n", "--encoding", name), 2, "usage")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_mark_is_no_part_of_the_first_field_in_any_encoding(shop: Path, encoding: str):
    rows = "\ufeffname\nGröße\n".encode(encoding)
    assert csv_import(shop, rows, "--encoding", encoding).exit_code == 0
    assert document(done("list", shop, "t", "--json"))["value"] == {"name": "Größe"}
    lines = '\ufeff{"name":"Größe"}\n'.encode(encoding)
    done("import", shop, "n", "-", "--encoding", encoding, stdin=lines)
    assert document(done("list", shop, "n", "--json"))["value"] == {"name": "Größe"}


def test_a_json_array_of_maps_on_one_line_is_not_taken_for_one_entity(shop: Path):
    result = entidb("import", shop, "t", "-", stdin='[{"a":1},{"a":2}]\n')
    assert "one line for each element" in failed(result, 11, "invalid_input")
    done(
        "import",
        shop,
        "t",
        "-",
        stdin=f'{{"$id":"{uuid.UUID(int=1)}","$value":[{{"a":1}}]}}\n[1,2]\n',
    )
    found = [each["value"] for each in documents(done("list", shop, "t", "--json"))]
    assert sorted(found, key=str) == [[1, 2], [{"a": 1}]]


def test_a_map_over_several_lines_is_said_to_be_one(shop: Path):
    result = entidb("import", shop, "t", "-", stdin='{\n "a": 1\n}\n')
    assert "one line" in failed(result, 11, "invalid_json")


def test_a_key_that_na_says_is_nothing_makes_no_entity(shop: Path):
    rows = "code,n\nNA,1\nNA,2\nA,3\n"
    result = csv_import(shop, rows, "--key", "code", "--na", "NA")
    assert "--na" in failed(result, 11, "invalid_input")
    said = document(
        csv_import(shop, rows, "--key", "code", "--na", "NA", "--skip-bad", "--json").stdout
    )
    assert (said["new"], said["bad"], said["repeated"]) == (1, 2, 0)


@pytest.mark.parametrize("option", ["--key", "--id-field"])
def test_an_empty_option_is_not_the_same_as_none(shop: Path, option: str):
    assert option in failed(csv_import(shop, "a\n1\n", option, ""), 2, "usage")


@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_number_with_an_underscore_is_none(shop: Path, kind: str):
    result = csv_import(shop, "a\n1_0\n", "--types", f"a={kind}")
    assert "'1_0'" in failed(result, 11, "invalid_input")


def test_an_empty_path_is_refused_everywhere(shop: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    calls: tuple[tuple[object, ...], ...] = (
        ("init", ""),
        ("list", "--dir", ""),
        ("backup", shop, ""),
        ("import", shop, "t", ""),
        ("export", shop, "t", "-o", ""),
    )
    for words in calls:
        assert "empty" in failed(entidb(*words), 2, "usage")
    assert [each.name for each in tmp_path.iterdir()] == [shop.name]


def test_a_cell_that_is_never_closed_is_said_to_take_the_rest_of_the_file(shop: Path):
    rows = 'a,b\n"x,1\n2,3\n4,5\n'
    assert "rest of the file" in failed(csv_import(shop, rows), 11, "invalid_input")
    result = csv_import(shop, rows, "--skip-bad")
    assert result.exit_code == 0 and "rest of the file" in result.stderr
    assert "written twice" in failed(csv_import(shop, 'a\n"x"y\n'), 11, "invalid_input")


def test_a_misspelt_column_of_an_export_is_seen(tmp_path: Path):
    shop = tmp_path / "shop"
    done("put", shop, "stock", '{"name": "cup", "price": 3}')
    result = entidb("export", shop, "stock", "--format", "csv", "--fields", "$id,nmae,price,name")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "$id,nmae,price,name"
    assert "'nmae'" in result.stderr and "'name'" in result.stderr and "price" not in result.stderr
    far = entidb("export", shop, "stock", "--format", "csv", "--fields", "weight")
    assert "'weight'" in far.stderr and "name, price" in far.stderr
    right = entidb("export", shop, "stock", "--format", "csv", "--fields", "name")
    assert (right.exit_code, right.stderr) == (0, "")
    said = failed(entidb("export", shop, "stock", "--fields", "name"), 2, "usage")
    assert "--format csv" in said
    failed(entidb("export", shop, "stock", "--format", "csv", "--fields", "name,"), 2, "usage")
