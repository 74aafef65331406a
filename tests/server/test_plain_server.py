"""What a server that is asked for nothing but its databases has not in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import entidb

#: Each of them is there for a feature: administration from outside, the names of all characters,
#: advice about names that are nearly right, stores and nodes elsewhere, `entidb` the command.
UNUSED = (
    "entidb.server.admin.http",
    "entidb.server.admin.openapi",
    "entidb.server.admin.routes",
    "entidb.server.admin.browse",
    "entidb.server.admin.fleet",
    "entidb.server.metrics",
    "entidb.storage.postgres",
    "entidb.sync.engine",
    "entidb.cli",
    "html.entities",
    "difflib",
    "psycopg",
)
PROGRAM = """
import asyncio, sys
from entidb.server import ServerConfig, create_app

async def main():
    app = create_app(ServerConfig(data_dir=sys.argv[1], insecure_no_auth=True))
    async with app.lifespan():
        app.server.database("shop").collection("notes").add({"n": 1})

asyncio.run(main())
print(*sorted(set(sys.argv[2:]) & set(sys.modules)))
"""


def test_a_plain_server_loads_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "data"), *UNUSED],
        env=os.environ | {"PYTHONPATH": str(Path(entidb.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.stdout, ended.returncode) == ("\n", 0), ended.stdout + ended.stderr


def test_each_of_these_is_there_to_be_loaded() -> None:
    source = Path(entidb.__file__).parent.parent
    ours = [name for name in UNUSED if name.startswith("entidb.")]
    for name in ours:
        path = source.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
