"""All databases of a server, copied from one place to another: between data directories and
PostgreSQL, both ways.

With them goes what an administrator has decided (who is revoked, what is frozen) and which devices
there are. The audit log stays where it is, and so do databases that were deleted and can still be
taken back.

Not here: one database (``entidb.db.copying``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

from entidb.db.copying import (
    Copied,
    check_still,
    copy_store,
    finish_directory,
    new_directory,
    open_source,
)
from entidb.errors import ConfigError, StorageError
from entidb.server.config import ServerConfig, directory_name, is_db_id
from entidb.server.directory import DataDirectory, list_databases
from entidb.server.records import CONTROL, FileRecords, devices_of
from entidb.storage import Storage, open_storage
from entidb.storage.addresses import is_address, shown, whole
from entidb.storage.directories import make_folder, sync_path
from entidb.storage.named import arriving
from entidb.storage.opening import open_shelf
from entidb.types import path_text

#: Called with the name of the database, the records of it that are copied, and how many there are.
ServerProgress = Callable[[str, int, int], None]
#: Makes the empty store of a database; its end, which is the caller's, closes it.
_Make = Callable[[str, ExitStack], Storage]


def copy_server(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    online: bool = False,
    on_progress: ServerProgress | None = None,
) -> list[Copied]:
    """Copy all databases of a server, each as ``entidb.db.copying.copy_database`` does. ``source``
    and ``target`` are data directories, or addresses of PostgreSQL databases. All of them appear at
    the target together, when the last one is complete.

    A data directory that is served is refused. Databases in PostgreSQL are read one after the
    other, each in a snapshot of its own; one that is written to while any of them is copied is
    refused too, unless ``online``.

    Raises as ``copy_database``; ``ConfigError`` if there is no database at ``source``. After an
    error there is nothing at ``target``."""
    origin, goal = path_text(source), path_text(target)
    with _served(origin) as names, ExitStack() as stack:
        make, finish = _target(goal, names, stack)
        sources: list[tuple[Storage, tuple[Copied, int]]] = []
        for name in names:
            store = stack.enter_context(closing(open_source(_place_of(origin, name))))

            def tell(done: int, total: int, name: str = name) -> None:
                if on_progress is not None:
                    on_progress(name, done, total)

            with ExitStack() as closes:
                made = make(name, closes)
                where, to = _place_of(origin, name), _place_of(goal, name)
                sources.append((store, copy_store(store, made, shown(where), shown(to), tell)))
        for store, copied in sources:
            check_still(store, copied, online=online)
        finish(_read_notes(origin, names))
        return [copied for _, (copied, _) in sources]


def _place_of(server: str, name: str) -> str:
    if is_address(server):
        return f"{server}#{name}"
    return os.path.join(server, directory_name(name))


@contextmanager
def _served(place: str) -> Iterator[list[str]]:
    """The databases at ``place``, which no server serves meanwhile if it is a directory."""
    if is_address(place):
        with closing(open_shelf(whole(place), read_only=True)) as shelf:
            yield _some([name for name in shelf.names() if is_db_id(name)], place)
        return
    names = _some(list_databases(place), place)
    taken = DataDirectory.take(ServerConfig(data_dir=place, insecure_no_auth=True))
    try:
        yield names
    finally:
        taken.release()


def _some(names: list[str], place: str) -> list[str]:
    if not names:
        raise ConfigError(
            f"there is no database in {shown(place)}, so there is nothing to copy: check the path",
            code="no_database",
        )
    return names


# ---------------------------------------------------------------- what is beside the databases

Notes = dict[str, bytes]


def _read_notes(place: str, names: list[str]) -> Notes:
    wanted: Final = [CONTROL, *map(devices_of, names)]
    if is_address(place):
        from entidb.storage.postgres.sharing import SharedTables

        with closing(SharedTables(place, read_only=True)) as sharing:
            found = {name: sharing.read(name) for name in wanted}
    else:
        records = FileRecords(place)
        found = {name: records.read(name) for name in wanted}
    return {name: content for name, content in found.items() if content is not None}


def _target(
    place: str, names: list[str], stack: ExitStack
) -> tuple[_Make, Callable[[Notes], None]]:
    """What makes the stores, and what makes them those of ``place``, with the notes beside."""
    if is_address(place):
        made = stack.enter_context(arriving(whole(place), names))

        def finish(notes: Notes) -> None:
            with _shared(place, notes):
                made.finish()

        return lambda name, closes: made.store(name), finish
    partial = stack.enter_context(new_directory(place))
    root = Path(partial.path)
    make_folder(str(root), str(root.parent))

    def make(name: str, closes: ExitStack) -> Storage:
        return closes.enter_context(closing(open_storage(root / directory_name(name))))

    def finish_files(notes: Notes) -> None:
        records = FileRecords(root)
        for name, content in notes.items():
            records.change(name, lambda _, content=content: content, lambda _: None)  # type: ignore[misc]
        sync_path(str(root))
        finish_directory(partial, place)

    return make, finish_files


@contextmanager
def _shared(address: str, notes: Notes) -> Iterator[None]:
    """Before the databases appear in the block: nobody is let in who was locked out. What another
    server there has decided is not written over; what was not there is gone again if the block
    fails, or it would stand in the way of the next copy."""
    from entidb.storage.postgres.sharing import SharedTables

    with closing(SharedTables(address)) as sharing:
        if CONTROL in notes and sharing.read(CONTROL) not in (None, notes[CONTROL]):
            raise StorageError(
                f"an administrator of {sharing.where} has decided something there already, and "
                "what the source has would take its place; copy to a PostgreSQL database of its "
                "own",
                code="exists",
            )
        new = [name for name in notes if sharing.read(name) is None]
        try:
            for name, content in notes.items():
                sharing.change(name, lambda _, content=content: content, lambda _: None)  # type: ignore[misc]
            yield
        except BaseException:
            for name in new:
                sharing.rename(name, None)
            raise


__all__ = ["ServerProgress", "copy_server"]
