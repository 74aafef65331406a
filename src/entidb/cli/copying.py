"""``copy`` and ``renew``: databases that move between directories and PostgreSQL, and those that
were put back by other means than ours.
"""

from __future__ import annotations

import click

from entidb.cli.output import plural, progress, say
from entidb.cli.values import print_json
from entidb.cli.words import elsewhere, json_option, not_empty
from entidb.db.copying import Copied, copy_database, is_database_at
from entidb.storage.addresses import is_address, shown


@click.command("copy")
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET")
@click.option("--online", is_flag=True, help="Copy what is there now, though SOURCE is written to "
              "meanwhile: what comes later is not in the copy.")  # fmt: skip
@json_option
def copy_command(source: str, target: str, online: bool, as_json: bool) -> None:
    """Copy a database, or all of a server, to another place, with its history.

    SOURCE and TARGET are directories or in PostgreSQL, in any combination: one database is a
    database directory or postgresql://HOST/DATABASE#NAME, all of a server are its data directory
    or postgresql://HOST/DATABASE. TARGET must not exist, and appears when it is complete and was
    compared. Devices go on with the copy as with the original: serve only one of them.
    """
    origin = not_empty("SOURCE", source)
    goal = target if is_address(target) else elsewhere("TARGET", target)
    with progress("copying", None, unit="rows") as bar:
        if is_database_at(origin):
            copied = [copy_database(origin, goal, online=online, on_progress=bar.reach)]
        else:
            from entidb.server.copying import copy_server

            copied = copy_server(
                origin,
                goal,
                online=online,
                on_progress=lambda name, done, total: bar.reach(done, total, f"copying {name}"),
            )
    if as_json:
        print_json({"target": shown(goal), "databases": [_document(each) for each in copied]})
        return
    for each in copied:
        entities = plural(sum(each.entities.values()), "entity", "entities")
        say(f"copied {each.source} to {each.target} ({entities}, commit {each.sequence:,})")


def _document(copied: Copied) -> dict[str, object]:
    return {
        "source": copied.source,
        "target": copied.target,
        "sequence": copied.sequence,
        "records": copied.records,
        "collections": {
            name: {"entities": count, "digest": copied.digests[name].hex()}
            for name, count in copied.entities.items()
        },
    }


@click.command("renew")
@click.argument("place", metavar="PLACE")
@json_option
def renew_command(place: str, as_json: bool) -> None:
    """Begin a new history of a server's database whose files or rows were put back.

    PLACE is a database directory, the data directory of a server, postgresql://HOST/DATABASE#NAME,
    or postgresql://HOST/DATABASE for all databases there. Devices notice, as after `restore`. Run
    it before the server is started again.
    """
    from entidb.server.renewing import renew

    renewed = renew(not_empty("PLACE", place))
    if as_json:
        print_json({"place": shown(place), "databases": renewed})
        return
    for name in renewed:
        say(f"{name} has a new history")
