"""Files of rows: NDJSON and CSV, read and written one row at a time in bounded memory.

    NDJSON  one entity a line; a map has its id in the field ``$id``, any other value is in
            ``$value`` beside it. Exact: what was exported is imported byte for byte.
    CSV     RFC 4180 with a header; an entity is a map of its columns. Types are lost, unless the
            caller names them. What the importer infers it would write back as it was read.

Which id a row gets, and what is committed when, is ``transfer``'s.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any, Final, NoReturn

from entidb import cbor
from entidb.cli.exits import InputError, UsageError
from entidb.cli.no_table import check_start
from entidb.cli.output import plural
from entidb.cli.values import LINE_BYTES_MAX, parse, twice_in
from entidb.db.json_values import dump
from entidb.errors import CborEncodeError

#: One row: its number in the file (a line, for NDJSON), its content, and the texts of its key,
#: where it has one.
Row = tuple[int, Any, list[str] | None]
#: Called with what is wrong with a row, which is then left out; it may raise it.
Bad = Callable[[InputError], None]

#: A byte order mark, where the name of the encoding does not take it away.
_MARK: Final = "\ufeff"
ID_FIELD: Final = "$id"
VALUE_FIELD: Final = "$value"

_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,19})")
_FRACTION: Final = re.compile(
    r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)"
)
_BOOLEANS: Final = {"true": True, "false": False}


def refuse(error: InputError) -> NoReturn:
    """The ``Bad`` that ends the reading."""
    raise error


def check_encoding(name: str) -> str:
    """``name`` of an encoding as Python knows it; UTF-8 may begin with a mark. Raises
    ``UsageError``."""
    try:
        found = codecs.lookup(name).name
        # Some are from bytes to bytes, or refuse everything.
        io.TextIOWrapper(io.BytesIO(), encoding=found).read()
    except (LookupError, ValueError):
        raise UsageError(
            f"--encoding {name!r:.60} is unknown; known are utf-8, utf-16, cp1252, latin-1 …"
        ) from None
    return "utf-8-sig" if found == "utf-8" else found


# ---------------------------------------------------------------- NDJSON


def read_ndjson(
    raw: IO[bytes], *, encoding: str = "utf-8-sig", key: list[str] | None = None, bad: Bad = refuse
) -> Generator[Row, None, None]:
    """Every line that is not empty. What is wrong with a line goes to ``bad``, with its number."""
    if encoding == "utf-8-sig":
        check_start(raw)
    for number, line in enumerate(_lines(raw, encoding), 1):
        if number == 1 and isinstance(line, str):
            line = line.removeprefix(_MARK)
        try:
            if len(line) > LINE_BYTES_MAX:
                raise _TooLong(f"line {number} is longer than {LINE_BYTES_MAX} bytes")
            if not line.isspace():
                value = parse(_text_of(line, number))
                if number == 1 and type(value) is list and dict in map(type, value):
                    # A whole table as one entity is a mistake.
                    raise InputError("it is a JSON array of maps")
                yield number, value, None if key is None else _key_of(value, key)
        except _TooLong:
            raise
        except InputError as error:
            hint = ""
            if number == 1 and line.lstrip()[:1] in (b"[", "["):
                hint = (
                    "; a JSON array has to become one line for each element first (`jq -c '.[]'`)"
                )
            elif number == 1 and line.strip() in (b"{", "{"):
                hint = "; an entity has to be on one line (`jq -c .`)"
            place = "" if str(error).startswith(f"line {number}") else f"line {number}: "
            bad(InputError(f"{place}{error}{hint}", code=error.code))


class _TooLong(InputError):
    """A line without an end within the bound. The reading cannot go on behind it."""


def _lines(raw: IO[bytes], encoding: str) -> Iterator[bytes | str]:
    if encoding == "utf-8-sig":
        # Bytes, so that one bad line is one bad line.
        while line := raw.readline(LINE_BYTES_MAX + 1):
            yield line
        return
    text = io.TextIOWrapper(raw, encoding=encoding)
    try:
        while decoded := text.readline(LINE_BYTES_MAX + 1):
            yield decoded
    except UnicodeError as error:
        raise InputError(
            f"the file is not {encoding} ({_reason(error)}); see --encoding"
        ) from error
    finally:
        text.detach()


def _text_of(line: bytes | str, number: int) -> str:
    if isinstance(line, str):
        return line
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise InputError(f"line {number} is not UTF-8 at byte {at}; see --encoding") from error


def _reason(error: UnicodeError) -> str:
    return getattr(error, "reason", None) or str(error)


def _key_of(value: Any, names: list[str]) -> list[str]:
    """The texts of the fields that make a row's key. Raises ``InputError``."""
    if type(value) is not dict:
        raise InputError("it is no map of fields, so it has no field of --key")
    for name in names:
        if name not in value:
            there = ", ".join(map(repr, list(value)[:20])) or "none"
            raise InputError(f"it has no field {name!r}, which --key names; its fields: {there}")
        if value[name] in (None, ""):
            raise InputError(f"its field {name!r}, which --key names, is empty")
    return [key_text(value[name]) for name in names]


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

