"""What the documentation names exists: links, commands, settings, codes, names, rules, records.

Every page is read, also those added later. Code in the pages is compiled, its imports and keyword
arguments are looked up, and the self-contained pieces are run.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import pytest

import entidb
from entidb import errors, server, sync
from entidb.cli.app import cli
from entidb.db import Database, F, Index, pending, records
from tests.test_layers import ROWS

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "entidb"
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in _BLOCK.findall(text_of(page)) if language in languages]


def inline_code(page: Path) -> list[str]:
    found: list[str] = _CODE.findall(_BLOCK.sub("", text_of(page)))
    return found


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is neither code nor a row of a table."""
    within_code = False
    for number, line in enumerate(text_of(page).splitlines(), 1):
        if line.lstrip().startswith("```"):
            within_code = not within_code
        elif not within_code and not line.startswith("|"):
            yield number, line


def table_rows(text: str) -> Iterator[list[str]]:
    """Cells of every table row that is not a heading's underline."""
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


#: Columns of a line of prose, so that a page can be read in a terminal and compared line by line.
COLUMNS_MAX = 120


@BY_NAME
def test_a_line_of_prose_ends_at_120_columns(page: Path):
    too_long = [number for number, line in prose(page) if len(line) > COLUMNS_MAX]
    assert not too_long, f"{page.name}: lines {too_long} are longer than {COLUMNS_MAX} columns"


# ---------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The anchors that code hosts make of headings."""
    made = set()
    for heading in _HEADING.findall(_BLOCK.sub("", text_of(page))):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        made.add(kept.replace(" ", "-"))
    return made


@BY_NAME
def test_every_link_leads_somewhere(page: Path):
    for target in _LINK.findall(_BLOCK.sub("", text_of(page))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}"


def test_the_index_lists_every_page():
    listed = set(_LINK.findall(text_of(DOCS / "index.md")))
    assert listed == {path.name for path in DOCS.glob("*.md")} - {"index.md"}


# ---------------------------------------------------------------- commands


def shell_lines(page: Path) -> Iterator[list[str]]:
    """Words of every line of a shell block, and of every piece of code within a sentence."""
    pieces = blocks(page, "", "sh", "console", "bash")
    for line in [*[line for piece in pieces for line in piece.splitlines()], *inline_code(page)]:
        yield line.split("#")[0].removeprefix("$ ").split()


def options_of(command: click.Command) -> set[str]:
    parts = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    return {n for part in parts for p in part.params for n in (*p.opts, *p.secondary_opts)}


@BY_NAME
def test_every_command_and_option_exists(page: Path):
    for program, *words in filter(None, shell_lines(page)):
        # Placeholders, as in `entidb COMMAND --help`, name no command.
        if program != "entidb" or not words or not re.fullmatch(r"[a-z][a-z-]*", words[0]):
            continue
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None, f"{page.name} names `entidb {words[0]}`"
        known = options_of(command) | {"--help"}
        if "--" in words:  # what `doctor` hands on to `serve`
            serve = cli.get_command(click.Context(cli), "serve")
            assert words[0] == "doctor" and serve is not None
            known |= options_of(serve)
        used = {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}
        assert used <= known, f"{page.name} gives `entidb {words[0]}` {sorted(used - known)}"


