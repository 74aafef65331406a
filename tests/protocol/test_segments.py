"""Segments: what is encoded decodes to itself, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import fields

from entidb import cbor, packing
from entidb.errors import SyncCodecError
from entidb.protocol import (
    LIMITS,
    SEGMENT_BYTES_MAX,
    SEGMENT_ROWS_MAX,
    SegmentColumns,
    SegmentHeader,
    column_heads,
    decode_header,
    decode_segment,
    encode_segment,
    segment_rows,
    unpack_segment,
)
from entidb.protocol.segments import HEADER_BYTES_MAX, MAGIC, PLAIN, ROW_BYTES
from entidb.testing.fuzz import garbled

ROOT = Path(__file__).parent.parent.parent
VECTORS = json.loads((ROOT / "tests/vectors/protocol.json").read_text("utf-8"))["segments"]
DOCS = (ROOT / "docs/protocol.md").read_text("utf-8")
DEVICE = bytes(range(16))
PACKINGS = [PLAIN, *packing.ENCODINGS]

Row = tuple[bytes, int, bytes, int, bytes]


def columns_of(rows: list[Row]) -> SegmentColumns:
    return SegmentColumns(
        b"".join(row[0] for row in rows),
        b"".join(column_heads(row[1:4]) for row in rows),
        b"".join(len(row[4]).to_bytes(4, "big") for row in rows),
        b"".join(row[4] for row in rows),
    )


def many(count: int, value: bytes = b"\xa1\x61a\x01") -> list[Row]:
    return [(n.to_bytes(16, "big"), n + 1, DEVICE, 7, value) for n in range(count)]


def rows_of(data: bytes) -> list[Row]:
    found = segment_rows(decode_segment(data)[1])
    return [
        (entity_id, version, device, stamp, payload or b"")
        for entity_id, version, device, stamp, payload in zip(
            found.ids,
            found.versions,
            found.devices,
            found.timestamps,
            found.payloads,
            strict=True,
        )
    ]


ids = st.binary(min_size=16, max_size=16)
rows = st.lists(
    st.tuples(
        ids,
        st.integers(1, 2**63 - 1),
        ids,
        st.integers(0, 2**64 - 1),
        st.binary(min_size=1, max_size=300),
    ),
    min_size=1,
    max_size=200,
    unique_by=lambda row: row[0],
).map(sorted)


@given(rows, st.sampled_from(PACKINGS))
def test_a_segment_decodes_to_the_rows_that_were_encoded(given_rows: list[Row], how: str):
    columns = columns_of(given_rows)
    data = encode_segment("Läden/東京", columns, how)
    header, found = decode_segment(data)
    assert found == columns
    assert rows_of(data) == given_rows
    assert header.collection == "Läden/東京"
    assert (header.first, header.last) == (given_rows[0][0], given_rows[-1][0])
    assert encode_segment("Läden/東京", columns, how) == data


@given(rows, st.sampled_from(PACKINGS), st.integers(0, 5), st.integers(1, 5))
def test_what_is_cut_out_of_a_segment_is_what_its_rows_are(
    given_rows: list[Row], how: str, first: int, step: int
):
    found = unpack_segment(encode_segment("notes", columns_of(given_rows), how))
    ids, versions, _, times, payloads = map(list, zip(*given_rows, strict=True))
    assert (found.ids, list(found.payloads())) == (ids, payloads)
    assert found.heads() == [column_heads(row[1:4]) for row in given_rows]
    assert (found.newest_version, found.newest_timestamp) == (max(versions), max(times))
    assert [found.version(at) for at in range(len(ids))] == versions
    first %= len(ids)
    assert found.sample(first, step) == payloads[first::step]


@pytest.mark.parametrize("row", VECTORS, ids=lambda row: row["name"])
def test_a_vector_means_what_it_says_or_is_refused(row: dict[str, Any]):
    data = bytes.fromhex(row["hex"])
    if "header" not in row:
        with pytest.raises(SyncCodecError):
            decode_segment(data)
        return
    header, columns = decode_segment(data)
    said = {key: _plain(item) for key, item in row["header"].items()}
    assert {name: getattr(header, name) for name in SegmentHeader.__struct_fields__} == said
    assert rows_of(data) == [tuple(map(_plain, entity)) for entity in row["entities"]]
    if header.packing == PLAIN and row["name"] != "an unknown key of the header":
        assert encode_segment(header.collection, columns, PLAIN) == data


def _plain(item: Any) -> Any:
    return bytes.fromhex(item["hex"]) if isinstance(item, dict) else item


def test_the_cddl_has_exactly_the_fields_of_the_header():
    found = re.search(r"^segment-header = {\n(.*?)^}$", DOCS, re.MULTILINE | re.DOTALL)
    assert found is not None
    keys = re.findall(r'"(\w+)":', re.sub(r";.*", "", found[1]))
    assert keys == [field.encode_name for field in fields(SegmentHeader)]


def test_the_largest_segment_is_taken_and_one_of_a_row_more_is_not():
    columns = columns_of(many(SEGMENT_ROWS_MAX))
    assert decode_segment(encode_segment("notes", columns, "gzip"))[1] == columns
    with pytest.raises(SyncCodecError):
        decode_segment(encode_segment("notes", columns_of(many(SEGMENT_ROWS_MAX + 1)), "gzip"))


def test_one_entity_alone_may_be_larger_than_a_segment_and_two_may_not():
    value = bytes(SEGMENT_BYTES_MAX)
    large = encode_segment("notes", columns_of(many(1, value)), "gzip")
    assert len(decode_segment(large)[1].values) == SEGMENT_BYTES_MAX
    with pytest.raises(SyncCodecError, match="2 rows"):
        decode_segment(encode_segment("notes", columns_of(many(2, value)), "gzip"))


@pytest.mark.parametrize("how", packing.ENCODINGS)
def test_what_unpacks_to_more_than_it_says_takes_no_more_memory(how: str):
    said = columns_of(many(1000))
    data = encode_segment("notes", said, PLAIN).replace(
        b"dnone", bytes([0x60 + len(how)]) + how.encode()
    )
    length = len(cbor2.dumps({"packing": how})) - len(cbor2.dumps({"packing": "none"}))
    head = int.from_bytes(data[16:20], "big") + length
    begin = 20 + head
    bomb = data[:16] + head.to_bytes(4, "big") + data[20:begin]
    bomb += packing.compress(how, bytes(300 * 1024 * 1024))
    assert decode_header(bomb)[0].packing == how
    tracemalloc.start()
    with pytest.raises(SyncCodecError, match="more than"):
        decode_segment(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 1024 * 1024


@pytest.mark.parametrize("how", PACKINGS)
@pytest.mark.parametrize("seed", range(4))
def test_a_garbled_segment_is_refused_or_holds_all_promises(how: str, seed: int):
    rng = random.Random(seed)
    data = encode_segment("notes", columns_of(many(50)), how)
    for _ in range(300):
        broken = garbled(data, rng)
        try:
            header, columns = decode_segment(broken)
        except SyncCodecError:
            continue
        found = segment_rows(columns)
        assert len(found.ids) == header.rows == columns.rows
        assert found.ids == sorted(set(found.ids))
        assert all(found.payloads) and min(found.versions) > 0


@pytest.mark.parametrize("how", PACKINGS)
def test_a_segment_that_is_cut_off_anywhere_is_refused(how: str):
    data = encode_segment("notes", columns_of(many(5)), how)
    for end in range(len(data)):
        with pytest.raises(SyncCodecError):
            decode_segment(data[:end])
        with pytest.raises(SyncCodecError):
            decode_segment(data + data[:1])


def test_the_header_is_read_from_the_beginning_of_a_file():
    data = encode_segment("n" * 255, columns_of(many(2000)), "gzip")
    header, begin = decode_header(data[:HEADER_BYTES_MAX])
    assert header == decode_segment(data)[0]
    assert data.startswith(MAGIC) and begin < HEADER_BYTES_MAX


def test_the_same_rows_make_the_same_file_again():
    made = [
        hashlib.sha256(encode_segment("notes", columns_of(many(500)), how)).digest()
        for how in PACKINGS * 2
    ]
    assert made[: len(PACKINGS)] == made[len(PACKINGS) :]
    assert len(set(made)) == len(PACKINGS)


def _with_header_to(end: int) -> bytes:
    """A segment whose body begins at ``end``, because its header has a long unknown key."""
    data = encode_segment("notes", columns_of(many(2)), PLAIN)
    _, begin = decode_header(data)
    said = cbor.decode(data[20:begin])
    without = len(cbor.encode_message(said | {"padding": "x" * 1000})) - 1000
    header = cbor.encode_message(said | {"padding": "x" * (end - 20 - without)})
    assert 20 + len(header) == end
    return data[:16] + len(header).to_bytes(4, "big") + header + data[begin:]


def test_a_header_may_have_so_many_bytes_and_not_one_more():
    data = _with_header_to(HEADER_BYTES_MAX)
    assert decode_header(data)[1] == HEADER_BYTES_MAX
    assert rows_of(data) == many(2)
    with pytest.raises(SyncCodecError, match="too long"):
        decode_segment(_with_header_to(HEADER_BYTES_MAX + 1))


def test_a_header_that_is_not_all_there_is_said_to_be_cut_off():
    data = encode_segment("notes", columns_of(many(2)), PLAIN)
    _, begin = decode_header(data)
    for length in (20, 21, begin - 1):
        with pytest.raises(SyncCodecError, match="cut off"):
            decode_header(data[:length])
    assert decode_header(data[:begin])[1] == begin
    for length in (0, 14, 19):
        with pytest.raises(SyncCodecError, match=f"it has {length} bytes"):
            decode_header(data[:length])


def _headed(**changes: Any) -> bytes:
    """The beginning of a segment of two rows, with other things in its header."""
    data = encode_segment("notes", columns_of(many(2)), PLAIN)
    _, begin = decode_header(data)
    header = cbor.encode_message(cbor.decode(data[20:begin]) | changes)
    return data[:16] + len(header).to_bytes(4, "big") + header


@pytest.mark.parametrize(
    ("rows", "least", "most"),
    [
        (1, ROW_BYTES, LIMITS.message_bytes_max),
        (2, 2 * ROW_BYTES, SEGMENT_BYTES_MAX),
        (1000, 1000 * ROW_BYTES, SEGMENT_BYTES_MAX),
    ],
)
def test_a_header_says_a_size_that_its_rows_can_have(rows: int, least: int, most: int):
    last = (rows - 1).to_bytes(16, "big")
    for size in (least, most):
        assert decode_header(_headed(rows=rows, last=last, size=size))[0].size == size
    for size in (least - 1, most + 1):
        with pytest.raises(SyncCodecError, match=f"{rows} rows does not have {size} bytes"):
            decode_header(_headed(rows=rows, last=last, size=size))


@pytest.mark.parametrize(("rows", "first", "last"), [(1, 0, 1), (2, 0, 0), (1, 1, 0), (2, 1, 0)])
def test_a_header_names_ends_that_its_rows_can_have(rows: int, first: int, last: int):
    ends = {"first": first.to_bytes(16, "big"), "last": last.to_bytes(16, "big")}
    with pytest.raises(SyncCodecError, match=f"{rows} rows does not have these ids"):
        decode_header(_headed(rows=rows, size=200, **ends))


@pytest.mark.parametrize("name", ["", "a\nb", "é" * 128])
def test_a_header_names_a_collection_that_there_can_be(name: str):
    with pytest.raises(SyncCodecError, match="header"):
        decode_header(_headed(collection=name))


@pytest.mark.parametrize("how", ["lz4", "identity"])
def test_a_packing_that_nobody_knows_is_named(how: str):
    with pytest.raises(SyncCodecError, match=f"cannot unpack '{how}'"):
        decode_header(_headed(packing=how))