#: What may be between cells, if no option names it.
_DELIMITERS: Final = (",", ";", "\t", "|")


@dataclass(frozen=True)
class CsvFormat:
    """How a CSV file is read. ``delimiter`` None: no option names it; then it is a comma, unless
    the header suggests another. ``columns`` are those that an option names, with its name."""

    types: CellTypes
    delimiter: str | None = None
    usual: str = ","
    encoding: str = "utf-8-sig"
    key: list[str] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    #: Called with the names of all columns, in order.
    on_header: Callable[[list[str]], object] = list


def read_csv(raw: IO[bytes], form: CsvFormat, *, bad: Bad = refuse) -> Generator[Row, None, None]:
    """Every record below the header as a map. What is wrong with one goes to ``bad``, with its
    number; ``InputError`` and ``UsageError`` are about the whole file."""
    # The module's own bound would refuse what this project's export wrote.
    csv.field_size_limit(LINE_BYTES_MAX)
    utf8 = form.encoding == "utf-8-sig"
    if utf8:
        check_start(raw)
    # Bytes that are no UTF-8 become lone surrogates, and so the error of their row alone.
    errors = "surrogateescape" if utf8 else "strict"
    text = io.TextIOWrapper(raw, encoding=form.encoding, errors=errors, newline="")
    place, number = "the header", 0
    try:
        first = text.readline(LINE_BYTES_MAX).removeprefix(_MARK)
        delimiter = form.delimiter or _delimiter_of(first, form.usual)
        records = csv.reader(
            chain([first] if first else (), text), delimiter=delimiter, strict=True
        )
        header = next(records, None)
        if header is None:
            return
        _check_text(header, utf8)
        _check_header(header, form)
        form.on_header(header)
        keys = None if form.key is None else [header.index(name) for name in form.key]
        while True:
            number += 1
            place = f"row {number}"
            try:
                cells = next(records, None)
                if cells is None:
                    return
                if cells:
                    _check_text(cells, utf8)
                    value = form.types.row(header, cells)
                    key = (
                        None
                        if keys is None
                        else _key_cells(header, cells, keys, form.types.missing)
                    )
                    yield number, value, key
            except csv.Error as error:
                bad(InputError(f"{place}: {_csv_words(error)}"))
            except InputError as error:
                bad(InputError(f"{place}: {error}", code=error.code))
    except UnicodeError as error:
        what = f"is not {form.encoding} ({_reason(error)}); see --encoding"
        raise InputError(f"{place}, or near it, {what}") from error
    except csv.Error as error:
        raise InputError(f"{place}: {_csv_words(error)}") from error
    except InputError as error:
        raise InputError(
            str(error) if str(error).startswith(place) else f"{place}: {error}", code=error.code
        ) from error
    finally:
        text.detach()  # the stream is its owner's to close


def _csv_words(error: csv.Error) -> str:
    said = str(error)
    if said == "unexpected end of data":
        return (
            "a quotation mark opens a cell and none closes it, so that the rest of the file is "
            "taken for that cell"
        )
    if said.endswith("expected after '\"'"):
        return f"{said}: a quotation mark inside a cell is written twice"
    return said


def _delimiter_of(first: str, usual: str) -> str:
    """``usual``, if it makes the most columns of the header. Raises ``UsageError``."""
    counts = {
        each: len(next(csv.reader([first], delimiter=each), [])) for each in {usual, *_DELIMITERS}
    }
    best = max(counts, key=lambda each: (counts[each], each == usual))
    if best != usual:
        shown = "tab" if best == "\t" else best
        this = "tab" if usual == "\t" else usual
        raise UsageError(
            f"the header has {plural(counts[usual], 'column')} if {this!r} is between them, "
            f"and {counts[best]} if {shown!r} is: give --delimiter {shown!r} (or {this!r})"
        )
    return usual


def _check_text(cells: list[str], utf8: bool) -> None:
    joined = "".join(cells)
    if not utf8 or joined.isascii():
        return
    try:
        joined.encode()
    except UnicodeEncodeError:
        raise InputError("it is not UTF-8; give its --encoding, such as cp1252") from None


def _check_header(header: list[str], form: CsvFormat) -> None:
    if (twice := twice_in(header)) is not None:
        raise InputError(f"the header names the column {twice!r} twice")
    wanted = {**dict.fromkeys(form.types.named, "--types"), **form.columns}
    for name, option in wanted.items():
        if name not in header:
            columns = ", ".join(header[:50])
            raise UsageError(f"{option} names {name!r}, the columns are {columns}")