@BY_NAME
def test_every_make_target_exists(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for words in shell_lines(page):
        if words[:1] == ["make"] and len(words) > 1:
            assert words[1] in targets, f"{page.name} names `make {words[1]}`"


# ---------------------------------------------------------------- names and settings


def vocabulary() -> set[str]:
    """Every identifier and word of a string in the project's code."""
    words: set[str] = set()
    for directory in ("src", "tests", "scripts", "examples", "benchmarks"):
        for path in (ROOT / directory).rglob("*.py"):
            if path != Path(__file__):
                words |= {path.stem, *_WORD.findall(text_of(path))}
    for name in ("Makefile", "pyproject.toml"):
        words |= set(_WORD.findall(text_of(ROOT / name)))
    return words


VOCABULARY = vocabulary()
#: Names that belong to other programs, or that a reader is to choose.
FOREIGN = {
    *("your_policy", "BigInt", "TextEncoder", "TextDecoder"),
    *("statement_timeout", "transaction_timeout"),  # settings of PostgreSQL
    "ReadWritePaths",  # a setting of systemd
}


@BY_NAME
def test_every_name_in_code_type_is_a_name_of_the_project(page: Path):
    for code in inline_code(page):
        for name in re.findall(r"\b(?:[a-z0-9]+_[a-z0-9_]+|[A-Z][a-z]+[A-Z]\w*)\b", code):
            assert name in VOCABULARY | FOREIGN, f"{page.name} names `{code}`"


def parsed(page: Path) -> Iterator[ast.Module]:
    for code in blocks(page, "python"):
        yield ast.parse(code)


@BY_NAME
def test_the_code_in_a_page_can_be_imported_and_called_as_it_says(page: Path):
    for tree in parsed(page):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("entidb"):
                home = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(home, alias.name), f"{page.name} imports {alias.name}"
            if isinstance(node, ast.Call):
                check_keywords(page, node)


CALLABLE: dict[str, Any] = {
    name: thing
    for module in (server, sync, entidb)
    for name in module.__all__
    if callable(thing := getattr(module, name))
}


def check_keywords(page: Path, call: ast.Call) -> None:
    name = call.func.id if isinstance(call.func, ast.Name) else None
    if name not in CALLABLE:
        return
    parameters = inspect.signature(CALLABLE[name]).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name for p in parameters}
    used = {keyword.arg for keyword in call.keywords if keyword.arg}
    assert used <= known, f"{page.name} calls {name} with {sorted(used - known)}"


def public_names() -> set[str]:
    is_error = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.EntiDBError)
    }
    return set(entidb.__all__) - is_error - {"__version__"}


def test_the_page_of_public_names_lists_each_of_them():
    rows = table_rows(text_of(DOCS / "api.md"))
    assert {row[0].strip("`") for row in rows if row[0].startswith("`")} == public_names()


