"""Canonical CBOR: what is accepted, what is refused and where, against cbor2 as the oracle."""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import pathlib
import struct
import uuid
from typing import Any

import cbor2
import hypothesis.strategies as st
import libipld
import pytest
from hypothesis import example, given

from entidb import cbor
from entidb.cbor import encoding
from entidb.errors import CborDecodeError, CborEncodeError
from entidb.types import NESTING_MAX

UUID_LIKE_A_LINK = bytes.fromhex("01927d3e0c0a0b") + b"\x07" * 9
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FLOATS = st.floats(allow_nan=False, allow_infinity=False).filter(
    lambda x: x != 0 or math.copysign(1, x) > 0
)


def cid_like(rest: bytes) -> bytes:
    """Bytes that parse as a content identifier: version, codec, hash, length, digest."""
    return bytes([1, 0x70, 0x12, len(rest)]) + rest


BYTES = (
    st.binary()
    | st.binary(max_size=100).map(cid_like)
    | st.binary(min_size=32, max_size=32).map(lambda rest: b"\x12\x20" + rest)
    | st.binary(max_size=5).map(lambda rest: b"\xd8\x2a" + rest)
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | FLOATS | TEXT | BYTES
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=30
)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def oracle(value: Any) -> bytes:
    """Canonical CBOR by hand over cbor2: it shortens floats, which the profile does not."""
    if isinstance(value, float):
        return b"\xfb" + cbor2.dumps(value)[1:] if len(cbor2.dumps(value)) == 9 else _double(value)
    if isinstance(value, list):
        return cbor.array_head(len(value)) + b"".join(map(oracle, value))
    if isinstance(value, dict):
        pairs = sorted((cbor2.dumps(key), oracle(item)) for key, item in value.items())
        return cbor.map_head(len(value)) + b"".join(key + item for key, item in pairs)
    return cbor2.dumps(value)


def _double(value: float) -> bytes:
    return b"\xfb" + struct.pack(">d", value)


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down: True is not 1, and 1 is not 1.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


# ---------------------------------------------------------------- round trips


@given(VALUES)
@example({"id": UUID_LIKE_A_LINK, "b": cid_like(b"\xd8\x2a"), "n": [-11, 0xD82A, 0.0, 2.5]})
def test_every_value_of_the_profile_comes_back_and_agrees_with_the_oracle(value: Any) -> None:
    payload = cbor.encode(value)
    assert payload == cbor.encode_message(value) == oracle(value)
    for decode in (cbor.decode, cbor.check, cbor.decode_trusted):
        assert same(decode(payload), value)
    assert same(cbor2.loads(payload), value)


@given(st.binary(max_size=60).map(cid_like) | st.binary(max_size=30))
def test_the_encoder_in_python_writes_what_libipld_writes(raw: bytes) -> None:
    value = {"text": "é", "list": [1, -1, 2**64 - 1, None, True, False, 1.5], "": {}}
    assert encoding._encode_exactly(value) == libipld.encode_dag_cbor(value)
    assert cbor.decode(encoding._encode_exactly([raw])) == [raw]


def test_bytes_that_look_like_a_link_stay_bytes() -> None:
    for raw in (cid_like(b"abc"), b"\x12\x20" + bytes(32), cid_like(b"")):
        assert libipld.encode_dag_cbor(raw)[:2] == b"\xd8\x2a"
        payload = cbor.encode({"x": [raw]})
        assert b"\xd8\x2a" not in payload
        assert cbor.check(payload) == {"x": [raw]}


def test_the_bytes_of_tag_42_inside_a_string_are_accepted() -> None:
    for value in (b"\xd8\x2a\x45\x00\x01\x70\x12\x00", {"n": -0xD82A}, [0xD8, -11], b"..\xd8\x2a"):
        assert same(cbor.check(cbor.encode(value)), value)


def test_subclasses_are_written_as_their_base() -> None:
    class Colour(enum.StrEnum):
        RED = "red"

    class Level(enum.IntEnum):
        HIGH = 3

    value = {Colour.RED: Level.HIGH, "raw": cid_like(b"x")}
    assert cbor.decode(cbor.encode(value)) == {"red": 3, "raw": cid_like(b"x")}