def _key_cells(
    header: list[str], cells: list[str], keys: list[int], missing: frozenset[str]
) -> list[str]:
    for at in keys:
        if not cells[at]:
            raise InputError(f"its cell {header[at]!r}, which --key names, is empty")
        if cells[at] in missing:
            raise InputError(
                f"its cell {header[at]!r}, which --key names, is {cells[at]!r}, which --na "
                "declares to be nothing"
            )
    return [cells[at] for at in keys]


class CellTypes:
    """What the cells of a CSV file mean. ``named`` maps columns to one of ``TYPES``; the others
    are text, or with ``infer`` what they look like. Cells that are one of ``missing`` leave the
    field out."""

    def __init__(
        self, named: dict[str, str], *, infer: bool = False, missing: frozenset[str] = frozenset()
    ) -> None:
        self.named = named
        self.missing = missing
        self._default: Callable[[str], Any] = infer_cell if infer else str

    def row(self, header: list[str], cells: list[str]) -> dict[str, Any]:
        if len(cells) != len(header):
            raise InputError(f"it has {plural(len(cells), 'cell')}, the header {len(header)}")
        made: dict[str, Any] = {}
        for name, cell in zip(header, cells, strict=True):
            if cell in self.missing:
                continue
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
    """What ``cell`` looks like: whole number, number, true or false, JSON map or list, nothing, or
    else text. Only what ``cell_text`` would write back as it was read counts: ``007``, ``1.10``,
    ``1E4`` and ``True`` are text."""
    if cell == "":
        return _MISSING
    if cell in _BOOLEANS:
        return _BOOLEANS[cell]
    if cell[0] in "{[":
        return _inferred_json(cell)
    number = _inferred_number(cell)
    return cell if number is None or cell_text(number) != cell else number


def _inferred_json(cell: str) -> Any:
    try:
        value = parse(cell)
        # As it comes back: a map's keys are in another order then.
        return value if cell_text(cbor.decode(cbor.encode(value))) == cell else cell
    except (InputError, CborEncodeError):
        return cell


def _inferred_number(cell: str) -> int | float | None:
    """The number that ``cell`` spells; None if it is none that can be stored."""
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


def _int(cell: str) -> int:
    return int(_plain(cell))


def _plain(cell: str) -> str:
    """A number of a table. Raises ``ValueError`` for ``1_0``, which is 10 in Python alone."""
    if "_" in cell:
        raise ValueError(cell)
    return cell


def _float(cell: str) -> float:
    number = float(_plain(cell))
    if not math.isfinite(number):
        raise ValueError(cell)
    return number


#: Names that ``--types`` knows.
TYPES: Final[dict[str, Callable[[str], Any]]] = {
    "text": str,
    "int": _int,
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
        if found.setdefault(name, kind) != kind:
            raise UsageError(f"--types names {name!r} twice: once {found[name]}, once {kind}")
    return found


class CsvWriter:
    """Writes records below a header; ``flush`` writes what is waiting."""

    def __init__(self, raw: IO[bytes], columns: list[str], delimiter: str) -> None:
        self._raw = raw
        self._buffer = io.StringIO()
        self._plain = csv.writer(self._buffer, delimiter=delimiter, lineterminator="\n").writerow
        self._quoted = csv.writer(
            self._buffer, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL
        ).writerow
        self._columns = columns
        #: Columns that no row has had.
        self.empty = set(columns[1:])
        self._add(columns)

    def add(self, entity_id: str, row: dict[str, Any]) -> None:
        """A record: the id, and the fields of ``row`` that have a column."""
        get = row.get
        if self.empty:
            self.empty.difference_update(row)
        self._add([entity_id, *[cell_text(get(name)) for name in self._columns[1:]]])
        if self._buffer.tell() > _BUFFER_CHARACTERS:
            self.flush()

    def _add(self, cells: list[str]) -> None:
        """A carriage return ends a row for who reads it, and Python before 3.13 does not quote
        it."""
        (self._quoted if "\r" in "".join(cells) else self._plain)(cells)

    def flush(self) -> None:
        self._raw.write(self._buffer.getvalue().encode())
        self._buffer.seek(0)
        self._buffer.truncate()


_BUFFER_CHARACTERS: Final = 64 << 10


def cell_text(value: Any) -> str:
    """A value as a cell: text as it is, null and what is not there empty, all else as JSON."""
    kind = type(value)
    if kind is str:
        return value  # type: ignore[no-any-return]
    if value is None:
        return ""
    if kind is int or kind is float:
        return repr(value)
    if kind is bool:
        return "true" if value else "false"
    return dump(value)


def key_text(value: Any) -> str:
    """A key field as text: a text itself, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
