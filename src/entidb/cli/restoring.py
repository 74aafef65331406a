"""``restore``: a backup in the place of a database of a server that does not run. While it runs,
``entidb admin restore`` does it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

import click

from entidb.cli.exits import NotFoundError, UsageError
from entidb.cli.output import plural, say
from entidb.cli.values import print_json
from entidb.cli.words import a_directory, json_option, not_empty, opened
from entidb.errors import CorruptionError, DatabaseLockedError
from entidb.types import SystemClock

_INSTEAD: Final = (
    "`entidb admin --dir ADDRESS restore NAME ID` puts a backup of the server back while it runs, "
    "and `entidb copy BACKUP ADDRESS#NAME`, with `entidb renew` after it, any other one"
)


@click.command("restore")
@click.argument("backup", metavar="BACKUP")
@click.argument("data_dir", metavar="DIR")
@click.argument("name", metavar="NAME")
@json_option
def restore_command(backup: str, data_dir: str, name: str, as_json: bool) -> None:
    """Put a backup in the place of a server's database.

    BACKUP is what `entidb backup` or the server made; DIR is the data directory of a server that
    does not run. The database NAME that is there is put aside. The restored one begins a new
    history, which devices notice.
    """
    from entidb.server.admin.checking import check
    from entidb.server.config import ServerConfig, check_db_id, directory_name
    from entidb.server.directory import DataDirectory, clear_left, out_of_the_way
    from entidb.storage.directories import give_files
    from entidb.storage.disk_errors import disk_error
    from entidb.storage.partial import Partial

    source, root = not_empty("BACKUP", backup), Path(a_directory(data_dir, _INSTEAD)).absolute()
    place = root / directory_name(check_db_id(name))
    if not os.path.lexists(source):
        raise NotFoundError(
            f"there is no backup at {source}: name a directory that `entidb backup` or the server "
            "made",
            code="no_database",
        )
    try:
        directory = DataDirectory.take(ServerConfig(data_dir=root, insecure_no_auth=True))
    except DatabaseLockedError as error:
        raise DatabaseLockedError(f"{error}; `entidb admin restore` does it meanwhile") from error
    try:
        clear_left(root)
        with Partial(str(place), "restore") as partial:
            with opened(source, read_only=True) as database:
                # And not its files: the copy is known for one, and begins a history (R29).
                database.backup(partial.path)
            # The copy is for the server's user, whoever made the backup.
            give_files(partial.path, os.stat(root))
            found = check(partial.path, lambda: None)
            if found.faults:
                raise CorruptionError(f"{source} is damaged: {found.faults[0]}")
            if found.role != "server":
                raise UsageError(f"{source} is the database of a device, and no server's")
            now = SystemClock().now_ms()
            partial.note(str(now))
            with out_of_the_way(root, name, now) as old:
                partial.finish()
            aside = None if old is None else old.id
    except OSError as error:
        raise disk_error(error.errno or errno.EIO, f"restoring {name}") from error
    finally:
        directory.release()
    if as_json:
        print_json({"name": name, "path": str(place), "entities": found.entities, "aside": aside})
        return
    kept = "" if aside is None else f"; what was there is aside as {aside}"
    say(f"restored {name} with {plural(found.entities, 'entity', 'entities')}{kept}")
