"""A database copied from one place to another, record by record and with its history: between
directories and PostgreSQL, both ways.

The records are the same in every store, so a copy is the same database: devices go on with it
without a reset. What a copy has is one snapshot, and nothing is at the target before all of it is
there and has been read again and compared.

Not here: the databases of a whole server (``entidb.server.copying``), and copies that begin a new
history (``Database.backup``, R29).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final

from entidb.db.database import Database
from entidb.db.digests import blocks_between, settled
from entidb.db.identity import read_identity, stored_role
from entidb.db.records import SPACED, count_key, decode_format, is_spacer, unpack_u64
from entidb.db.writer import Writer
from entidb.errors import ConfigError, CorruptionError, DatabaseLockedError, StorageError
from entidb.storage import open_storage
from entidb.storage.addresses import is_address, shown, split_name
from entidb.storage.base import KEY_BYTES_MAX, Snapshot, Storage
from entidb.storage.directories import absolute
from entidb.storage.disk_errors import disk_error
from entidb.storage.named import arriving, open_named
from entidb.storage.opening import holds_store
from entidb.storage.partial import Partial
from entidb.storage.regions import spacers_of
from entidb.types import ID_BYTES, path_text

_ABOVE_ALL: Final = b"\xff" * (KEY_BYTES_MAX + 1)
_LAST_ID: Final = b"\xff" * ID_BYTES
#: Records that are read and committed at once: few until it is known that they are small.
_ROWS: Final = 64
_ROWS_MAX: Final = 5000
_BYTES: Final = 4 * 1024 * 1024

#: Called with the records that are copied, and how many there are in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Copied:
    """What a copy has. ``entities`` counts those of each collection, with what is pending;
    ``digests`` are those of R34, of what the server has; ``sequence`` is the newest commit."""

    source: str
    target: str
    sequence: int
    records: int
    entities: dict[str, int]
    digests: dict[str, bytes]


def copy_database(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    online: bool = False,
    on_progress: Progress | None = None,
) -> Copied:
    """Copy the database at ``source`` to ``target``, with its history and everything that is
    pending. Each of them is a directory, or ``postgresql://…#NAME``, the store of that name in
    PostgreSQL. ``source`` is not changed; ``target`` must not exist, and appears when it is
    complete, after each record and each digest was read again and compared.

    The copy is the same database to every device: from then on only one of the two may be served.
    So a source that is written to meanwhile is refused, unless ``online``: then the copy has what
    was there when it began, and what is committed later is not in it.

    Raises ``StorageError`` if ``target`` exists, or either place fails; ``DatabaseLockedError`` if
    ``source`` is written to meanwhile, or another copy to ``target`` is under way; ``FormatError``
    if ``source`` is no database; ``CorruptionError`` for a damaged record; ``ConfigError`` for an
    address without a name. After an error there is nothing at ``target``.
    """
    origin, goal = _checked(source), _checked(target)
    with closing(open_source(origin)) as store, _made_at(goal) as (made, finish):
        copied = copy_store(store, made, shown(origin), shown(goal), on_progress)
        check_still(store, copied, online=online)
        finish()
        return copied[0]


def _checked(place: str | os.PathLike[str]) -> str:
    where = path_text(place)
    if is_address(where) and not split_name(where)[1]:
        raise ConfigError(
            f"{shown(where)} names no store: write {shown(where).rstrip('#')}#NAME for one "
            "database of it"
        )
    return where


def open_source(place: str) -> Storage:
    """The store at ``place``, to read in it."""
    if is_address(place):
        return open_named(place, read_only=True)
    return open_storage(place, create=False, read_only=True)


@contextmanager
def _made_at(place: str) -> Iterator[tuple[Storage, Callable[[], None]]]:
    """An empty store, and what makes it that of ``place``."""
    if is_address(place):
        address, name = split_name(place)
        assert name is not None
        with arriving(address, [name]) as made:
            yield made.store(name), made.finish
        return
    with new_directory(place) as partial, closing(open_storage(partial.path)) as store:

        def finish() -> None:
            store.close()
            finish_directory(partial, place)

        yield store, finish


@contextmanager
def new_directory(place: str) -> Iterator[Partial]:
    """What is to be a directory that is not there. Raises ``StorageError``."""
    where = absolute(place)
    if os.path.lexists(where):
        raise _exists(place)
    try:
        with Partial(where, "copy") as partial:
            yield partial
    except OSError as error:
        raise disk_error(error.errno or errno.EIO, f"writing the copy {where}") from error


def finish_directory(partial: Partial, place: str) -> None:
    if os.path.lexists(absolute(place)):
        raise _exists(place)
    partial.finish()


def _exists(place: str) -> StorageError:
    return StorageError(f"{place} exists already; name a new directory", code="exists")


def copy_store(
    source: Storage,
    target: Storage,
    where: str,
    to: str,
    on_progress: Progress | None = None,
) -> tuple[Copied, int]:
    """Copy one snapshot of ``source`` into the empty ``target`` and compare them; what it has, and
    the mark of the snapshot. ``where`` and ``to`` are for messages."""
    with _view(source, where) as view:
        snapshot = view.snapshot
        total = source.info().records
        digest, records = _copy_rows(snapshot, target, total, on_progress)
        copied = Copied(where, to, view.head.sequence, records, *_digests(view))
        mark = snapshot.mark
    with _view(target, to) as view:
        again = Copied(where, to, view.head.sequence, records, *_digests(view))
        if again != copied or _digest_of(view.snapshot) != digest:
            raise CorruptionError(
                f"the copy at {to} is not what was read from {where}; it was removed. One of the "
                "two places does not keep what it is given"
            )
    return copied, mark


def check_still(source: Storage, copied: tuple[Copied, int], *, online: bool) -> None:
    """Raises ``DatabaseLockedError`` if ``source`` has been written to since it was read."""
    about, mark = copied
    if not online and source.mark() != mark:
        raise DatabaseLockedError(
            f"{about.source} was written to while it was copied, so nothing was made at "
            f"{about.target}: stop what writes to it, or ask for what was there at the beginning "
            "(online)"
        )


@contextmanager
def _view(storage: Storage, where: str) -> Iterator[Writer]:
    """One snapshot of the database in ``storage``, which is not changed by that: also a backup
    stays one (R29)."""
    raw_format, raw_identity, _ = read_identity(storage)
    decode_format(raw_format, where)
    if raw_identity is None:
        raise CorruptionError(f"{where} has no identity record; copy another one")
    role = stored_role(storage)
    database = Database(storage, role=role, create=False, read_only=True, where=where)
    with database.view() as view:
        yield view


def _copy_rows(
    snapshot: Snapshot, target: Storage, total: int, on_progress: Progress | None
) -> tuple[bytes, int]:
    first, spacers = spacers_of(target, SPACED)
    if first:
        target.commit(first)
    digest, done = hashlib.sha256(), 0
    for rows in _rows(snapshot):
        for key, value in rows:
            digest.update(_framed(key, value))
        target.commit({**dict(rows), **spacers})
        spacers = {}
        done += len(rows)
        if on_progress is not None:
            on_progress(done, max(done, total))
    return digest.digest(), done


def _digest_of(snapshot: Snapshot) -> bytes:
    digest = hashlib.sha256()
    for rows in _rows(snapshot):
        for key, value in rows:
            digest.update(_framed(key, value))
    return digest.digest()


def _framed(key: bytes, value: bytes) -> bytes:
    return len(key).to_bytes(2, "big") + key + len(value).to_bytes(4, "big") + value


def _rows(snapshot: Snapshot) -> Iterator[list[tuple[bytes, bytes]]]:
    """All records but those that a store has put between regions for itself."""
    start, limit = b"", _ROWS
    while rows := snapshot.scan(start, _ABOVE_ALL, limit=limit):
        kept = [row for row in rows if not is_spacer(row[0])]
        if kept:
            yield kept
        start = rows[-1][0] + b"\0"
        mean = sum(len(value) for _, value in rows) // len(rows) + 1
        limit = max(1, min(_BYTES // mean, _ROWS_MAX))


def _digests(view: Writer) -> tuple[dict[str, int], dict[str, bytes]]:
    """Of each collection how many entities it has, and the digest of what the server has (R34)."""
    entities, digests = {}, {}
    for name, info in sorted(view.catalogue.by_name.items()):
        entities[name] = unpack_u64(view.snapshot.get(count_key(info.number)) or bytes(8))
        ((_, digests[name]),) = blocks_between(settled(view, info, None), [_LAST_ID])
    return entities, digests


def is_database_at(place: str) -> bool:
    """Whether ``place`` names one database, and no server's."""
    return bool(split_name(place)[1]) if is_address(place) else holds_store(place)


__all__ = ["Copied", "Progress", "copy_database"]
