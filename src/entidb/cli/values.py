"""JSON as it is typed, imported, exported and printed, and the values that it means.

JSON can express every entity value except byte strings. Those are written as a map with the
one key ``$bytes`` and base64 (RFC 4648, section 4); a map that really looks like that gets one more
``$``, so that every value survives the way out and back:

    b"\\x01"              <->  {"$bytes": "AQ=="}
    {"$bytes": "hello"}  <->  {"$$bytes": "hello"}
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Final

import click

from entidb.cli.exits import InputError, NotFoundError, UsageError
from entidb.cli.output import say
from entidb.db.json_values import BYTES, ESCAPED, dump

#: Bytes of a line, characters of a cell: above what one transaction can hold, so a larger one is
#: refused while it is read and not after it has filled the memory.
LINE_BYTES_MAX: Final = 64 << 20
#: JSON escapes C0 itself; these could still steer a terminal, or turn its text around.
_UNSAFE: Final = re.compile("[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# ---------------------------------------------------------------- reading


def unreadable(path: str | os.PathLike[str], error: OSError) -> NotFoundError:
    """The error for a file that is to be read, and cannot be."""
    may_not = error.errno in (errno.EACCES, errno.EPERM)
    todo = "check its owner and mode" if may_not else "check the path"
    said = os.strerror(error.errno or errno.EIO)
    return NotFoundError(f"cannot read {os.fspath(path)}: {said}; {todo}", code="no_file")


def parse(text: str) -> Any:
    """The value that JSON ``text`` means. Raises ``InputError``, which names the place."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {_json_words(error)}", code="invalid_json") from error
    except RecursionError as error:
        raise InputError("nested too deep for an entity", code="invalid_json") from error
    except InputError:
        raise
    except ValueError as error:  # of integers with thousands of digits
        raise InputError(
            "a number with more digits than an entity can hold: write it as text",
            code="invalid_json",
        ) from error


def _json_words(error: json.JSONDecodeError) -> str:
    """What is wrong, and where. Lines are counted only where there are several: a line of NDJSON
    has another number in its file."""
    text = error.doc.rstrip()
    at = min(error.pos, len(text))
    if at == len(text):
        return "it ends too early" if text else "it is empty"
    before = text[:at]
    line, column = before.count("\n"), at - before.rfind("\n")
    place = f"line {line + 1}, column {column}" if "\n" in text else f"column {column}"
    what = error.msg.removesuffix(" starting at").lower()
    return f"{what} at {place}"


def _object(pairs: list[tuple[str, Any]]) -> Any:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = twice_in(name for name, _ in pairs)
        raise InputError(f"one object has the key {twice!r} twice", code="invalid_json")
    if len(made) == 1:
        name, value = pairs[0]
        if name == BYTES and isinstance(value, str):
            return _from_base64(value)
        if ESCAPED.fullmatch(name):
            return {name.removeprefix("$") if name != BYTES else name: value}
    return made


def twice_in(names: Iterable[str]) -> str | None:
    """The first of ``names`` that has been there before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"$bytes holds no base64: {error}", code="invalid_json") from error


def _refuse_constant(name: str) -> Any:
    raise InputError(f"{name} is not JSON, and no entity can hold it", code="invalid_json")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def read_value(given: str, *, instead_of: str = "") -> Any:
    """The value of a VALUE argument: JSON, ``-`` for standard input, ``@FILE`` for a file; where
    some words mean something else, ``instead_of`` names them."""
    if given == "-":
        text = _text(_read(sys.stdin.buffer, "standard input"), "standard input")
        if not text.strip():
            raise InputError("standard input is empty; - reads the value from it")
        return parse(text)
    if given.startswith("@"):
        if given == "@":
            raise UsageError("@ names a file, and no name follows it: write @FILE")
        path = Path(given[1:])
        try:
            with open(path, "rb") as file:
                return parse(_text(_read(file, str(path)), str(path)))
        except OSError as error:
            raise unreadable(path, error) from error
    try:
        return parse(given)
    except InputError as error:
        if given[:1] in ('"', "{", "["):
            raise
        hint = f"a text needs its own quotes, as in '{json.dumps(given, ensure_ascii=False)}'"
        said = str(error)
        if not said.startswith(given[:60]):  # else it names the value itself
            said = f"{given[:60]!r} is {said}"
        if instead_of:
            hint = f"write {instead_of}, or a value; {hint}"
        raise InputError(f"{said}; {hint}", code=error.code) from error


def _read(file: IO[bytes], where: str) -> bytes:
    """All of ``file``, which may be a device without an end."""
    raw = file.read(LINE_BYTES_MAX + 1)
    if len(raw) > LINE_BYTES_MAX:
        raise InputError(f"{where} is longer than {LINE_BYTES_MAX} bytes, and no entity is")
    return raw


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start}") from error


class Bounded(click.FloatRange):
    """A number of an option, in these bounds; what is no number is in no bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number", param, ctx)
        return number


# ---------------------------------------------------------------- writing


def shown(value: Any, *, indent: int | None = None) -> str:
    """``value`` as JSON for standard output: nothing in it can steer a terminal, and it is pure
    ASCII where standard output is not UTF-8, so that what comes out is always JSON."""
    text = dump(value, indent=indent)
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    if encoding != "utf8" and not text.isascii():
        text = json.dumps(json.loads(text), indent=indent)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def print_json(document: Any) -> None:
    """One JSON document on one line; for a list, call it for each (NDJSON)."""
    say(shown(document))