def test_keys_are_sorted_by_length_first() -> None:
    expected = b"\xa3\x61b\x01\x62aa\x02\x62ab\x03"
    assert cbor.encode({"ab": 3, "aa": 2, "b": 1}) == expected
    with_bytes = cbor.encode({"ab": cid_like(b""), "aa": 2, "b": 1})
    assert list(cbor.decode(with_bytes)) == ["b", "aa", "ab"]


# ---------------------------------------------------------------- what cannot be encoded

REFUSED = [
    ({"lines": [0, 0, 0, {"price": decimal.Decimal("1")}]}, "$.lines[3].price", "smallest unit"),
    ({"a": (1, 2)}, "$.a", "list(value)"),
    ([{1, 2}], "$[0]", "sorted(value)"),
    ([frozenset()], "$[0]", "sorted(value)"),
    (bytearray(b"x"), "$", "bytes(value)"),
    ({"x": memoryview(b"x")}, "$.x", "bytes(value)"),
    ({"when": datetime.datetime(2026, 1, 1)}, "$.when", "isoformat"),
    ({"when": datetime.date(2026, 1, 1)}, "$.when", "isoformat"),
    ({"for": datetime.timedelta(1)}, "$.for", "total_seconds"),
    ({"id": uuid.UUID(int=1)}, "$.id", "str(value)"),
    ({"p": pathlib.PurePosixPath("/")}, "$.p", "str(value)"),
    ({"c": 1j}, "$.c", "two floats"),
    ({"e": enum.Enum("E", "A").A}, "$.e", "value.value"),  # type: ignore[attr-defined]
    ({"o": object()}, "$.o", "text keys"),
    ({"x": math.nan}, "$.x", "None"),
    ({"x": math.inf}, "$.x", "None"),
    ({"x": [-math.inf]}, "$.x[0]", "None"),
    ({"x": [0.0, -0.0]}, "$.x[1]", "use 0.0"),
    ({"x": 2**64}, "$.x", "str"),
    ({"x": -(2**64) - 1}, "$.x", "str"),
    ({"odd key": {1: 2}}, '$["odd key"]', "str(key)"),
    ({None: 1}, "$", "str(key)"),
    ({b"k": 1}, "$", "str(key)"),
    ({"t": "a\ud800"}, "$.t", "position 1"),
    ({"\udfff": 1}, "$", "surrogate"),
    ({"first": set(), "second": ()}, "$.first", "sorted"),
]


