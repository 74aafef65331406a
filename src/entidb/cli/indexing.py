"""``index``: the indexes of a database, and building them again."""

from __future__ import annotations

import click
from msgspec.structs import asdict

from entidb.cli.output import plural, say
from entidb.cli.values import print_json
from entidb.cli.words import bind, json_option, opened, words
from entidb.db import IndexStatus


@click.command("index")
@words("")
@click.option("--rebuild", is_flag=True, help="Build all of them from nothing.")
@json_option
def index_command(
    words: tuple[str, ...], directory: str | None, rebuild: bool, as_json: bool
) -> None:
    """Show the indexes of a database, and how far each is built.

    A program declares them where it opens a collection. --rebuild builds all from nothing, but for
    those by a function of the program's own: it builds them when it runs the next time.
    """
    bound = bind(words, directory, or_store=True)
    with opened(bound.path, read_only=not rebuild) as database:
        if rebuild:
            database.rebuild_indexes()
            database.wait_for_indexes()
        found = database.indexes()
    if as_json:
        for status in found:
            print_json(asdict(status))
        return
    if not found:
        say(f"{bound.shown} has no index")
    for status in found:
        say(f"{status.collection}: {status.index}, {_state(status)}")


def _state(status: IndexStatus) -> str:
    done = plural(status.done, "entity", "entities")
    if status.ready:
        return f"ready, {done}"
    if status.paused:
        return "waits for a program that has its function"
    return f"being built, {done} of {status.entities:,}"
