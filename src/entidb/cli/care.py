"""``verify``, ``inspect``, ``compact``, ``backup``, ``version``: looking after a database."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import click

from entidb.cli.exits import Exit, UsageError
from entidb.cli.output import facts, plural, say, size_text, time_text
from entidb.cli.values import print_json
from entidb.cli.words import bind, elsewhere, json_option, opened, words
from entidb.db import inspect
from entidb.db.records import FORMAT_VERSION
from entidb.errors import CorruptionError, DatabaseLockedError, FormatError
from entidb.protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR
from entidb.storage.addresses import is_address
from entidb.storage.opening import closed_faults
from entidb.version import VERSION

#: Packages whose versions matter in a report of a problem.
_PACKAGES: Final = ("lmdb", "libipld", "msgspec", "httpx2", "click", "rich", "starlette", "uvicorn")


@click.command("verify")
@words("")
@click.option("--server", "url", metavar="URL", help="Synchronise with this server, and compare "
              "every entity with what it has.")  # fmt: skip
@click.option("--repair", is_flag=True, help="Put right what differs from the server; what is "
              "pending goes on top.")  # fmt: skip
@click.option("--policy", "policies", multiple=True, metavar="[COLLECTION=]NAME",
              help="Conflict policy, as for `sync`.")  # fmt: skip
@click.option("--token", metavar="TEXT", help="Bearer token for --server. Others on this machine "
              "may see it in the list of processes: prefer --token-file.")  # fmt: skip
@click.option("--token-file", metavar="FILE", envvar="ENTIDB_TOKEN_FILE", show_envvar=True,
              help="File with the token for --server.")  # fmt: skip
@json_option
def verify_command(
    words: tuple[str, ...],
    directory: str | None,
    url: str | None,
    repair: bool,
    policies: tuple[str, ...],
    token: str | None,
    token_file: str | None,
    as_json: bool,
) -> int:
    """Check every record, checksum and cross-reference.

    Reads the whole database and changes nothing. Exit code 9 if there are faults. With --server
    the database is synchronised and compared with that server, too.
    """
    if repair and url is None:
        raise UsageError("--repair needs --server URL: what is right is what the server has")
    bound = bind(words, directory, or_store=True)
    if url is not None and is_address(bound.path):
        raise UsageError("--server is for a database in files, as devices have them")
    faults = _faults(bound.path)
    path = bound.shown
    if not faults and url is not None:
        from entidb.cli.comparing import compare

        return compare(path, url, token, token_file, policies, repair=repair, as_json=as_json)
    if as_json:
        print_json({"path": path, "ok": not faults, "faults": faults})
        return Exit.FAULTS if faults else Exit.OK
    if not faults:
        say(f"{path} has no faults: every record was checked")
        return Exit.OK
    for fault in faults:
        say(fault)
    from entidb.cli.app import fail

    return fail(
        "faults",
        f"{plural(len(faults), 'fault')} in {path}; restore a backup, or fetch a device's data "
        "anew from its server",
        Exit.FAULTS,
    )


def _faults(path: str) -> list[str]:
    """The faults of the database at ``path``. One that is too damaged to be opened has a fault too;
    a directory without a database raises."""
    try:
        # Its pages first, without mapping them: a damaged one could end this process.
        if not is_address(path):
            with suppress(DatabaseLockedError):  # whoever has it open has looked
                faults = closed_faults(path)
                if faults:
                    return faults
        with opened(path, read_only=True) as database:
            return database.verify()
    except CorruptionError as error:
        return [str(error)]
    except FormatError as error:
        if error.code != "truncated":
            raise
        return [str(error)]


@click.command("inspect")
@words("")
@json_option
def inspect_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Show what is in a database: sizes, counters, identity."""
    with opened(bind(words, directory, or_store=True).path, read_only=True) as database:
        found = inspect(database)
    if as_json:
        print_json(found)
        return
    for line in facts(_inspected(found)):
        say(line)


def _inspected(found: dict[str, Any]) -> Iterator[tuple[str, object]]:
    storage = found["storage"]
    yield "role", found["role"]
    yield "device id", found["device_id"]
    yield "format", found["format"]
    yield "made", time_text(found["created_ms"])
    yield "commit", f"{found['sequence']:,}"
    yield "server database", found["db_id"] or "-"
    yield "history", found["history"] or "-"
    yield "cursor", f"{found['cursor']:,}"
    yield "floor", f"{found['floor']:,}"
    for name in ("pending", "held", "conflicts", "discarded", "overruled"):
        yield name, f"{found[name]:,}"
    yield "file", f"{size_text(storage['file_bytes'])} ({storage['kind']}, {storage['path']})"
    yield "in use", f"{size_text(storage['used_bytes'])} of {plural(storage['records'], 'record')}"
    if storage["map_bytes"]:  # of files
        yield "can grow to", f"{size_text(storage['map_bytes'])} before the map is enlarged"
    for name, about in found["collections"].items():
        local = "" if about["synced"] else ", local"
        yield f"collection {name}", plural(about["entities"], "entity", "entities") + local


@click.command("compact")
@words("")
@json_option
def compact_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Give unused room back to the file system. Until it is done it needs room for a copy."""
    instead = "PostgreSQL gives its rows' room back by itself (autovacuum)"
    path = bind(words, directory, instead=instead).path
    with opened(path) as database:
        before = database.storage.info().file_bytes
        database.compact()
        after = database.storage.info().file_bytes
    if as_json:
        print_json({"path": path, "before_bytes": before, "after_bytes": after})
    else:
        say(f"{size_text(before)} before, {size_text(after)} now")


@click.command("backup")
@words("TARGET")
@json_option
def backup_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Write a consistent copy to the new directory TARGET.

    A server that is started from it begins a new history, which devices notice.
    """
    bound = bind(words, directory, "TARGET", or_store=True)
    target = elsewhere("TARGET", bound["TARGET"])
    if is_address(target):
        raise UsageError(
            "TARGET is a directory; `entidb copy` copies a database to PostgreSQL, with its history"
        )
    with opened(bound.path, read_only=True) as database:
        database.backup(target)
    size = sum(each.stat().st_size for each in Path(target).iterdir())
    if as_json:
        print_json({"path": bound.shown, "target": target, "bytes": size})
    else:
        say(f"backed up {bound.shown} to {target} ({size_text(size)})")


@click.command("version")
@json_option
def version_command(as_json: bool) -> None:
    """Show the versions of EntiDB and of the packages that it uses."""
    document = {
        "entidb": VERSION,
        "protocol": f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}",
        "format": FORMAT_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(_installed()),
    }
    if as_json:
        print_json(document)
        return
    packages = document.pop("packages")
    assert isinstance(packages, dict)
    shown = {name: version or "not installed" for name, version in packages.items()}
    for line in facts([*document.items(), *shown.items()]):
        say(line)


def _installed() -> Iterator[tuple[str, str | None]]:
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, None