@pytest.mark.parametrize(("value", "path", "hint"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_stored_is_named_with_its_path_and_a_way_out(
    value: Any, path: str, hint: str
) -> None:
    with pytest.raises(CborEncodeError) as raised:
        cbor.encode(value)
    assert raised.value.path == path
    assert str(raised.value).startswith(f"{path}: ")
    assert hint in str(raised.value)


def test_the_message_of_a_decimal_reads_as_promised() -> None:
    with pytest.raises(CborEncodeError) as raised:
        cbor.encode({"price": decimal.Decimal(1)})
    assert str(raised.value) == (
        "$.price: Decimal cannot be stored; use str or int of the smallest unit"
    )


def test_negative_zero_beside_bytes_that_look_like_a_link_is_refused() -> None:
    with pytest.raises(CborEncodeError) as raised:
        cbor.encode({"a": cid_like(b""), "z": -0.0})
    assert raised.value.path == "$.z"


def test_nesting_ends_at_its_limit() -> None:
    deepest = nested(NESTING_MAX)
    assert cbor.check(cbor.encode(deepest)) == deepest
    for depth in (NESTING_MAX + 1, 500, 100_000):
        with pytest.raises(CborEncodeError, match="inside each other"):
            cbor.encode(nested(depth))
    with pytest.raises(CborEncodeError, match="inside each other"):
        cbor.encode([nested(NESTING_MAX), cid_like(b"")])


def test_a_value_that_contains_itself_is_refused() -> None:
    value: dict[str, Any] = {}
    value["self"] = [value, value]
    with pytest.raises(CborEncodeError, match="contain itself"):
        cbor.encode(value)


# ---------------------------------------------------------------- what cannot be decoded

LINK = bytes.fromhex("d82a450001701200")
FORMS = {
    "empty": "",
    "two items": "0101",
    "cut short": "61",
    "uint in one byte too many": "1800",
    "uint 23 in two": "1817",
    "uint in two bytes too many": "1900ff",
    "uint in four bytes too many": "1a0000ffff",
    "uint in eight bytes too many": "1b00000000ffffffff",
    "negative too long": "3800",
    "length of bytes too long": "580161",
    "length of text too long": "780161",
    "length of array too long": "980101",
    "length of map too long": "b801616101",
    "key too long": "a1780161" + "01",
    "half float": "f93c00",
    "single float": "fa40200000",
    "nan": "fb7ff8000000000000",
    "infinity": "fb7ff0000000000000",
    "negative infinity": "fbfff0000000000000",
    "negative zero": "fb8000000000000000",
    "single negative zero": "fa80000000",
    "undefined": "f7",
    "simple value": "f0",
    "simple value in two bytes": "f8ff",
    "break alone": "ff",
    "indefinite bytes": "5f4161ff",
    "indefinite text": "7f6161ff",
    "indefinite array": "9f01ff",
    "indefinite map": "bf616101ff",
    "reserved length": "1c",
    "tag 0": "c000",
    "tag of a date": "c11a514b67b0",
    "big number": "c249010000000000000000",
    "link": LINK.hex(),
    "link in a map": "a16161" + LINK.hex(),
    "link beside its own bytes": "8242d82a" + LINK.hex(),
    "link with a longer tag": "d9002a450001701200",
    "link with the longest tag": "db000000000000002a450001701200",
    "keys not sorted": "a2616202616101",
    "keys sorted bytewise only": "a262616101616202",
    "key twice": "a2616101616102",
    "key twice with a link-like value": "a2616144017012006161" + "01",
    "key that is a number": "a10101",
    "key that is bytes": "a1416101",
    "bad UTF-8": "61ff",
    "surrogate in UTF-8": "63eda080",
    "array longer than the data": "9bffffffffffffffff",
    "bytes longer than the data": "5bffffffffffffffff",
    "link-like bytes and a long integer": "8244017012001800",
    "link-like bytes and a single float": "824401701200fa40200000",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_form_that_is_not_canonical_is_refused(form: str) -> None:
    for decode in (cbor.decode, cbor.check):
        with pytest.raises(CborDecodeError):
            decode(bytes.fromhex(form))


def test_nesting_over_the_limit_is_refused_where_values_enter() -> None:
    too_deep = b"\x81" * (NESTING_MAX + 1) + b"\x01"
    assert cbor.decode(too_deep) == nested(NESTING_MAX + 1)
    with pytest.raises(CborDecodeError, match="inside each other"):
        cbor.check(too_deep)
    for decode in (cbor.decode, cbor.check, cbor.decode_trusted):
        with pytest.raises(CborDecodeError):
            decode(b"\x81" * 1_000_000)


def test_many_containers_beside_each_other_are_not_nesting() -> None:
    value: Any = {"é" * 100: [[[]]] * 200}
    assert cbor.check(cbor.encode(value)) == value


# ---------------------------------------------------------------- many at once


def passes(payload: bytes) -> bool:
    try:
        return cbor.check(payload) is not None
    except CborDecodeError:
        return False


GOOD = [cbor.encode([number, "x", {"n": 2.5}]) for number in range(40)]
BAD = {
    **{name: bytes.fromhex(form) for name, form in FORMS.items()},
    "null": cbor.encode(None),
    "too deep": b"\x81" * (NESTING_MAX + 1) + b"\x01",
    "an item and a part": b"\x01\x82\x01",
}


@pytest.mark.parametrize("payload", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("at", [0, 15, 16, 39])
def test_one_bad_payload_among_many_is_found(payload: bytes, at: int) -> None:
    assert cbor.all_pass(GOOD)
    assert not cbor.all_pass([*GOOD[:at], payload, *GOOD[at + 1 :]])


@given(st.lists(VALUES, min_size=1, max_size=20), st.data())
def test_many_at_once_pass_as_they_do_alone(values: list[Any], data: st.DataObject) -> None:
    payloads = [cbor.encode(value) for value in values]
    assert cbor.all_pass(payloads) == (None not in values)
    # The same bytes cut elsewhere: together they are still one item behind the other.
    joined = b"".join(payloads)
    places = st.integers(0, len(joined))
    size = len(payloads) - 1
    cuts = sorted(data.draw(st.lists(places, min_size=size, max_size=size)))
    cut = [joined[a:b] for a, b in zip([0, *cuts], [*cuts, len(joined)], strict=True)]
    assert cbor.all_pass(cut) == all(map(passes, cut))


@pytest.mark.parametrize("move", [1, -1], ids=["to the one before", "to the one after"])
def test_a_byte_that_stands_with_the_neighbour_is_found(move: int) -> None:
    joined, cut = GOOD[3] + GOOD[4], len(GOOD[3]) + move
    assert not cbor.all_pass([*GOOD[:3], joined[:cut], joined[cut:], *GOOD[5:]])
    assert not cbor.all_pass([*GOOD[:3], b"", joined, *GOOD[5:]])
    assert not cbor.all_pass([*GOOD[:3], joined, *GOOD[5:]])


@given(st.binary(max_size=200))
@example(b"\xd8\x2a")
@example(b"\x9a\xff\xff\xff\xff")
def test_random_bytes_raise_nothing_but_the_decode_error(data: bytes) -> None:
    try:
        value = cbor.check(data)
    except CborDecodeError:
        return
    assert cbor.encode(value) == data


@given(VALUES, st.data())
def test_a_changed_byte_gives_another_value_or_an_error(value: Any, data: st.DataObject) -> None:
    payload = bytearray(cbor.encode(value))
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] ^= data.draw(st.integers(1, 255))
    try:
        changed = cbor.check(bytes(payload))
    except CborDecodeError:
        return
    assert not same(changed, value)
    assert cbor.encode(changed) == payload


# ---------------------------------------------------------------- heads


@given(st.integers(0, 2**64 - 1) | st.integers(0, 70_000))
def test_heads_joined_by_hand_are_canonical(number: int) -> None:
    assert cbor.uint(number) == cbor2.dumps(number)
    heads = (cbor.bytes_head, cbor.array_head, cbor.map_head)
    for major, head in zip((0x40, 0x80, 0xA0), heads, strict=True):
        expected = bytearray(cbor2.dumps(number))
        expected[0] |= major
        assert head(number) == expected


@given(TEXT)
@example("x" * 255)
@example("x" * 256)
def test_a_text_joined_by_hand_is_canonical(string: str) -> None:
    assert cbor.text(string) == cbor.encode(string)


def test_numbers_and_texts_outside_the_profile_have_no_item() -> None:
    for number in (-1, 2**64):
        with pytest.raises(CborEncodeError):
            cbor.uint(number)
    with pytest.raises(CborEncodeError):
        cbor.text("\ud800")


def test_the_codec_protocols_are_recognised_at_run_time() -> None:
    class Point:
        def to_cbor(self) -> bytes:
            return b"\x01"

        @classmethod
        def from_cbor(cls, data: bytes) -> Point:
            return cls()

    assert isinstance(Point(), cbor.CborEncode)
    assert isinstance(Point(), cbor.CborDecode)
    assert not isinstance(object(), cbor.CborEncode)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends too early"),
        (b"\x82\x01", "ends too early"),
        (b"\xa1\x01", "ends too early"),
        (b"\x7a\xff\xff\xff\xff", "ends too early"),
        (b"\x61\xff", "not UTF-8"),
        (b"\xa2aa\x01aa\x02", "out of order, or twice"),
        (b"\xa1\x01\x01", "no text"),
        (b"\x9f", "indefinite"),
        (b"\xfb\x7f\xf8\0\0\0\0\0\0", "NaN"),
        (b"\xc1\x01", "a tag"),
        (b"\xd8\x2a\x41\x00", "a tag"),
        (b"\x81" * 5000 + b"\x01", "too deep"),
        (b"\x01\x01", "bytes after the item"),
        (b"\xf9\x3c\x00", "not 64 bits"),
        (b"\xf7", "simple value"),
    ],
)
def test_what_is_wrong_with_bytes_is_said_in_our_words(data: bytes, reason: str) -> None:
    with pytest.raises(CborDecodeError, match=reason) as caught:
        cbor.decode(data)
    assert "DAG" not in str(caught.value) and "Error" not in str(caught.value)
