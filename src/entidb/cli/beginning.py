"""``init --from``: a device that begins with a snapshot of a server's database."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from entidb.cli.exits import UsageError
from entidb.cli.output import plural, say
from entidb.cli.values import print_json, unreadable
from entidb.cli.words import is_database
from entidb.db import Database
from entidb.errors import ProtocolError, SyncStateError
from entidb.protocol.segments import UnknownPackingError


def begin_command(
    path: str,
    source: str,
    local: tuple[str, ...],
    policies: tuple[str, ...],
    *,
    as_json: bool,
) -> None:
    """Make a device of the snapshot ``source`` in the directory ``path``. A file that is no
    snapshot, or a damaged one, leaves the database there as it was, empty where it was made."""
    from entidb.cli.summary import rebased, rebased_document
    from entidb.cli.syncing import policies_of
    from entidb.sync import SyncConfig
    from entidb.sync.beginning import begin_from

    chosen = policies_of(policies)
    SyncConfig(db_id="snapshot", **chosen)  # refuses a policy that is none, before anything is made
    with _opened(source) as file:
        existed = is_database(path)
        with Database.open(path) as database:
            for name in local:
                database.declare_local(name)
            try:
                begun = begin_from(database, file, **chosen)
            except SyncStateError as error:
                raise UsageError(f"{path}: {error.message}", code="exists") from error
            except UnknownPackingError as error:
                raise UsageError(
                    f"{source}: {error.message}. The database in {path} {_left(existed)}"
                ) from error
            except ProtocolError as error:
                raise UsageError(
                    f"{source} cannot be used: {error.message}; copy it again, or make it anew "
                    f"with `entidb snapshot`. The database in {path} "
                    f"{_left(existed)}"
                ) from error
            device_id = database.device_id.hex()
    manifest, report = begun.manifest, begun.report
    entities = manifest.entities
    if as_json:
        print_json(
            {
                "path": path,
                "created": not existed,
                "device_id": device_id,
                "from": str(Path(source)),
                "history": manifest.history.hex(),
                "head": manifest.head,
                "entities": entities,
                **rebased_document(report),
            }
        )
    else:
        count = plural(entities, "entity", "entities")
        say(f"{path} begins with {count} as of commit {manifest.head:,}; sync it for the rest")
        for line in rebased(report):
            say(line)


def _left(existed: bool) -> str:
    return "is as it was" if existed else "is empty"


def _opened(source: str) -> IO[bytes]:
    try:
        return open(source, "rb")
    except IsADirectoryError:
        raise UsageError(
            f"{source} is a directory, and --from wants a file that `entidb snapshot` wrote"
        ) from None
    except OSError as error:
        raise unreadable(source, error) from error


__all__ = ["begin_command"]
