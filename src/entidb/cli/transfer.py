"""``import`` and ``export``: whole collections as files, in bounded memory.

An import commits a transaction for each so many rows: what was committed when it stops stays, and
the message says how to go on. An export is one snapshot. Formats are in ``rows``.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import click

from entidb import cbor
from entidb.cli.exits import InputError, NotFoundError, UsageError
from entidb.cli.output import Bar, note, plural, progress, say
from entidb.cli.rows import (
    ID_FIELD,
    VALUE_FIELD,
    CellTypes,
    CsvWriter,
    Row,
    key_text,
    ndjson_line,
    parse_types,
    read_csv,
    read_ndjson,
)
from entidb.cli.values import print_json
from entidb.cli.words import bind, existing_collection, json_option, key_id, opened, parse_uuid
from entidb.cli.words import words as positional
from entidb.db import Database
from entidb.db.collection import ReadCollection
from entidb.errors import CborEncodeError, StorageError
from entidb.storage.partial import Partial, remove_dead

#: Rows of one transaction. Group commit on the server and sync batches like them of this size.
BATCH_ROWS: Final = 1000
#: Payload bytes after which a transaction is committed with fewer rows: far below what one may
#: hold, and little memory.
BATCH_BYTES: Final = 4 << 20
FORMATS: Final = ("ndjson", "csv")

format_option = click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="What the file is; by default what its name ends with, else ndjson.",
)
delimiter_option = click.option(
    "--delimiter", default=",", show_default=True, help="Between the cells of a CSV row."
)


# ---------------------------------------------------------------- import


@click.command("import")
@positional("COLLECTION FILE")
@format_option
@click.option("--id-field", metavar="NAME", help=f"The field that holds the id [{ID_FIELD}].")
@click.option("--key", metavar="FIELD[,FIELD]", help="Make ids from these fields: the same row "
              "gets the same id on every device, and importing again changes nothing.")  # fmt: skip
@click.option("--types", metavar="COLUMN=TYPE,…", help="Types of CSV columns: text, int, float, "
              "bool, json.")  # fmt: skip
@click.option("--infer", is_flag=True, help="Guess the types of CSV cells. Off: all is text.")
@click.option("--batch", default=BATCH_ROWS, show_default=True, help="Rows in a transaction.")
@click.option("--skip", default=0, help="Leave out so many rows at the beginning.")
@delimiter_option
@json_option
def import_command(
    words: tuple[str, ...],
    directory: str | None,
    kind: str | None,
    id_field: str | None,
    key: str | None,
    types: str | None,
    infer: bool,
    batch: int,
    skip: int,
    delimiter: str,
    as_json: bool,
) -> None:
    """Read the rows of a file into a collection.

    FILE (- for standard input) is NDJSON, one entity a line, or CSV with a header. Rows are
    committed 1000 at a time. An id comes from the field $id (which export writes), from
    --id-field, from --key, or is new.
    """
    bound = bind(words, directory, "COLLECTION", "FILE")
    if key and id_field:
        raise UsageError("--key and --id-field are two ways to get an id: give one of them")
    if batch < 1 or skip < 0:
        raise UsageError("--batch is 1 or more, --skip 0 or more")
    chosen = _format_of(kind, bound["FILE"])
    if chosen != "csv" and (types or infer):
        raise UsageError("--types and --infer are for CSV; JSON says what type a value has")
    cells = CellTypes(parse_types(types), infer=infer)
    with opened(bound.path) as database, _source(bound["FILE"]) as (raw, size):
        rows = _rows_of(raw, chosen, _one_character(delimiter), cells)
        name = bound["COLLECTION"]
        id_of = _by_key(name, key.split(",")) if key else _by_field(database, id_field)
        with progress("importing", size, unit="bytes") as bar:
            job = Import(database, name, id_of, batch, lambda: _show(bar, raw, size))
            with closing(rows):
                job.run(rows, skip, "standard input" if bound["FILE"] == "-" else bound["FILE"])
    if as_json:
        print_json({"collection": name, **job.counts()})
    else:
        say(job.summary())


def _format_of(kind: str | None, file: str | None) -> str:
    if kind is not None:
        return kind
    return "csv" if (file or "").lower().endswith((".csv", ".tsv")) else "ndjson"


def _one_character(delimiter: str) -> str:
    delimiter = "\t" if delimiter in ("\\t", "tab") else delimiter
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UsageError("--delimiter is one character, or `tab`")
    return delimiter


@contextmanager
def _source(file: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """The file and its size in bytes, None where nobody knows."""
    if file == "-":
        yield sys.stdin.buffer, None
        return
    try:
        raw = open(file, "rb")  # noqa: SIM115 -- closed below; only opening may fail so
    except OSError as error:
        raise NotFoundError(f"cannot read {file}: {error.strerror}", code="no_file") from error
    with raw:
        yield raw, os.fstat(raw.fileno()).st_size


def _rows_of(
    raw: IO[bytes], kind: str, delimiter: str, types: CellTypes
) -> Generator[Row, None, None]:
    return read_csv(raw, delimiter, types) if kind == "csv" else read_ndjson(raw)


def _show(bar: Bar, raw: IO[bytes], size: int | None) -> None:
    if size is not None:
        bar.reach(raw.tell())


#: From what stands in a row to the id and the value of its entity.
IdOf = Callable[[Any], tuple[uuid.UUID, Any]]


def _by_field(database: Database, chosen: str | None) -> IdOf:
    """The id stands in a field of the row, which is not part of the value. The default field may
    be missing; then the id is new."""
    name = chosen or ID_FIELD

    def id_of(row: Any) -> tuple[uuid.UUID, Any]:
        if type(row) is not dict or name not in row:
            if chosen is None:
                return database.new_id(), row
            raise InputError(f"it has no field {name!r}, which --id-field names")
        rest = {field: value for field, value in row.items() if field != name}
        if chosen is None and list(rest) == [VALUE_FIELD]:
            return parse_uuid(row[name]), rest[VALUE_FIELD]
        return parse_uuid(row[name]), rest

    return id_of


def _by_key(collection: str, fields: list[str]) -> IdOf:
    def id_of(row: Any) -> tuple[uuid.UUID, Any]:
        if type(row) is not dict or any(row.get(name) in (None, "") for name in fields):
            raise InputError(f"one of the --key fields {', '.join(fields)} is missing or empty")
        parts = [key_text(row[name]) for name in fields]
        return key_id(collection, parts[0] if len(parts) == 1 else key_text(parts)), row

    return id_of


@dataclass
class Import:
    """Rows on their way into a collection. Counts are of committed rows."""

    database: Database
    collection: str
    id_of: IdOf
    batch: int
    committed: Callable[[], None]
    new: int = 0
    replaced: int = 0
    unchanged: int = 0
    transactions: int = 0
    _waiting: list[tuple[uuid.UUID, Any, bytes]] = field(default_factory=list)
    _bytes: int = 0

    @property
    def rows(self) -> int:
        return self.new + self.replaced + self.unchanged

    def run(self, rows: Iterator[Row], skip: int, source: str) -> None:
        """Everything. Raises ``InputError`` at the first row that cannot be stored."""
        place, seen = 0, 0
        try:
            for row in rows:
                place, seen = row[0], seen + 1
                if seen > skip:
                    self._add(row[1])
        except (InputError, CborEncodeError) as error:
            placed = str(error).startswith(("line ", "row ", "the header"))
            raise InputError(
                f"{source}: {error if placed else f'row {place}: {error}'}; {self._how_far(skip)}",
                code=error.code,
            ) from error
        self._commit()

    def _how_far(self, skip: int) -> str:
        if not self.rows:
            return "nothing was committed"
        return (
            f"{plural(self.rows, 'row')} before it are committed: correct it and go on with "
            f"--skip {skip + self.rows}"
        )

    def _add(self, row: Any) -> None:
        entity_id, value = self.id_of(row)
        if value is None:
            raise InputError("null cannot be an entity")
        payload = cbor.encode(value)
        self._waiting.append((entity_id, value, payload))
        self._bytes += len(payload)
        if len(self._waiting) >= self.batch or self._bytes >= BATCH_BYTES:
            self._commit()

    def _commit(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if not waiting:
            return
        new = replaced = unchanged = 0
        with self.database.transaction() as tx:
            collection = tx.collection(self.collection)
            there = collection.get_many({entity_id for entity_id, _, _ in waiting})
            known = {entity_id: cbor.encode(value) for entity_id, value in there.items()}
            for entity_id, value, payload in waiting:
                before = known.get(entity_id)
                if before == payload:
                    unchanged += 1
                    continue
                replaced += before is not None
                new += before is None
                collection[entity_id] = value
                known[entity_id] = payload
        self.new += new
        self.replaced += replaced
        self.unchanged += unchanged
        self.transactions += bool(tx.sequence)
        self.committed()

    def counts(self) -> dict[str, int]:
        return {
            "rows": self.rows,
            "new": self.new,
            "replaced": self.replaced,
            "unchanged": self.unchanged,
            "transactions": self.transactions,
        }

    def summary(self) -> str:
        return (
            f"imported {plural(self.rows, 'row')} into {self.collection}: {self.new:,} new, "
            f"{self.replaced:,} replaced, {self.unchanged:,} unchanged, "
            f"in {plural(self.transactions, 'transaction')}"
        )


# ---------------------------------------------------------------- export


@click.command("export")
@positional("COLLECTION")
@click.option("--output", "-o", metavar="FILE", help="Where to; by default standard output. An "
              "existing file is replaced when the export is complete.")  # fmt: skip
@format_option
@click.option("--id-field", default=ID_FIELD, show_default=True, help="The field for the id.")
@click.option("--fields", metavar="NAME,…", help="CSV columns; by default all there are.")
@delimiter_option
@json_option
def export_command(
    words: tuple[str, ...],
    directory: str | None,
    output: str | None,
    kind: str | None,
    id_field: str,
    fields: str | None,
    delimiter: str,
    as_json: bool,
) -> None:
    """Write a collection as NDJSON or CSV.

    In order of the ids, from one snapshot. NDJSON is exact: `import` makes the same entities
    again. CSV has no types: see docs/cli.md.
    """
    bound = bind(words, directory, "COLLECTION")
    chosen = _format_of(kind, output)
    if as_json and output in (None, "-"):
        raise UsageError("--json is about the summary; give --output for the rows")
    with opened(bound.path) as database:
        collection = existing_collection(database, bound["COLLECTION"])
        with database.snapshot() as snapshot:
            source = snapshot.collection(collection.name)
            with _target(output) as raw, progress("exporting", len(source)) as bar:
                if chosen == "csv":
                    columns = None if fields is None else fields.split(",")
                    count = _export_csv(
                        source, raw, id_field, columns, _one_character(delimiter), bar
                    )
                else:
                    count = _export_ndjson(source, raw, id_field, bar)
    if as_json:
        print_json({"collection": collection.name, "rows": count, "output": output})
    elif output not in (None, "-"):
        note(f"exported {plural(count, 'row')} to {output}")


@contextmanager
def _target(output: str | None) -> Iterator[IO[bytes]]:
    """Where to write; a file appears when it is complete, or not at all."""
    if output in (None, "-"):
        yield sys.stdout.buffer
        return
    assert output is not None
    path = Path(output)
    if path.exists() and not path.is_file():
        with path.open("wb") as raw:  # a pipe or a device
            yield raw
        return
    where = os.path.abspath(output)
    remove_dead(os.path.dirname(where))
    with _begin_file(where) as partial:
        with open(partial.path, "wb") as raw:
            yield raw
        partial.finish()


def _begin_file(where: str) -> Partial:
    try:
        return Partial(where, "export")
    except OSError as error:
        raise StorageError(
            f"cannot write {where}: {error.strerror}; name a file in a directory that is there and "
            "that you may write to"
        ) from error


_SHOW_EVERY: Final = 1000


def _export_ndjson(source: ReadCollection[Any], raw: IO[bytes], id_field: str, bar: Bar) -> int:
    count = 0
    for entity_id, value in source.items():
        raw.write(ndjson_line(str(entity_id), value, id_field))
        count += 1
        if count % _SHOW_EVERY == 0:
            bar.reach(count)
    return count


def _export_csv(
    source: ReadCollection[Any],
    raw: IO[bytes],
    id_field: str,
    columns: list[str] | None,
    delimiter: str,
    bar: Bar,
) -> int:
    names = _all_fields(source, id_field) if columns is None else columns
    writer = CsvWriter(raw, [id_field, *names], delimiter)
    count = 0
    for entity_id, value in source.items():
        writer.add({**_map_of(entity_id, value), id_field: str(entity_id)})
        count += 1
        if count % _SHOW_EVERY == 0:
            bar.reach(count)
    return count


def _all_fields(source: ReadCollection[Any], id_field: str) -> list[str]:
    """A first walk over everything: the header stands before the last row is known."""
    found: dict[str, None] = {}
    for entity_id, value in source.items():
        found.update(dict.fromkeys(_map_of(entity_id, value)))
    if id_field in found:
        raise UsageError(
            f"entities have a field {id_field!r} themselves: choose another --id-field"
        )
    return list(found)


def _map_of(entity_id: uuid.UUID, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise InputError(f"entity {entity_id} is no map of fields, so no CSV row: use ndjson")
    return value
