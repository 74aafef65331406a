"""The server's page lists every setting with its default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from entidb.server import ServerConfig

PAGE = Path(__file__).parents[2] / "docs" / "server.md"


def test_the_page_has_a_row_for_every_setting_and_its_default():
    table = PAGE.read_text(encoding="utf-8").partition("## All settings")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))
    assert rows == {
        field.name: "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        for field in dataclasses.fields(ServerConfig)
    }