def settings_shown(page: Path, heading: str) -> dict[str, str]:
    section = text_of(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {
        row[0].strip("`"): row[1].strip("`")
        for row in table_rows(section)
        if row[0].startswith("`")
    }


def defaults_of(kind: Any) -> dict[str, str]:
    """Own fields of a settings class, with their defaults as one would type them."""
    shown = {}
    for each in dataclasses.fields(kind):
        if each.name not in vars(kind)["__annotations__"]:
            continue
        if each.default is not dataclasses.MISSING:
            shown[each.name] = repr(each.default)
        elif each.default_factory is dataclasses.MISSING:
            shown[each.name] = "required"
        else:
            made = each.default_factory()
            shown[each.name] = "RetryConfig()" if made == sync.RetryConfig() else repr(made)
    return shown


@pytest.mark.parametrize(
    ("kind", "page", "heading"),
    [
        (sync.SyncConfig, "settings.md", "SyncConfig"),
        (sync.HttpConfig, "settings.md", "HttpConfig"),
        (sync.RetryConfig, "settings.md", "RetryConfig"),
        (server.ServerConfig, "server.md", "All settings"),
    ],
)
def test_every_setting_is_shown_with_its_default(kind: type[Any], page: str, heading: str):
    assert settings_shown(DOCS / page, heading) == defaults_of(kind)


def test_the_settings_of_a_database_are_those_of_its_constructor():
    taken = {*inspect.signature(Database.open).parameters, *inspect.signature(Database).parameters}
    assert set(settings_shown(DOCS / "settings.md", "Database")) <= taken


def test_the_changelog_begins_with_the_version_of_the_package():
    newest = re.search(r"^## (\S+)", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == entidb.__version__


# ---------------------------------------------------------------- errors


def codes_of_classes() -> set[str]:
    return {
        value.code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.EntiDBError)
    }


#: ``code="x"`` of a raise, ``code = "x"`` of a class, and what the command line fails with.
_CODE_GIVEN = re.compile(r"""(?:\bcode\s*=\s*|\bfail\()"([a-z_]+)\"""")


def codes_given_by_hand() -> set[str]:
    return {
        code
        for path in SOURCE.rglob("*.py")
        if "testing" not in path.parts
        for code in _CODE_GIVEN.findall(text_of(path))
    }


def test_every_error_code_is_documented_and_every_documented_code_exists():
    documented = {
        row[0].strip("`")
        for row in table_rows(text_of(DOCS / "errors.md"))
        if row[0].startswith("`")
    }
    given = codes_given_by_hand() | set(errors.REASONS.values())
    assert documented == codes_of_classes() | set(errors.ERROR_TABLE) | given


def test_the_table_of_wire_errors_is_the_one_in_the_code():
    rows = {
        row[0].strip("`"): (int(row[1]), row[2].strip("`"))
        for row in table_rows(text_of(DOCS / "errors.md"))
        if len(row) == 5 and row[1].isdigit()
    }
    assert rows == {
        code: (row.status, row.error.__name__) for code, row in errors.ERROR_TABLE.items()
    }


def test_the_class_beside_a_code_is_an_error_class():
    for row in table_rows(text_of(DOCS / "errors.md")):
        if row[0].startswith("`"):
            names = re.findall(r"`(\w+)`", row[2] if row[1].isdigit() else row[1])
            assert names
            assert all(issubclass(getattr(errors, n), errors.EntiDBError) for n in names), row


# ---------------------------------------------------------------- storage, layers, rules


def test_the_storage_table_is_the_one_in_the_code():
    assert records.__doc__ is not None
    table = records.__doc__.split("\n\n")[1]
    in_code = [
        (match[1], match[2], match[3] or "own layout")
        for line in table.splitlines()[1:]
        if (match := re.fullmatch(r" +(.*?)  +(.*?)(?: +\(([^()]+)\))?", line))
    ]
    assert len(in_code) == len(table.splitlines()) - 1
    in_docs = [
        (row[0].strip("`"), row[1], row[2])
        for row in table_rows(text_of(DOCS / "storage-format.md"))
        if re.match(r"`[a-z0] ", row[0])
    ]
    assert in_docs == in_code


def test_the_layouts_in_the_storage_page_have_the_sizes_in_the_code():
    widths = {}
    for row in table_rows(text_of(DOCS / "storage-format.md")):
        numbers = [int(n) for n in re.findall(r"\((\d+)[,)]", row[1].split("then each")[0])]
        if numbers:
            widths[row[0]] = sum(numbers)
    assert widths == {
        "format": len(records.encode_format()),
        "Head": len(records.Head().encode()),
        "EntityRow, clean": records.ENTITY_HEAD,
        "EntityRow, dirty": records.PENDING_HEAD,
        "BaseRow": len(records.BaseRow(0, bytes(16), 0, b"").encode()),
        "OutboxRow": len(pending.PendingTransaction(0, bytes(16), 0, []).encode()),
        "AcceptedRow": len(records.pack_accepted(0, bytes(32))),
    }


@pytest.mark.parametrize("page", [DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"])
def test_the_layers_in_a_page_are_those_the_code_is_held_to(page: Path):
    shown = {
        package: int(row[0])
        for row in table_rows(text_of(page))
        if row[0].isdigit()
        for package in re.findall(r"`(\w+)`", row[1])
    }
    assert shown == ROWS


def rooms_named() -> set[str]:
    """The modules in the tables of the architecture page; a folder ends with a slash."""
    return {
        name
        for row in table_rows(text_of(DOCS / "architecture.md"))
        if len(row) == 2
        for name in re.findall(r"`([a-z]+(?:/[a-z_]+)*/?)`", row[0])
    }


def test_every_module_of_the_architecture_page_exists():
    assert len(rooms_named()) > 20
    for name in rooms_named():
        assert (SOURCE / name).is_dir() if name.endswith("/") else (SOURCE / f"{name}.py").exists()


def test_every_module_has_a_row_in_the_architecture_page():
    named = rooms_named()
    folders = ("cli/", "testing/", *(name for name in named if name.endswith("/")))
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).with_suffix("").as_posix()
        if not path.stem.startswith("__") and not name.startswith(folders):
            assert name in named, f"{name} needs a row in docs/architecture.md"


def rules_stated() -> list[int]:
    return [int(n) for n in re.findall(r"^\*\*R(\d+)\*\* ", text_of(DOCS / "rules.md"), re.M)]


def test_every_rule_is_stated_once_and_in_order():
    assert rules_stated() == list(range(1, 37))


def test_every_rule_that_is_cited_is_stated():
    cited: dict[int, str] = {}
    paths = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *PAGES]
    for path in paths:
        for number in re.findall(r"\bR(\d{1,2})\b", text_of(path)):
            cited.setdefault(int(number), path.name)
    assert set(cited) <= set(rules_stated()), cited


# ---------------------------------------------------------------- code that runs


def run_block(code: str, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_the_code_of_the_readme_does_what_its_comments_say(tmp_path: Path):
    pieces = blocks(ROOT / "README.md", "python")
    assert len(pieces) == 2
    for number, code in enumerate(pieces):
        directory = tmp_path / str(number)
        directory.mkdir()
        promised = re.search(r"print\(.*\)  # (.*)", code)
        assert promised is not None
        assert ast.literal_eval(run_block(code, directory)) == ast.literal_eval(promised[1])


@pytest.mark.process
def test_getting_started_runs_from_top_to_bottom(tmp_path: Path):
    outputs = [
        run_block(code, tmp_path)
        for code in blocks(DOCS / "getting-started.md", "python")
        if code.startswith("from entidb")
    ]
    assert "call Grandma" in outputs[0]
    assert outputs[1].startswith("http://127.0.0.1:")
    assert outputs[2] == "pushed 2, pulled 0\n"


@pytest.mark.process
def test_the_code_of_the_page_on_the_engine_runs(tmp_path: Path):
    made = (
        "from types import SimpleNamespace\n"
        "from entidb.server import ServerConfig, serving\n"
        "session = SimpleNamespace(token='first')\n"
        "sign_in_again = lambda: 'second'\n"
        "running = serving(ServerConfig(data_dir=None, insecure_no_auth=True))\n"
        "url = running.__enter__()\n"
    )
    # The listeners print from a thread of their own: what is said is looked at, not the lines.
    ended = (
        "running.__exit__(None, None, None)\n"
        "assert (result.pulled, fate.state, fate.version) == (0, 'accepted', 1)\n"
        "assert not standing.sequences, standing\n"
    )
    code = "\n".join(blocks(DOCS / "engine.md", "python"))
    patient = code.replace("timeout_s=5", "timeout_s=None")  # however slow this machine is
    said = run_block(made + patient + ended, tmp_path)
    assert "is as the server had it in commit 1." in said


@pytest.mark.process
def test_the_code_of_the_concepts_page_runs(tmp_path: Path):
    opened = "from entidb import Database\ndb = Database.open('db')\n"
    run_block(opened + "\n".join(blocks(DOCS / "concepts.md", "python")), tmp_path)


@pytest.mark.process
def test_the_code_of_the_page_on_finding_runs(tmp_path: Path):
    code = "\n".join(blocks(DOCS / "finding.md", "python"))
    made = (
        "db = Database.open('db')\n"
        "db.collection('stock').put_many((UUID(int=n), {'kind': 'tea' if n % 3 else 'cup',\n"
        "    'price': n / 10, 'name': f'n{n}', 'sku': f'A-{n}', 'stock': n % 5})\n"
        "    for n in range(200))"
    )
    opened = f"from uuid import UUID\nfrom entidb import Database, F\n{made}\n"
    run_block(opened + code, tmp_path)


def test_what_the_page_on_finding_shows_of_a_plan_is_what_is_printed(tmp_path: Path):
    shown = text_of(DOCS / "finding.md").split("```pycon\n")[1:]
    plans = [block.split("```")[0].strip().split("\n") for block in shown]
    assert len(plans) == 2
    prices = [("tea", 3), ("tea", 4.5), ("tea", None), ("cup", 9), ("cup", 1)]
    with Database.open(tmp_path / "db") as db:
        stock = db.collection("stock")
        stock.put_many([(UUID(int=n), {"kind": k, "price": p}) for n, (k, p) in enumerate(prices)])
        for asked, said in plans:
            declared = [Index("kind", "price")] if said.startswith("index") else []
            stock = db.collection("stock", indexes=declared)
            db.wait_for_indexes()
            query = asked.removeprefix(">>> print(").removesuffix(")")
            assert str(eval(query, {"stock": stock, "F": F})) == said


def test_the_readme_names_the_two_commands():
    commands = {tuple(words[:2]) for words in shell_lines(ROOT / "README.md")}
    assert {("make", "demo"), ("make", "test")} <= commands
