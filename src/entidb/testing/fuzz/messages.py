"""Broken messages: one with each field removed, doubled, retyped or at its limits; bytes with bits,
heads and lengths changed; and bodies that are small on the wire and huge in memory.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from entidb import cbor
from entidb.protocol import SyncRequest, SyncResponse, encode

SEQUENCE_MAX: Final = 2**63 - 1
STAMP_MAX: Final = 2**64 - 1


# ---------------------------------------------------------------- broken messages


@dataclass
class _Map:
    """A map as pairs, so that it can hold a key twice and in any order."""

    pairs: list[tuple[Any, Any]]


#: What replaces a field that is retyped or taken to its limits.
RETYPED: Final[tuple[Any, ...]] = (None, True, 1.5, "", "text", b"", b"x" * 16, [], [[]], {})
LIMIT_VALUES: Final[tuple[Any, ...]] = (
    0,
    1,
    -1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**64),
    "\x00",
    "../../etc/passwd",
    "é" * 128,
    "x" * 70_000,
    b"\x00" * 15,
    b"\x00" * 17,
    b"x" * 70_000,
    [0] * 5000,
)


def mutations(message: SyncRequest | SyncResponse) -> Iterator[tuple[str, bytes]]:
    """Every simple way to break ``message``, as (what was done, bytes): each field, and each
    position of the first and last member of each array, removed, doubled, retyped, and set to
    its limits; keys out of order, unknown, doubled; bytes missing and left over.

    Some of them are still messages: unknown keys are allowed, optional fields may be missing.
    """
    data = encode(message)
    tree = _tree(cbor.decode(data))
    for path in list(_paths(tree)):
        name = "$" + "".join(f"[{step!r}]" for step in path)
        yield f"{name} removed", _raw(_edit(tree, path, _remove))
        yield f"{name} doubled", _raw(_edit(tree, path, _double))
        for value in (*RETYPED, *LIMIT_VALUES):
            shown = f"{type(value).__name__} {str(value)[:20]!r}"
            yield f"{name} = {shown}", _raw(_edit(tree, path, _setter(value)))
    yield "keys reversed", _raw(_Map(tree.pairs[::-1]))
    yield "an unknown key", _raw(_Map([*tree.pairs, ("zzzzzzzzzzzzz", [1, {"a": b"b"}])]))
    yield "nothing", b""
    yield "a byte left over", data + b"\x00"
    yield "twice", data + data
    yield "in a list", cbor.array_head(1) + data
    yield "bottomless", b"\x81" * 100_000
    for cut in (1, 2, len(data) // 2, len(data) - 1):
        yield f"cut at {cut}", data[:cut]


def _tree(value: Any) -> Any:
    if isinstance(value, dict):
        return _Map([(key, _tree(item)) for key, item in value.items()])
    return [_tree(item) for item in value] if isinstance(value, list) else value


def _paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, _Map):
        steps = [(key, item) for key, item in node.pairs]
    elif isinstance(node, list):
        steps = [(index, node[index]) for index in sorted({0, len(node) - 1}) if node]
        # Positions inside an operation or a transaction are fields and not members.
        if any(not isinstance(item, list) for item in node):
            steps = list(enumerate(node[:8]))
    else:
        return
    for step, item in steps:
        yield (*path, step)
        yield from _paths(item, (*path, step))


_Edit = Callable[[list[Any], int], list[Any]]


def _edit(node: Any, path: tuple[Any, ...], edit: _Edit) -> Any:
    """A copy of ``node`` with ``edit`` done where ``path`` leads."""
    is_map = isinstance(node, _Map)
    items = list(node.pairs) if is_map else list(node)
    index = next(i for i, pair in enumerate(items) if pair[0] == path[0]) if is_map else path[0]
    if len(path) == 1:
        items = edit(items, index)
    elif is_map:
        items[index] = (path[0], _edit(items[index][1], path[1:], edit))
    else:
        items[index] = _edit(items[index], path[1:], edit)
    return _Map(items) if is_map else items


def _remove(items: list[Any], index: int) -> list[Any]:
    return items[:index] + items[index + 1 :]


def _double(items: list[Any], index: int) -> list[Any]:
    return [*items[: index + 1], *items[index:]]


def _setter(value: Any) -> _Edit:
    def set_it(items: list[Any], index: int) -> list[Any]:
        old = items[index]
        new = (old[0], value) if isinstance(old, tuple) else value
        return [*items[:index], new, *items[index + 1 :]]

    return set_it


def _raw(node: Any) -> bytes:
    """CBOR that the real encoder would refuse to write."""
    if isinstance(node, _Map):
        pairs = (_raw(key) + _raw(item) for key, item in node.pairs)
        return cbor.map_head(len(node.pairs)) + b"".join(pairs)
    if isinstance(node, list):
        return cbor.array_head(len(node)) + b"".join(map(_raw, node))
    if isinstance(node, bytes):
        return cbor.bytes_head(len(node)) + node
    return cbor.encode_message(node)


#: Heads that mean much: long strings, huge arrays, tags, indefinite lengths, NaN, half floats.
_HEADS: Final = (
    b"\x5b\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"\xbb\x00\x00\x00\x01\x00\x00\x00\x00",
    b"\x1b\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x18\x01",
    b"\xd8\x2a\x41\x00",
    b"\x9f\xff",
    b"\x5f\xff",
    b"\xf9\x7e\x00",
    b"\xfb\x80\x00\x00\x00\x00\x00\x00\x00",
    b"\xf7",
    b"\xff",
    b"\x62\xc3\x28",
)


def garbled(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to four random changes: bits flipped, bytes replaced, parts cut out,
    doubled or moved, heads of unusual items put in."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        to = min(len(out), at + rng.choice((1, 1, 2, 8, 40)))
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:to] = rng.randbytes(to - at)
        elif kind == 2:
            del out[at:to]
        elif kind == 3:
            out[at:at] = out[at:to]
        else:
            out[at : at + rng.choice((0, 1))] = rng.choice(_HEADS)
    return bytes(out)


# ---------------------------------------------------------------- bombs


def dense(size: int) -> dict[str, bytes]:
    """Messages of about ``size`` bytes that are valid CBOR, and many times that in memory."""
    heads = {"lists": b"\x80", "maps": b"\xa0", "ranges": b"\x82\x00\x01", "texts": b"\x62ab"}
    bodies = {}
    for name, item in heads.items():
        count = size // len(item)
        bodies[name] = b"\xa1\x64have" + cbor.array_head(count) + item * count
    return bodies


def packed(body: bytes) -> dict[str, bytes]:
    """``body`` by the content encodings that can be made here: gzip, and zstd where there is a
    package for it."""
    found = {"gzip": zlib.compress(body, 6, 16 + zlib.MAX_WBITS)}
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            found["zstd"] = importlib.import_module(name).compress(body, 3)
            break
    return found
