"""`docs/reference.md` is what the docstrings say, and every method has one."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

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
