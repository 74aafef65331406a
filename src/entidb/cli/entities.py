"""``init``, ``put``, ``get``, ``delete``, ``list``: entities one by one."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import click

from entidb.cli.beginning import begin_command
from entidb.cli.exits import UsageError
from entidb.cli.finding import query_of
from entidb.cli.output import fit, id_text, note, plural, say, table
from entidb.cli.values import print_json, read_value, shown
from entidb.cli.words import (
    bind,
    existing_collection,
    find_id,
    full_id,
    is_database,
    is_end,
    json_option,
    not_empty,
    opened,
    opened_or_made,
    words,
)
from entidb.db import Database, inspect
from entidb.db.collection import ReadCollection
from entidb.storage.addresses import is_address
from entidb.storage.opening import open_shelf
from entidb.types import check_name

#: Entities that ``list`` shows by default.
LIST_LIMIT = 100


@click.command("init")
@words("")
@click.option("--local", multiple=True, metavar="COLLECTION", help="Never synchronise it.")
@click.option("--from", "source", metavar="FILE", help="Begin with what a snapshot holds.")
@click.option("--policy", "policies", multiple=True, metavar="[COLLECTION=]NAME",
              help="With --from: who wins where something was written here before, as in "
              "`entidb sync`.")  # fmt: skip
@json_option
def init_command(
    words: tuple[str, ...],
    directory: str | None,
    local: tuple[str, ...],
    source: str | None,
    policies: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a new, empty database in the directory DIR.

    A database that is there already stays as it is, except for collections given with --local. DIR
    may also be the address of a PostgreSQL database, where it makes the tables for `entidb serve`.
    With --from the database begins with what a file of `entidb snapshot` holds; `entidb sync` has
    the rest.
    """
    path = bind(words, directory, or_address=True).path
    if is_address(path):
        if source is not None:
            raise UsageError("--from is for the database of a device, which is in a directory")
        _make_tables(path, local, as_json)
        return
    if source is not None:
        begin_command(path, not_empty("FILE", source), local, policies, as_json=as_json)
        return
    if policies:
        raise UsageError("--policy is for --from: `entidb sync` takes its own")
    existed = is_database(path)
    with Database.open(path) as database:
        for name in local:
            database.declare_local(name)
        device_id = database.device_id.hex()
    if as_json:
        print_json({"path": path, "created": not existed, "device_id": device_id})
    elif existed:
        say(f"{path} is an EntiDB database already; it stays as it is")
    else:
        say(f"made a database in {path}")


def _make_tables(address: str, local: tuple[str, ...], as_json: bool) -> None:
    if local:
        raise UsageError("--local is for the database of a device, which is in a directory")
    with closing(open_shelf(address)) as shelf:
        where, made = shelf.where, shelf.node.made
    if as_json:
        print_json({"path": where, "created": made})
    elif made:
        say(f"made the tables of EntiDB in {where}")
    else:
        say(f"{where} has the tables of EntiDB already; they stay as they are")


@click.command("put")
@words("COLLECTION [ID] VALUE")
@json_option
def put_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Store VALUE under ID, or under a new id, and print the id.

    VALUE is JSON, @FILE for JSON in a file, or - for JSON on standard input. Bytes are written as
    {"$bytes": "…base64…"}. A negative number needs -- before the words. A database is made where
    there is none.
    """
    bound = bind(words, directory, "COLLECTION", "[ID]", "VALUE")
    value = read_value(bound["VALUE"])
    check_name(bound["COLLECTION"])
    with opened_or_made(bound.path) as database:
        collection = database.collection(bound["COLLECTION"])
        entity_id = _put_id(bound.get("ID"), database, collection)
        with database.transaction() as tx:
            tx.collection(collection.name)[entity_id] = value
    if as_json:
        print_json({"collection": collection.name, "id": str(entity_id), "sequence": tx.sequence})
    else:
        say(str(entity_id))


def _put_id(text: str | None, database: Database, collection: ReadCollection[Any]) -> uuid.UUID:
    if text is None:
        return database.new_id()
    return full_id(text, collection.name) or find_id(text, collection)


@click.command("get")
@words("COLLECTION ID")
@json_option
def get_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Print the entity ID of COLLECTION as JSON.

    With --json as one line, with its collection and id.
    """
    bound = bind(words, directory, "COLLECTION", "ID", or_store=True)
    with opened(bound.path, read_only=True) as database:
        collection = existing_collection(database, bound["COLLECTION"])
        entity_id = find_id(bound["ID"], collection)
        value = collection[entity_id]
    if as_json:
        print_json({"collection": collection.name, "id": str(entity_id), "value": value})
    else:
        say(shown(value, indent=2))


