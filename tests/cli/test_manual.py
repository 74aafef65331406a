"""``docs/cli.md`` and the commands say the same, in both directions."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import click
import pytest

from entidb import errors
from entidb.cli import exits
from entidb.cli.app import COMMANDS, HEADINGS, SUMMARIES, cli
from entidb.cli.exits import Exit, exit_of
from entidb.db import Database, Role
from tests.cli.support import ROOT, TIMEOUT_S, document, done, environment, put

MANUAL = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^### `entidb (\w+)[^`]*`\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
SECTIONS = {found[1]: found[0] for found in SECTION.finditer(MANUAL)}
#: Flags that are explained once for all commands.
SHARED = {"--help", "-h", "--json", "--dir"}


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def flags(name: str) -> set[str]:
    found = command(name)
    parts = [found, *(found.commands.values() if isinstance(found, click.Group) else ())]
    options = [each for part in parts for each in part.params if isinstance(each, click.Option)]
    return {flag for each in options for flag in (*each.opts, *each.secondary_opts)} - SHARED


def test_every_command_is_in_the_manual_and_the_manual_names_no_other():
    assert list(SECTIONS) == list(COMMANDS)


def test_help_has_the_headings_of_the_manual_with_the_same_commands_below():
    of_manual: dict[str, str] = {}
    heading = ""
    for found in re.finditer(r"^## (.*)|^### `entidb (\w+)", MANUAL, re.MULTILINE):
        heading = found[1] or heading
        if found[2]:
            of_manual[found[2]] = heading
    assert {name: of_manual[name] for name in HEADINGS} == HEADINGS
    of_help: dict[str, str] = {}
    for found in re.finditer(r"^(\w.*):$|^  ([a-z]\w*)  +\w", done("--help"), re.MULTILINE):
        heading = found[1] or heading
        if found[2]:
            of_help[found[2]] = heading
    assert of_help == of_manual


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_manual_and_the_manual_names_no_other(name: str):
    text = re.sub(r"^```.*?^```", "", SECTIONS[name], flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text)) - SHARED - {"--version"}
    assert flags(name) <= named
    known = flags(name) | {flag for other in ("import", "serve") for flag in flags(other)}
    assert named <= known if name in ("export", "serve") else named <= flags(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str):
    assert done(name, "--help").startswith(f"Usage: entidb {name}")
    found = command(name)
    assert found.help and not found.help.startswith("(not available")
    for parameter in found.params:
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


def test_the_list_of_commands_says_what_each_says_of_itself_and_loads_none():
    assert {name: command(name).get_short_help_str(200) for name in COMMANDS} == SUMMARIES
    code = (
        "import sys; sys.argv = ['entidb', '--help']; from entidb.cli import main; main();"
        "print(*(name for name in sys.modules if name.partition('.')[0] in "
        "('entidb', 'msgspec', 'httpx2', 'lmdb', 'rich', 'uvicorn', 'jwt')), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT_S,
        check=True,
    )
    assert all(f"  {name} " in ended.stdout for name in COMMANDS)
    assert set(ended.stderr.split()) <= {
        "entidb",
        "entidb.version",
        "entidb.errors",
        "entidb.lazy",
        *(f"entidb.cli{part}" for part in ("", ".app", ".exits", ".output")),
    }


def test_the_list_of_commands_cuts_no_sentence_off():
    listed = [line for line in done("--help").splitlines() if "..." in line]
    assert [line.split()[0] for line in listed if not line.startswith("Usage")] in ([], ["demo"])


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("demo", "serve")])
def test_every_command_that_prints_can_print_json(name: str):
    found = command(name)
    for part in found.commands.values() if isinstance(found, click.Group) else (found,):
        assert "--json" in [flag for each in part.params for flag in each.opts], part.name
    assert "`--json`" in SECTIONS[name]


def test_the_exit_codes_are_those_of_the_table():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", MANUAL, re.MULTILINE)
    assert rows == [(str(int(code)), code.name) for code in Exit]


def all_errors(kind: type[errors.EntiDBError]) -> list[type[errors.EntiDBError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in all_errors(below))]


@pytest.mark.parametrize(
    "kind", [kind for kind in all_errors(errors.EntiDBError) if kind.__module__ == errors.__name__]
)
def test_every_error_has_an_exit_code_and_never_that_of_success(kind: type[errors.EntiDBError]):
    assert exit_of(kind("x")) not in (Exit.OK, Exit.FAULTS, Exit.INTERRUPTED, Exit.BROKEN_PIPE)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TransportError("x"), Exit.NETWORK),
        (errors.SyncTimeoutError("x"), Exit.NETWORK),
        (errors.ServerBusyError("x"), Exit.NETWORK),
        (errors.PermissionDeniedError("x"), Exit.AUTHENTICATION),
        (errors.StorageFullError("x"), Exit.STORAGE),
        (errors.CorruptionError("x"), Exit.STORAGE),
        (errors.DatabaseLockedError("x"), Exit.LOCKED),
        (errors.HistoryChangedError("x"), Exit.HISTORY),
        (errors.VersionMismatchError("x"), Exit.PROTOCOL),
        (errors.CborEncodeError("x"), Exit.VALUE),
        (errors.ConfigError("x"), Exit.USAGE),
        (errors.ConfigError("x", code="cannot_bind"), Exit.NETWORK),
        (errors.ConflictError("x"), Exit.UNRESOLVED),
        (exits.NotFoundError("x"), Exit.NOT_FOUND),
    ],
)
def test_an_error_ends_with_the_code_the_manual_gives_it(error: Any, code: Exit):
    assert exit_of(error) is code


def keys_in_manual(name: str) -> list[set[str]]:
    """The keys of the outermost objects that the section's ``--json`` paragraph shows."""
    _, _, shapes = SECTIONS[name].partition("`--json`")
    found = []
    for shape in re.findall(r"`(?:``json\n)?(\{[^`]*\})\n?`", shapes):
        inner = shape[1:-1]
        while re.search(r"[\[{][^\[\]{}]*[\]}]", inner):
            inner = re.sub(r"[\[{][^\[\]{}]*[\]}]", "", inner)
        found.append(set(re.findall(r'"(\w+)"', inner)))
    return found


def test_the_json_shapes_are_those_of_the_manual(tmp_path: Any):
    path, file = tmp_path / "shop", tmp_path / "rows"
    done("init", path)
    entity_id = put(path, "notes", 1, {"a": 1})
    snapshot = tmp_path / "snapshot"
    Database.open(tmp_path / "served", role=Role.SERVER).close()
    done("snapshot", tmp_path / "served", snapshot)
    lines: dict[str, list[tuple[object, ...]]] = {
        "init": [("init", path), ("init", tmp_path / "begun", "--from", snapshot)],
        "put": [("put", path, "notes", "1")],
        "get": [("get", path, "notes", entity_id)],
        "list": [("list", path), ("list", path, "notes", "--limit", 1)],
        "export": [("export", path, "notes", "-o", file)],
        "import": [("import", path, "copy", file)],
        "status": [("status", path)],
        "inspect": [("inspect", path)],
        "verify": [("verify", path)],
        "compact": [("compact", path)],
        "backup": [("backup", path, tmp_path / "backup")],
        "delete": [("delete", path, "notes", entity_id)],
        "reset": [("reset", path, "--keep", "server")],
        "version": [("version",)],
    }
    for name, commands in lines.items():
        printed = [done(*words, "--json").splitlines()[0] for words in commands]
        assert [set(document(line)) for line in printed] == keys_in_manual(name), name
    first = done("pending", path, "--json").splitlines()[0]
    assert set(document(first)) in keys_in_manual("pending")
