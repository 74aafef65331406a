"""``snapshot``: a server's database in one file, for devices that begin from it."""

from __future__ import annotations

from pathlib import Path

import click

from entidb.cli.exits import UsageError
from entidb.cli.output import plural, say, size_text
from entidb.cli.values import print_json
from entidb.cli.words import bind, elsewhere, json_option, opened, words
from entidb.db import Role


@click.command("snapshot")
@words("FILE")
@json_option
def snapshot_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Write a server's database to FILE, for devices that begin from it.

    The file is a tar of the files that a first sync downloads. `entidb init --from FILE` makes a
    device of it, which pulls the rest from the server.
    """
    from entidb.server.segments.snapshot import write_snapshot

    bound = bind(words, directory, "FILE", or_store=True)
    target = elsewhere("FILE", bound["FILE"])
    with opened(bound.path, read_only=True) as database:
        if database.role is not Role.SERVER:
            raise UsageError(
                f"{bound.shown} is a device: devices begin with what a server has, so name the "
                "directory of a database below that of a server"
            )
        manifest = write_snapshot(database, target)
    size = Path(target).stat().st_size
    if as_json:
        document = {
            "path": bound.shown,
            "target": target,
            "bytes": size,
            "history": manifest.history.hex(),
            "head": manifest.head,
            "entities": manifest.entities,
        }
        print_json(document)
    else:
        entities = plural(manifest.entities, "entity", "entities")
        say(f"wrote {entities} as of commit {manifest.head:,} to {target} ({size_text(size)})")
