"""``import`` and ``export``: nothing is lost on the way out and back, and bad rows are named."""

from __future__ import annotations

import json
import random
import uuid
from pathlib import Path
from typing import Any

import pytest

from entidb.cli.rows import infer_cell
from entidb.cli.words import key_id
from entidb.db import Database
from tests.cli.support import document, documents, done, dumped, entidb, failed, process, put


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
        ("1e3", 1000.0),
        ("1e999", "1e999"),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", "18446744073709551616"),
        ("99999999999999999999999", "99999999999999999999999"),
        ("nan", "nan"),
        ("1_000", "1_000"),
        ("true", True),
        ("True", "True"),
        ('{"a":1}', {"a": 1}),
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


def test_csv_columns_can_be_chosen(shop: Path):
    put(shop, "t", 1, {"a": 1, "b": None, "c": b"\x01"})
    said = process("export", shop, "t", "--format", "csv", "--fields", "c,a,zz").stdout.decode()
    header, row = said.splitlines()
    assert header == "$id,c,a,zz"
    assert row.endswith(',"{""$bytes"":""AQ==""}",1,')


def test_what_is_no_map_is_no_csv_row(shop: Path):
    put(shop, "t", 1, [1])
    assert "ndjson" in failed(entidb("export", shop, "t", "--format", "csv"), 11, "invalid_input")
