"""The direction of dependencies: a module imports only from lower rows, siblings never.

The rows are those of the architecture; every import statement counts, also one inside a function
or under ``TYPE_CHECKING``. Third-party packages enter at one seam each.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "entidb"

#: Row 0 has an order of its own: everything may raise the errors, and the codec needs no clock.
ROW_0_ORDER = (
    "version", "collector", "events", "errors", "types", "cbor", "credentials", "packing", "lazy",
)  # fmt: skip

ROWS = {
    **dict.fromkeys(ROW_0_ORDER, 0),
    **dict.fromkeys(("storage", "protocol"), 1),
    "db": 2,
    **dict.fromkeys(("sync", "server"), 3),
    **dict.fromkeys(("cli", "testing"), 4),
}
#: The package itself names everything, lazily; ``python -m entidb`` is the command line.
UNRANKED = {"__init__", "__main__"}

#: Third-party package -> where it may be imported: a module, or a package with a final slash.
SEAMS = {
    "libipld": ("cbor/",),
    "lmdb": ("storage/lmdb/",),
    "isal": ("storage/crc.py",),
    "psycopg": ("storage/postgres/",),
    "httpx2": ("sync/http/",),
    "starlette": ("server/",),
    "uvicorn": ("server/",),
    "jwt": ("server/",),
    "prometheus_client": ("server/",),
    "click": ("cli/",),
    "rich": ("cli/",),
}

MODULES = sorted(SOURCE.rglob("*.py"))


def package_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def dotted(path: Path) -> list[str]:
    parts = list(path.relative_to(SOURCE.parent).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported: ``from entidb import cbor`` is entidb.cbor."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = dotted(path)
                keep = len(here) - node.level + (path.name == "__init__.py")
                base = ".".join([*here[:keep], *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(path: Path, text: str) -> list[str]:
    home = package_of(path)
    found = []
    for line, name in imports(ast.parse(text), path):
        root, _, rest = name.partition(".")
        if root == "entidb" and home not in UNRANKED and not _may_import(home, rest):
            found.append(f"{path.relative_to(SOURCE)}:{line}: {home} imports {name}")
        if root in SEAMS and not _at_seam(path, SEAMS[root]):
            found.append(f"{path.relative_to(SOURCE)}:{line}: {root} belongs to {SEAMS[root]}")
    return found


def _may_import(home: str, imported: str) -> bool:
    target = imported.partition(".")[0]
    if target == home:
        return True
    if target not in ROWS or target == "testing":
        # The lazy names of the package would hide which row they come from.
        return False
    if home == "testing":
        return target != "cli"
    if ROWS[home] == ROWS[target] == 0:
        return ROW_0_ORDER.index(target) < ROW_0_ORDER.index(home)
    return ROWS[target] < ROWS[home]


def _at_seam(path: Path, places: tuple[str, ...]) -> bool:
    relative = path.relative_to(SOURCE).as_posix()
    return any(
        relative.startswith(place) if place.endswith("/") else relative == place for place in places
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_module_imports_only_from_lower_rows_and_third_parties_at_their_seam(path: Path):
    assert package_of(path) in ROWS.keys() | UNRANKED, "a new package needs a row"
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("storage/base.py", "from entidb.db import Database"),
        ("storage/base.py", "from entidb import protocol"),
        ("protocol.py", "import entidb.storage.lmdb"),
        ("sync/engine.py", "from entidb.server.service import Service"),
        ("sync/engine.py", "def late():\n    from ..server import service"),
        ("server/app.py", "from entidb.testing import world"),
        ("db/database.py", "from entidb import Database"),
        ("errors.py", "from entidb.types import Clock"),
        ("cli/main.py", "from entidb.testing import world"),
        ("db/records.py", "import libipld"),
        ("storage/memory.py", "import lmdb"),
        ("sync/engine.py", "import httpx2"),
        ("sync/http/client.py", "from starlette.requests import Request"),
        ("server/app.py", "import rich.console"),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str):
    assert violations(SOURCE / module, line) != []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("cbor/decoding.py", "import libipld\nfrom entidb.errors import CborDecodeError"),
        ("sync/engine.py", "from . import cycle\nfrom ..db import Database"),
        ("server/__init__.py", "from .app import create_app\nimport jwt"),
        ("testing/world.py", "from entidb.server import SyncServer\nimport entidb.sync.engine"),
    ],
)
def test_a_legal_import_is_left_alone(module: str, line: str):
    assert violations(SOURCE / module, line) == []


#: Suites of the whole, or of a promise that no single room keeps.
ACROSS = {
    "bitrot",
    "checked",
    "compat",
    "hostile",
    "planted",
    "powerloss",
    "scenarios",
    "vectors",
}


def test_the_folders_of_the_tests_mirror_the_source_tree():
    tests = Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        folder = path.parent.relative_to(tests)
        if not ACROSS & set(folder.parts):
            assert (SOURCE / folder).is_dir(), f"{path.name} tests nothing in src/entidb/{folder}"