@click.command("delete")
@words("COLLECTION ID")
@json_option
def delete_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Delete the entity ID of COLLECTION."""
    bound = bind(words, directory, "COLLECTION", "ID")
    with opened(bound.path) as database:
        name = existing_collection(database, bound["COLLECTION"]).name
        entity_id = find_id(bound["ID"], database.collection(name))
        with database.transaction() as tx:
            del tx.collection(name)[entity_id]
    if as_json:
        print_json({"collection": name, "id": str(entity_id), "sequence": tx.sequence})
    else:
        say(f"deleted {entity_id}")


@click.command("list")
@words("[COLLECTION]")
@click.option(
    "--limit", default=LIST_LIMIT, show_default=True, help="At most this many; 0 for all of them."
)
@click.option("--start", metavar="ID", help="Begin at this id (it need not exist).")
@click.option("--reverse", is_flag=True, help="Highest ids first, which are the newest.")
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Only those: kind=tea, 'price>3'; repeat it.",
)
@click.option(
    "--order", multiple=True, metavar="FIELD", help="Sorted by this field; -FIELD: largest first."
)
@click.option("--after", metavar="ID", help="Go on behind this entity, in the same order.")
@json_option
def list_command(
    words: tuple[str, ...],
    directory: str | None,
    limit: int,
    start: str | None,
    reverse: bool,
    where: tuple[str, ...],
    order: tuple[str, ...],
    after: str | None,
    as_json: bool,
) -> None:
    """List the collections, or the entities of one in order of ids."""
    bound = bind(words, directory, "[COLLECTION]", or_store=True)
    if limit < 0:
        raise UsageError("--limit is 0 or more")
    name = bound.get("COLLECTION")
    asked = bool(where or order or after is not None)
    if asked and (start is not None or reverse):
        raise UsageError(
            "--start and --reverse are about ids, and --where, --order and --after about fields: "
            "use --after ID to go on, and --order=-FIELD for the largest first"
        )
    if asked and name is None:
        raise UsageError("which collection? --where, --order and --after are about its entities")
    with opened(bound.path, read_only=True) as database:
        if name is None:
            _list_collections(database, as_json)
            return
        collection = existing_collection(database, name)
        most = min(limit, sys.maxsize - 1)
        if asked:
            query = query_of(collection, where, order, after)
            pairs = iter(query.limit(most + 1) if most else query)
        else:
            pairs = _from(collection, start, reverse)
        last = None
        for last, value in islice(pairs, most or None):
            if as_json:
                print_json({"id": str(last), "value": value})
            else:
                say(fit(f"{id_text(last)}  {shown(value)}"))
        following = next(pairs, None)
    if following is not None:
        go_on = f"--after {last}" if asked else f"--start {following[0]}"
        go_on += " --reverse" if reverse else ""
        note(f"there are more: --limit 0 for all, {go_on} to go on")


def _from(
    collection: ReadCollection[Any], start: str | None, reverse: bool
) -> Iterator[tuple[uuid.UUID, Any]]:
    if start is None:
        return collection.range(reverse=reverse)
    if is_end(start):
        low = find_id(start, collection)
    else:
        digits = start.lower().replace("-", "")
        whole = full_id(start, collection.name)
        low = whole or uuid.UUID(hex=digits.ljust(32, "f" if reverse else "0"))
    if not reverse:
        return collection.range(low)
    above = low.int + 1
    stop = uuid.UUID(int=above) if above < 1 << 128 else None
    return collection.range(None, stop, reverse=True)


def _list_collections(database: Database, as_json: bool) -> None:
    found: dict[str, dict[str, Any]] = inspect(database)["collections"]
    if as_json:
        for name, about in found.items():
            print_json({"collection": name, **about})
        return
    if not found:
        note("no collections yet: `entidb put`, `entidb import` or `entidb sync` make them")
        return
    rows = [
        (name, plural(about["entities"], "entity", "entities"), _scope_word(about["synced"]))
        for name, about in found.items()
    ]
    for line in table(rows, ("collection", "holds", "synchronised")):
        say(line)


def _scope_word(synced: bool) -> str:
    return "yes" if synced else "no, local"
