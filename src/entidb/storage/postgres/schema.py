"""The tables of EntiDB in a PostgreSQL database, and making them.

``entidb_store`` has one row for each store: its name, its mark, and how often it was opened.
``entidb_kv`` has the records of all of them, byte for byte those of a store on LMDB, checksums
included. ``store`` leads its key and no statement touches two stores, so that engines which
distribute tables can distribute by it.
"""

from __future__ import annotations

from typing import Any, Final

import psycopg

from entidb.errors import FormatError, StorageError

#: The newest layout of the tables that this program knows.
FORMAT: Final = 1
#: Names no store: held while the tables are made, and by nobody else.
_MAKING: Final = (0x656E7469, 0)
_OLDEST_SERVER: Final = 130000

_TABLES: Final = f"""
CREATE TABLE entidb_format (format integer NOT NULL);
INSERT INTO entidb_format VALUES ({FORMAT});
CREATE TABLE entidb_barrier (passed bigint NOT NULL);
INSERT INTO entidb_barrier VALUES (0);
CREATE TABLE entidb_store (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL UNIQUE,
    epoch bigint NOT NULL DEFAULT 0,
    mark bigint NOT NULL DEFAULT 0
);
CREATE TABLE entidb_kv (
    store integer NOT NULL,
    k bytea NOT NULL,
    v bytea NOT NULL,
    PRIMARY KEY (store, k)
) PARTITION BY HASH (store);
ALTER TABLE entidb_kv ALTER COLUMN v SET STORAGE EXTERNAL;
DO $$ BEGIN
    FOR n IN 0..15 LOOP
        EXECUTE format(
            'CREATE TABLE entidb_kv_%s PARTITION OF entidb_kv '
            'FOR VALUES WITH (MODULUS 16, REMAINDER %s)', n, n);
    END LOOP;
END $$;
"""

#: Settings without which a commit that was acknowledged may be gone, and what each has to be.
_DURABLE: Final = {
    "fsync": ("on",),
    "full_page_writes": ("on",),
    "synchronous_commit": ("on", "remote_apply"),
}

Connection = psycopg.Connection[tuple[Any, ...]]


def check_server(connection: Connection, where: str) -> None:
    """Raises ``StorageError`` if this server may lose what it has acknowledged."""
    if connection.info.server_version < _OLDEST_SERVER:
        raise StorageError(
            f"{where} is PostgreSQL {connection.info.server_version // 10000}; EntiDB needs "
            f"{_OLDEST_SERVER // 10000} or newer"
        )
    for name, good in _DURABLE.items():
        row = connection.execute("SELECT current_setting(%s)", (name,)).fetchone()
        if row is None or row[0] not in good:
            raise StorageError(
                f"{where} has {name} = {row[0] if row else '?'}, so that a commit which it has "
                f"acknowledged can be lost; set it to {good[0]}"
            )


def make_tables(connection: Connection, where: str) -> None:
    """Make the tables if they are not there. Raises ``FormatError`` for those of a newer
    program."""
    found = _format(connection)
    if found is None:
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", _MAKING)
            found = _format(connection)  # another node may have made them meanwhile
            if found is None:
                connection.execute(_TABLES.encode())
                found = FORMAT
    if found > FORMAT:
        raise FormatError(
            f"{where} has tables of format {found}, made by a newer EntiDB; this one knows up to "
            f"{FORMAT}: upgrade it",
            code="newer_format",
        )


def _format(connection: Connection) -> int | None:
    row = connection.execute("SELECT to_regclass('entidb_format') IS NOT NULL").fetchone()
    if row is None or not row[0]:
        return None
    row = connection.execute("SELECT format FROM entidb_format").fetchone()
    return None if row is None else int(row[0])


__all__ = ["FORMAT", "Connection", "check_server", "make_tables"]
