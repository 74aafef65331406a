"""``import`` and ``export``: whole collections as files, in bounded memory.

An import commits a transaction for every few rows: what was committed when it stops stays, and the
message says how to go on. An export is one snapshot. ``rows`` has the formats, ``loading`` what an
import does with rows.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import IO, Any, Final

import click

from entidb import cbor
from entidb.cli.exits import InputError, UsageError
from entidb.cli.loading import Import, by_field, by_key
from entidb.cli.output import Bar, note, one_line, plural, progress, say
from entidb.cli.rows import (
    ID_FIELD,
    Bad,
    CellTypes,
    CsvFormat,
    CsvWriter,
    Row,
    check_encoding,
    ndjson_line,
    parse_types,
    read_csv,
    read_ndjson,
)
from entidb.cli.values import print_json, twice_in, unreadable
from entidb.cli.words import (
    bind,
    check_text,
    existing_collection,
    is_database,
    json_option,
    not_empty,
    opened,
    opened_or_made,
)
from entidb.cli.words import words as positional
from entidb.db import Database
from entidb.db.collection import ReadCollection
from entidb.db.columns import column_order
from entidb.errors import StorageError
from entidb.storage.disk_errors import disk_error, is_about_place
from entidb.storage.partial import Partial, remove_dead
from entidb.types import check_name

#: Rows of one transaction. Group commit on the server and sync batches like them of this size.
BATCH_ROWS: Final = 1000
FORMATS: Final = ("ndjson", "csv")

format_option = click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="What the file is; by default what its name ends with, else ndjson.",
)
delimiter_option = click.option(
    "--delimiter", metavar="C", help="Between the cells of a CSV row: `tab`, or one character; by "
    "default a comma, and in a .tsv file a tab."
)  # fmt: skip


# ---------------------------------------------------------------- import


@click.command("import")
@positional("COLLECTION FILE")
@format_option
@click.option("--id-field", metavar="NAME", help=f"The field that holds the id [{ID_FIELD}].")
@click.option("--key", metavar="FIELD[,FIELD]", help="Make ids from these fields: the same row "
              "gets the same id on every device, and importing again changes nothing.")  # fmt: skip
@click.option("--types", metavar="COLUMN=TYPE,…", help="Types of CSV columns: text, int, float, "
              "bool, json.")  # fmt: skip
@click.option("--infer", is_flag=True, help="Guess the types of CSV cells, where export would "
              "write them back as they are. Off: all is text.")  # fmt: skip
@click.option("--na", "missing", multiple=True, metavar="TEXT", help="A CSV cell that says there "
              "is nothing, such as NA; its field is left out.")  # fmt: skip
@click.option("--encoding", default="utf-8", show_default=True, help="How the file is written: "
              "utf-16, cp1252, latin-1 …")  # fmt: skip
@click.option("--batch", default=BATCH_ROWS, show_default=True, help="Rows in a transaction.")
@click.option("--skip", default=0, help="Leave out this many rows at the beginning.")
@click.option("--skip-bad", is_flag=True, help="Leave out rows that cannot be stored, and count "
              "them.")  # fmt: skip
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
    missing: tuple[str, ...],
    encoding: str,
    batch: int,
    skip: int,
    skip_bad: bool,
    delimiter: str | None,
    as_json: bool,
) -> None:
    """Read the rows of a file into a collection.

    FILE (- for standard input) is NDJSON, one entity a line, or CSV with a header. Rows are
    committed 1000 at a time. An id comes from the field $id (which export writes), from
    --id-field, from --key, or is new. A database is made where there is none.
    """
    bound = bind(words, directory, "COLLECTION", "FILE")
    if key and id_field:
        raise UsageError("--key and --id-field are two ways to get an id: give one of them")
    if batch < 1 or skip < 0:
        raise UsageError("--batch is 1 or more, --skip 0 or more")
    for option, given in (("--key", key), ("--id-field", id_field)):
        if given == "":
            raise UsageError(f"{option} is empty: name a field, or leave it out")
    file, name = not_empty("FILE", bound["FILE"]), check_name(bound["COLLECTION"])
    chosen = _format_of(kind, file)
    if chosen != "csv" and (types or infer or missing or delimiter):
        raise UsageError(
            "--types, --infer, --na and --delimiter are for CSV; JSON says what type a value has"
        )
    fields = key.split(",") if key else None
    cells = CellTypes(parse_types(types), infer=infer, missing=frozenset(missing))
    form = CsvFormat(
        cells,
        None if delimiter is None else _one_character(delimiter),
        _delimiter(None, file),
        check_encoding(encoding),
        fields,
        _columns(fields, id_field),
    )
    with _source(file) as (raw, size), ExitStack() as stack:
        bar = stack.enter_context(progress("importing", size, unit="bytes"))
        job = Import(
            # Not before the first row: a file that cannot be read leaves no new database behind.
            lambda: stack.enter_context(opened_or_made(bound.path)),
            name,
            by_key(name) if key else by_field(lambda: job.database.new_id(), id_field),
            batch,
            "standard input" if file == "-" else file,
            lambda: _show(bar, raw, size),
            note,
            skip,
            skip_bad,
        )
        form = replace(form, on_header=lambda names: job.order.update(dict.fromkeys(names)))
        rows = _rows_of(raw, chosen, form, job.on_bad)
        with closing(rows):
            job.run(rows)
    job.warn_of_repeated()
    job.warn_of_too_short()
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


def _delimiter(given: str | None, file: str | None) -> str:
    if given is not None:
        return _one_character(given)
    return "\t" if (file or "").lower().endswith(".tsv") else ","


def _columns(key: list[str] | None, id_field: str | None) -> dict[str, str]:
    """Columns that have to be there, and the option that names them. Raises ``UsageError``."""
    if (twice := twice_in(key or ())) is not None:
        raise UsageError(f"--key names {twice!r} twice")
    return {**dict.fromkeys(key or (), "--key"), **({id_field: "--id-field"} if id_field else {})}


@contextmanager
def _source(file: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """The file and its size in bytes, None where it is unknown."""
    if file == "-":
        yield sys.stdin.buffer, None
        return
    try:
        raw = open(file, "rb")  # noqa: SIM115 -- closed below; only opening may fail so
    except OSError as error:
        raise unreadable(file, error) from error
    with raw:
        # A pipe with a name, such as that of a shell's <(…), has neither a size nor a place.
        yield raw, os.fstat(raw.fileno()).st_size if raw.seekable() else None


def _rows_of(raw: IO[bytes], kind: str, form: CsvFormat, bad: Bad) -> Generator[Row, None, None]:
    if kind == "csv":
        return read_csv(raw, form, bad=bad)
    return read_ndjson(raw, encoding=form.encoding, key=form.key, bad=bad)


def _show(bar: Bar, raw: IO[bytes], size: int | None) -> None:
    if size is not None:
        bar.reach(raw.tell())


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
    delimiter: str | None,
    as_json: bool,
) -> None:
    """Write a collection as NDJSON or CSV.

    In order of the ids, from one snapshot. NDJSON is exact: `import` makes the same entities
    again. CSV has no types: see docs/cli.md.
    """
    bound = bind(words, directory, "COLLECTION", or_store=True)
    if output == "":
        raise UsageError("--output is empty: name a file, or leave it out for standard output")
    chosen = _format_of(kind, output)
    if chosen != "csv" and (fields is not None or delimiter is not None):
        raise UsageError("--fields and --delimiter are for CSV: add --format csv")
    if as_json and output in (None, "-"):
        raise UsageError("--json is about the summary; give --output for the rows")
    with opened(bound.path, read_only=True) as database:
        collection = existing_collection(database, bound["COLLECTION"])
        with database.snapshot() as snapshot:
            source = snapshot.collection(collection.name)
            empty: list[str] = []
            with _target(output) as raw, progress("exporting", len(source)) as bar:
                if chosen == "csv":
                    columns = None if fields is None else _chosen_fields(fields, id_field)
                    if columns is None:
                        columns = _all_fields(source, id_field, database)
                    between = _delimiter(delimiter, output)
                    count, empty = _export_csv(source, raw, id_field, columns, between, bar)
                else:
                    count = _export_ndjson(source, raw, id_field, bar)
            if empty and count:
                _warn_of_empty(empty, list(_fields_of(source)))
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
    if os.path.exists(output) and not os.path.isfile(output):
        try:
            with open(output, "wb") as raw:  # a pipe or a device
                yield raw
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _not_writable(output, error) from error
        return
    where = os.path.abspath(output)
    if is_database(os.path.dirname(where)):
        raise UsageError(
            f"{output} would be inside the database {os.path.dirname(where)}: name a file elsewhere"
        )
    remove_dead(os.path.dirname(where))
    with _begin_file(where) as partial:
        try:
            with open(partial.path, "wb") as raw:
                yield raw
            partial.finish()
        except OSError as error:
            raise _not_writable(output, error) from error


def _begin_file(where: str) -> Partial:
    try:
        return Partial(where, "export")
    except OSError as error:
        raise _not_writable(where, error) from error


def _not_writable(path: str, error: OSError) -> StorageError:
    if not is_about_place(error.errno or 0):
        return disk_error(error.errno or errno.EIO, f"writing {path}")
    return StorageError(
        f"cannot write {path}: {error.strerror}; name a file in a directory that is there and that "
        "you may write to"
    )


_SHOW_EVERY: Final = 1000


def _export_ndjson(source: ReadCollection[Any], raw: IO[bytes], id_field: str, bar: Bar) -> int:
    count = 0
    for raw_id, payload in source.payloads():
        value = cbor.decode_trusted(payload)
        raw.write(ndjson_line(_id_text(raw_id), value, id_field))
        count += 1
        if count % _SHOW_EVERY == 0:
            bar.reach(count)
    return count


def _id_text(raw: bytes) -> str:
    """As ``str`` of the UUID, at a third of its price."""
    digits = raw.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _export_csv(
    source: ReadCollection[Any],
    raw: IO[bytes],
    id_field: str,
    columns: list[str],
    delimiter: str,
    bar: Bar,
) -> tuple[int, list[str]]:
    """How many rows, and which columns no entity has a field for."""
    writer = CsvWriter(raw, [id_field, *columns], delimiter)
    count = 0
    for raw_id, payload in source.payloads():
        text = _id_text(raw_id)
        writer.add(text, _map_of(text, cbor.decode_trusted(payload)))
        count += 1
        if count % _SHOW_EVERY == 0:
            bar.reach(count)
    writer.flush()
    return count, [name for name in columns if name in writer.empty]


def _chosen_fields(fields: str, id_field: str) -> list[str]:
    """The columns beside the id, which is the first one whether it is named or not."""
    names = check_text("--fields", fields).split(",")
    if "" in names:
        raise UsageError("--fields is names with a comma between them; one of them is empty")
    return [name for name in dict.fromkeys(names) if name != id_field]


def _warn_of_empty(empty: list[str], fields: list[str]) -> None:
    """Of what may be a misspelt name, and of what no entity has yet."""
    from difflib import get_close_matches  # which most commands have no use for

    for name in empty:
        near = get_close_matches(name, fields, 1)
        meant = f"is {near[0]!r} meant?" if near else f"there are {', '.join(fields[:20])}"
        note(one_line(f"warning: no entity has a field {name!r}, so its column is empty: {meant}"))


def _all_fields(source: ReadCollection[Any], id_field: str, database: Database) -> list[str]:
    """A first walk over all entities, because the header comes before the last row is known. The
    fields are in the order of the file from which they were imported, where that is known."""
    found = _fields_of(source)
    if id_field in found:
        raise UsageError(
            f"entities have a field {id_field!r} themselves: choose another --id-field"
        )
    known = [name for name in column_order(database, source.name) if name in found]
    return list(dict.fromkeys([*known, *found]))


def _fields_of(source: ReadCollection[Any]) -> dict[str, None]:
    found: dict[str, None] = {}
    for raw_id, payload in source.payloads():
        value = cbor.decode_trusted(payload)
        if type(value) is not dict or not value.keys() <= found.keys():
            found.update(dict.fromkeys(_map_of(_id_text(raw_id), value)))
    return found


def _map_of(entity_id: str, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise InputError(f"entity {entity_id} is no map of fields, so no CSV row: use ndjson")
    return value
