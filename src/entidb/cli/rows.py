"""Files of rows: NDJSON and CSV, read and written one row at a time in bounded memory.

    NDJSON  one entity a line; a map has its id in the field ``$id``, any other value stands in
            ``$value`` beside it. Exact: what was exported is imported byte for byte.
    CSV     RFC 4180 with a header; an entity is a map of its columns. Types are lost, unless the
            importer is told them.

Which id a row gets, and what is committed when, is ``transfer``'s.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Generator, Iterable
from typing import IO, Any, Final

from entidb.cli.exits import InputError, UsageError
from entidb.cli.values import dump, parse

#: One row: its number in the file (a line, for NDJSON) and what stands in it.
Row = tuple[int, Any]

#: Bytes of a line, characters of a cell: above what one transaction can hold, so a larger one is
#: refused while it is read and not after it has filled the memory.
LINE_BYTES_MAX: Final = 64 << 20
ID_FIELD: Final = "$id"
VALUE_FIELD: Final = "$value"

_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,19})")
_FRACTION: Final = re.compile(
    r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)"
)
_BOOLEANS: Final = {"true": True, "false": False}


# ---------------------------------------------------------------- NDJSON


def read_ndjson(raw: IO[bytes]) -> Generator[Row, None, None]:
    """Every line that is not empty. Raises ``InputError`` with the number of the line."""
    number = 0
    while line := raw.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > LINE_BYTES_MAX:
            raise InputError(f"line {number} is longer than {LINE_BYTES_MAX} bytes")
        if line.isspace():
            continue
        try:
            yield number, parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"line {number} is not UTF-8 at byte {error.start}") from error
        except InputError as error:
            hint = ""
            if number == 1 and line.lstrip()[:1] == b"[":
                hint = "; a JSON array has to become one line for each element first"
            raise InputError(f"line {number}: {error}{hint}", code=error.code) from error


def ndjson_line(entity_id: str, value: Any, id_field: str) -> bytes:
    """The line of one entity. Raises ``InputError`` if the id does not fit in ``id_field``."""
    if type(value) is dict and id_field not in value and list(value) != [VALUE_FIELD]:
        row = {id_field: entity_id, **value}
    elif id_field == ID_FIELD:
        row = {id_field: entity_id, VALUE_FIELD: value}
    else:
        raise InputError(
            f"entity {entity_id} has a field {id_field!r} itself, or is no map of fields: leave "
            "--id-field out"
        )
    return dump(row).encode() + b"\n"


# ---------------------------------------------------------------- CSV


def read_csv(raw: IO[bytes], delimiter: str, types: CellTypes) -> Generator[Row, None, None]:
    """Every record below the header as a map. Raises ``InputError`` with its number."""
    # The module's own bound would refuse what this project's export wrote.
    csv.field_size_limit(LINE_BYTES_MAX)
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
    place = "the header"
    try:
        records = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(records, None)
        if header is None:
            return
        _check_header(header, types)
        place = "row 1"
        for number, cells in enumerate(records, 1):
            if cells:
                place = f"row {number}"
                yield number, types.row(header, cells)
            place = f"row {number + 1}"
    except UnicodeDecodeError as error:
        raise InputError(f"{place}, or near it, is not UTF-8 ({error.reason})") from error
    except csv.Error as error:
        raise InputError(f"{place}: {error}") from error
    except InputError as error:
        raise InputError(f"{place}: {error}", code=error.code) from error
    finally:
        text.detach()  # the stream is its owner's to close


def _check_header(header: list[str], types: CellTypes) -> None:
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"the header names the column {name!r} twice")
    unknown = [name for name in types.named if name not in header]
    if unknown:
        raise UsageError(f"--types names {unknown[0]!r}, the columns are {', '.join(header)}")


class CellTypes:
    """What the cells of a CSV file mean. ``named`` maps columns to one of ``TYPES``; the others
    are text, or with ``infer`` what they look like."""

    def __init__(self, named: dict[str, str], *, infer: bool = False) -> None:
        self.named = named
        self._default: Callable[[str], Any] = infer_cell if infer else str

    def row(self, header: list[str], cells: list[str]) -> dict[str, Any]:
        if len(cells) != len(header):
            raise InputError(f"it has {len(cells)} cells, the header {len(header)}")
        made: dict[str, Any] = {}
        for name, cell in zip(header, cells, strict=True):
            kind = self.named.get(name)
            try:
                value = self._default(cell) if kind is None else _typed(kind, cell)
            except ValueError as error:
                raise InputError(f"column {name!r}: {cell!r:.60} is no {kind}") from error
            if value is not _MISSING:
                made[name] = value
        return made


#: An empty cell of anything but text: the field is left out.
_MISSING: Final = object()


def _typed(kind: str, cell: str) -> Any:
    return cell if kind == "text" else _MISSING if cell == "" else TYPES[kind](cell)


def infer_cell(cell: str) -> Any:
    """What ``cell`` looks like: whole number, number, true or false, JSON map or list, nothing,
    or else text. Leading zeros are text: telephone numbers and postal codes are not numbers."""
    if cell == "":
        return _MISSING
    if cell in _BOOLEANS:
        return _BOOLEANS[cell]
    number = _inferred_number(cell)
    if number is not None:
        return number
    if cell[0] in "{[":
        try:
            return parse(cell)
        except InputError:
            return cell
    return cell


def _inferred_number(cell: str) -> int | float | None:
    """The number that ``cell`` spells exactly; None for -0, and for what would be rounded away."""
    if _INTEGER.fullmatch(cell):
        whole = int(cell)
        return whole if -(2**64) <= whole < 2**64 and cell != "-0" else None
    if _FRACTION.fullmatch(cell):
        number = float(cell)
        return number if math.isfinite(number) and (number or cell[0] != "-") else None
    return None


def _boolean(cell: str) -> bool:
    try:
        return _BOOLEANS[cell.lower()]
    except KeyError:
        raise ValueError(cell) from None


def _float(cell: str) -> float:
    number = float(cell)
    if not math.isfinite(number):
        raise ValueError(cell)
    return number


#: Names that ``--types`` knows.
TYPES: Final[dict[str, Callable[[str], Any]]] = {
    "text": str,
    "int": int,
    "float": _float,
    "bool": _boolean,
    "json": parse,
}


def parse_types(given: str | None) -> dict[str, str]:
    """``"age=int,born=text"`` as a map. Raises ``UsageError``."""
    found: dict[str, str] = {}
    for part in filter(None, (given or "").split(",")):
        name, equals, kind = part.rpartition("=")
        if not equals or kind not in TYPES:
            raise UsageError(
                f"--types wants COLUMN=TYPE,… with a type of {', '.join(TYPES)}, not {part!r}"
            )
        found[name] = kind
    return found


class CsvWriter:
    """Writes records below a header, which is written at once."""

    def __init__(self, raw: IO[bytes], columns: list[str], delimiter: str) -> None:
        self._raw = raw
        self._columns = columns
        self._buffer = io.StringIO()
        self._writer = csv.writer(self._buffer, delimiter=delimiter, lineterminator="\n")
        self._write(columns)

    def add(self, row: dict[str, Any]) -> None:
        self._write([cell_text(row.get(name)) for name in self._columns])

    def _write(self, cells: Iterable[str]) -> None:
        self._writer.writerow(cells)
        self._raw.write(self._buffer.getvalue().encode())
        self._buffer.seek(0)
        self._buffer.truncate()


def cell_text(value: Any) -> str:
    """A value as a cell: text as it is, null and what is not there empty, all else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else dump(value)


def key_text(value: Any) -> str:
    """A key field as text: a text itself, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
