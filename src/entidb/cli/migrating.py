"""``migrate``: a collection rewritten in its newest shape."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from entidb.cli.exits import UsageError
from entidb.cli.output import one_line, plural, progress, say
from entidb.cli.values import print_json
from entidb.cli.words import bind, existing_collection, json_option, opened, words
from entidb.db.migrating import BATCH, migrate


@click.command("migrate")
@words("COLLECTION MODULE:FUNCTION")
@click.option("--batch", default=BATCH, show_default=True, help="Entities of one transaction.")
@click.option("--dry-run", is_flag=True, help="Write nothing: count, and find what cannot be.")
@json_option
def migrate_command(
    words: tuple[str, ...], directory: str | None, batch: int, dry_run: bool, as_json: bool
) -> None:
    """Rewrite a collection in the shape that FUNCTION makes of each entity.

    For the database of a server that does not run, or one that never synchronised. FUNCTION takes
    the stored value of an entity and returns it in its newest shape; MODULE is found from here.
    What was committed stays: a run that was cut off goes on when it is started again.
    """
    bound = bind(words, directory, "COLLECTION", "MODULE:FUNCTION")
    upgrade = load_function(bound["MODULE:FUNCTION"])
    with opened(bound.path, read_only=dry_run) as database:
        collection = existing_collection(database, bound["COLLECTION"])
        with progress("migrating", len(collection)) as bar:
            done = migrate(
                database,
                collection.name,
                upgrade,
                batch=batch,
                dry_run=dry_run,
                progress=bar.reach,
            )
    if as_json:
        print_json(
            {
                "collection": collection.name,
                "entities": done.entities,
                "rewritten": done.rewritten,
                "transactions": done.transactions,
                "dry_run": dry_run,
            }
        )
        return
    verb = "would be" if dry_run else "were"
    looked = plural(done.entities, "entity", "entities")
    say(f"{done.rewritten:,} of {looked} {verb} rewritten")


def load_function(given: str) -> Callable[[Any], Any]:
    """The function that ``MODULE:FUNCTION`` names. Raises ``UsageError``."""
    module, colon, name = given.partition(":")
    if not (colon and module and name):
        raise UsageError(f"{given!r} is no MODULE:FUNCTION, such as shop.models:upgrade")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does; a script's path has no such entry
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        said = one_line(f"{type(error).__name__}: {error}")
        raise UsageError(f"{given} cannot be loaded: {said}") from error
    if not callable(found):
        raise UsageError(f"{given} is a {type(found).__name__} and no function")
    return found  # type: ignore[no-any-return]
