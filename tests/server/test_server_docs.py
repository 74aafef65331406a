"""The server's page lists every setting with its default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from entidb.server import ServerConfig

PAGE = Path(__file__).parents[2] / "docs" / "server.md"


def required(field: dataclasses.Field[object]) -> bool:
    return dataclasses.MISSING is field.default is field.default_factory


def default_of(field: dataclasses.Field[object]) -> object:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def test_the_page_has_a_row_for_every_setting_and_its_default():
    table = PAGE.read_text(encoding="utf-8").partition("## All settings")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))
    assert rows == {
        field.name: "required" if required(field) else f"`{default_of(field)!r}`"
        for field in dataclasses.fields(ServerConfig)
    }
