"""`docs/fields.md` says of each kind of field what it does."""

from __future__ import annotations

from tests.db.fields import PAGE, written


def test_the_tables_are_what_storing_each_field_gives() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == written(text), "`python -m tests.db.fields` writes them anew"
