"""The package's front door: every public name is there, lazily, and the server is an extra."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import entidb
from entidb import errors, lazy

PACKAGE = Path(entidb.__file__)


@pytest.mark.parametrize("name", entidb.__all__)
def test_every_public_name_can_be_imported_from_the_package(name: str):
    assert getattr(entidb, name) is not None
    assert name in dir(entidb)


def test_every_error_is_exported():
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.EntiDBError)
    }
    assert classes <= set(entidb.__all__)


def test_type_checkers_see_the_names_that_are_loaded_lazily():
    tree = ast.parse(PACKAGE.read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == entidb._HOME_OF


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Databse"):
        entidb.Databse  # noqa: B018


def test_importing_the_package_loads_none_of_its_parts():
    code = "import sys, entidb; print(*(m for m in sys.modules if m.startswith('entidb.')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent.parent)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["entidb.lazy", "entidb.version"]


def test_a_missing_server_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def missing(home: str) -> object:
        raise ModuleNotFoundError("No module named 'starlette'", name="starlette")

    monkeypatch.setattr(lazy, "import_module", missing)
    monkeypatch.delitem(vars(entidb), "create_app", raising=False)
    with pytest.raises(ImportError, match=r'pip install "entidb\[server\]"'):
        entidb.create_app  # noqa: B018


def test_a_missing_postgres_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def missing(home: str) -> object:
        raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")

    monkeypatch.setattr(lazy, "import_module", missing)
    monkeypatch.delitem(vars(entidb.storage), "PostgresStorage", raising=False)
    with pytest.raises(ImportError, match=r'pip install "entidb\[postgres\]"'):
        entidb.storage.PostgresStorage  # noqa: B018


def test_another_missing_module_is_not_blamed_on_the_extra(monkeypatch: pytest.MonkeyPatch):
    def missing(home: str) -> object:
        raise ModuleNotFoundError("No module named 'lmdb'", name="lmdb")

    monkeypatch.setattr(lazy, "import_module", missing)
    monkeypatch.delitem(vars(entidb), "Database", raising=False)
    with pytest.raises(ModuleNotFoundError, match="lmdb"):
        entidb.Database  # noqa: B018


def test_everything_can_be_imported_at_once_also_without_the_servers_packages():
    block = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in %r else found(name)
from entidb import *
assert Database and SyncEngine and ServerConfig and EntiDBError
try:
    from entidb import create_app
except ImportError as error:
    assert 'pip install "entidb[server]"' in str(error) and "PyJWT" in str(error), error
else:
    raise AssertionError("it was found")
print("done")
"""
    missing = entidb._SERVER_NEEDS
    ended = subprocess.run(
        [sys.executable, "-c", block % (missing, missing)],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.stdout == "done\n", ended.stderr


def test_a_blocking_engine_does_not_load_asyncio():
    code = "import sys; from entidb import SyncEngine; print('asyncio' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent.parent)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "False\n"
