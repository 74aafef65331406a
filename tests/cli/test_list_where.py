"""``list --where --order --after``: looking for entities on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from entidb.cli.exits import Exit
from entidb.cli.finding import SIGNS
from tests.cli.support import documents, done, entidb, failed, put

STOCK = [
    {"name": "Assam", "kind": "tea", "price": 4, "tags": ["new"], "at": {"city": "Bern"}},
    {"name": "Bancha", "kind": "tea", "price": 2.5, "tags": []},
    {"name": "Cup", "kind": "cup", "price": 9, "sold": True},
    {"name": "3", "kind": "tea", "price": "3"},
    {"name": "Ceylon", "kind": "tea", "price": 4, "at": {"city": "Basel"}},
    "no map",
]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    for number, value in enumerate(STOCK):
        put(tmp_path / "shop", "stock", number, value)
    return tmp_path / "shop"


def found(shop: Path, *options: object) -> list[str]:
    rows = documents(done("list", shop, "stock", "--json", *options))
    return [row["value"]["name"] for row in rows]


@pytest.mark.parametrize(
    ("condition", "names"),
    [
        ("kind=tea", ["Assam", "Bancha", "3", "Ceylon"]),
        ("kind==tea", ["Assam", "Bancha", "3", "Ceylon"]),
        ('kind="tea"', ["Assam", "Bancha", "3", "Ceylon"]),
        ("kind = tea", ["Assam", "Bancha", "3", "Ceylon"]),
        ("price=4", ["Assam", "Ceylon"]),
        ("price=4.0", ["Assam", "Ceylon"]),
        ('price="3"', ["3"]),
        ("price=3", []),
        ("name=3", []),
        ("price>2.5", ["Assam", "Cup", "Ceylon"]),
        ("price>=2.5", ["Assam", "Bancha", "Cup", "Ceylon"]),
        ("price<4", ["Bancha"]),
        ("price<=4", ["Assam", "Bancha", "Ceylon"]),
        ("sold=true", ["Cup"]),
        ("name^=C", ["Cup", "Ceylon"]),
        ("name^=3", ["3"]),
        ('name^="C"', ["Cup", "Ceylon"]),
        ('name="=>"', []),
        ("name*=an", ["Bancha"]),
        ("tags*=new", ["Assam"]),
        ("at.city=Bern", ["Assam"]),
        ('{"|": [{"kind": "cup"}, {"price": {"<": 3}}]}', ["Bancha", "Cup"]),
    ],
)
def test_a_condition_finds_what_meets_it(shop: Path, condition: str, names: list[str]):
    assert found(shop, "--where", condition) == names


def test_different_from_includes_what_has_no_such_field(shop: Path):
    rows = documents(done("list", shop, "stock", "--json", "--where", "kind!=tea"))
    assert [row["value"] for row in rows] == [STOCK[2], STOCK[5]]


def test_several_conditions_have_to_be_met_together(shop: Path):
    assert found(shop, "--where", "kind=tea", "--where", "price>3") == ["Assam", "Ceylon"]


def test_an_order_with_a_minus_has_the_largest_first(shop: Path):
    tea = ("--where", "kind=tea", "--where", "price>0")
    assert found(shop, *tea, "--order", "-price") == ["Ceylon", "Assam", "Bancha"]
    assert found(shop, *tea, "--order=-price,name") == ["Assam", "Ceylon", "Bancha"]
    assert found(shop, *tea, "--order", "-price", "--order", "name") == [
        "Assam",
        "Ceylon",
        "Bancha",
    ]


def test_pages_go_on_where_the_note_says(shop: Path):
    line = ("list", shop, "stock", "--where", "price>0", "--order", "-price", "--limit", 2)
    first = entidb(*line, "--json")
    assert [row["value"]["name"] for row in documents(first.stdout)] == ["Cup", "Ceylon"]
    after = first.stderr.split("--after ")[1].split()[0]
    last = entidb(*line, "--json", "--after", after)
    assert [row["value"]["name"] for row in documents(last.stdout)] == ["Assam", "Bancha"]
    assert "there are more" not in last.stderr
    assert len(documents(done(*line[:-1], 0, "--json"))) == 4


def test_people_read_lines(shop: Path):
    (line,) = done("list", shop, "stock", "--where", "kind=cup").splitlines()
    assert '"name":"Cup"' in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--where", "kind"), "FIELD"),
        (("--where", "=tea"), "FIELD"),
        (("--where", ""), "FIELD"),
        (("--where", '{"price": {"?": 3}}'), "compared by"),
        (("--where", "price=>3"), "=> is no sign"),
        (("--where", "price=<3"), "=< is no sign"),
        (("--where", "kind<>tea"), "<> is no sign"),
        (("--where", "kind===tea"), "=== is no sign"),
        (("--where", "name=~A"), "=~ is no sign"),
        (("--where", '{"price": {"exists": "no"}}'), "true or false"),
        (("--where", '{"price": {"in": 3}}'), "in takes a list"),
        (("--where", "\udcff=1"), "lone surrogate"),
        (("--order", ""), "--order takes fields"),
        (("--order", "-"), "--order takes fields"),
        (("--order", "name,,price"), "--order takes fields"),
        (("--where", "kind=tea", "--reverse"), "--order"),
        (("--order", "name", "--start", "00"), "--after"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_hint(
    shop: Path, options: tuple[str, ...], said: str
):
    assert said in failed(entidb("list", shop, "stock", *options), Exit.USAGE, "usage")


@pytest.mark.parametrize("condition", ['kind="tea', '{"kind": ', "tags=[1,"])
def test_json_that_breaks_off_is_no_text(shop: Path, condition: str):
    result = entidb("list", shop, "stock", "--where", condition)
    assert f"--where {condition!r}" in failed(result, Exit.VALUE, "invalid_json")


def test_going_on_behind_what_is_not_there_is_an_error(shop: Path):
    result = entidb("list", shop, "stock", "--order", "name", "--after", "ffff")
    failed(result, Exit.NOT_FOUND, "not_found")


def test_conditions_need_a_collection(shop: Path):
    result = entidb("list", shop, "--where", "kind=tea")
    assert "which collection" in failed(result, Exit.USAGE, "usage")


def test_the_manual_names_every_sign():
    text = (Path(__file__).parent.parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    section = text.partition("### `entidb list")[2].partition("\n### ")[0]
    assert all(f"`{sign}`" in section for sign in SIGNS)
