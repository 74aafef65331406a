"""Files that people take for tables and that are none: what they begin with, and what to do."""

from __future__ import annotations

from typing import IO, Final

from entidb.cli.exits import InputError

#: What files begin with that are often taken for tables, and what to do with one.
_FOREIGN: Final = {
    b"PK\x03\x04": "a zip archive, as .xlsx and .ods are: save the table as CSV",
    b"\xd0\xcf\x11\xe0": "a workbook of Excel: save the table as CSV",
    b"\x1f\x8b": "packed with gzip: unpack it first",
    b"PAR1": "a Parquet file: write it as CSV or NDJSON",
    b"SQLite format 3\0": "an SQLite database: write the table as CSV",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it first",
    b"BZh": "packed with bzip2: unpack it first",
    b"\xfd7zXZ\0": "packed with xz: unpack it first",
    b"%PDF-": "a PDF document: save the table in it as CSV",
    b"\xff\xfe\0\0": "UTF-32: give --encoding utf-32",
    b"\0\0\xfe\xff": "UTF-32: give --encoding utf-32",
    b"\xff\xfe": "UTF-16: give --encoding utf-16",
    b"\xfe\xff": "UTF-16: give --encoding utf-16",
}
#: Bytes at the beginning of a file.
_LOOKED_AT: Final = 64
#: Control characters that tables in text do not have.
_NO_TEXT: Final = frozenset({*range(9), *range(14, 27), *range(28, 32)})


def check_start(raw: IO[bytes]) -> None:
    """Raises ``InputError`` for files that are no text in UTF-8, though their bytes may be. Nothing
    is read of ``raw``."""
    start = _start_of(raw)
    for mark, what in _FOREIGN.items():
        if start.startswith(mark):
            raise InputError(f"the file is {what}")
    marked = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if marked.startswith((b"<?xml", b"<!doctype", b"<html")):
        raise InputError("the file is XML or HTML: write the table in it as CSV")
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):  # without a mark
        halves = start[first::2]
        if halves.count(0) * 2 > len(halves) > 1 and not start[1 - first :: 2].count(0):
            raise InputError(f"the file looks like UTF-16: give --encoding {name}")
    if len(set(start) & _NO_TEXT) > 1:
        # One alone may stand in a cell; no encoding makes a table of several.
        raise InputError("the file is no text: save the table in it as CSV")


def _start_of(raw: IO[bytes]) -> bytes:
    peek = getattr(raw, "peek", None)
    if peek is not None:
        found: bytes = peek(_LOOKED_AT)
        return found[:_LOOKED_AT]
    if not raw.seekable():
        return b""
    at = raw.tell()
    start = raw.read(_LOOKED_AT)
    raw.seek(at)
    return start


__all__ = ["check_start"]
