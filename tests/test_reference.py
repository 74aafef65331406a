"""`docs/reference.md` is what the docstrings say, and every method has one."""

from __future__ import annotations

import builtins
import collections.abc
import importlib.util
import inspect
import re
import typing
from pathlib import Path
from types import ModuleType

import pytest

import entidb
from entidb import db, server, sync

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_reference", ROOT / "scripts" / "make_reference.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_docstrings_as_they_are(maker: ModuleType) -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert text == maker.page(), "`python scripts/make_reference.py` writes it anew"


def test_every_method_that_a_program_may_call_is_described(maker: ModuleType) -> None:
    missing = [
        f"{kind.__name__}.{name}"
        for kind in maker.CLASSES
        for name, found in maker.members(kind)
        if not maker.said_of(kind, name, found)
    ]
    assert missing == []
    assert all(inspect.getdoc(kind) for kind in maker.CLASSES)


def test_what_a_method_gives_back_can_be_named_by_a_program(maker: ModuleType) -> None:
    """So that a variable or a function of its own can be annotated with it."""
    public = {name for module in (entidb, db, sync, server) for name in module.__all__}
    known = public | set(dir(builtins)) | set(dir(typing)) | set(dir(collections.abc))
    known |= {"UUID", "datetime", "uuid", "PairsView", "ValuesView"}
    unknown = set()
    for kind in maker.CLASSES:
        for name, found in maker.members(kind):
            function = getattr(found, "func", None) or getattr(found, "fget", None) or found
            signature = inspect.signature(getattr(function, "__func__", function))
            if signature.return_annotation is signature.empty:
                continue
            unknown |= {
                f"{kind.__name__}.{name} gives {word}"
                for word in re.findall(r"[A-Za-z_]{2,}", str(signature.return_annotation))
                if word not in known
            }
    assert not unknown
