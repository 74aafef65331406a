"""Writes the protocol's test vectors, ``tests/vectors/protocol.json``.

The bytes come from cbor2, not from ``entidb.protocol``, so that the vectors can disagree with it.
``docs/protocol.md``, last section, says what stands where. Running it twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import cbor2

TARGET: Final = Path(__file__).parent.parent / "tests" / "vectors" / "protocol.json"

Message = dict[str, Any]

#: Parses as a content identifier: version 1, dag-cbor, sha2-256 cut to 12 bytes.
ID_LIKE_A_LINK: Final = bytes.fromhex("0171120c") + bytes(range(12))
DEVICE: Final = bytes.fromhex("018f2f3e4a5b7c6d8e9fa0b1c2d3e4f5")
HISTORY: Final = bytes(range(0xA0, 0xB0))
TERM: Final = bytes.fromhex("005fb1c2d3e4f5ff")
ENTITY: Final = bytes.fromhex("019300000000700080000000000000aa")
OTHER: Final = bytes.fromhex("019300000000700080000000000000bb")
PAYLOAD: Final = bytes.fromhex("a1657469746c6566436f66666565")  # {"title": "Coffee"}
#: A byte string whose content looks like a tagged link.
PAYLOAD_LIKE_A_LINK: Final = b"\x58\x16" + b"\xd8\x2a\x51\x00" + ID_LIKE_A_LINK + b"\x00\x00"
STAMP: Final = 1764000000000 << 16

HANDSHAKE_REQUEST: Final[Message] = {
    "major": 1,
    "minor": 0,
    "db_id": "household",
    "device_id": DEVICE,
    "history": HISTORY,
    "cursor": 41,
    "client": "notes/2.1",
    "schema": 3,
}
LIMITS: Final[Message] = {
    "transaction_bytes_max": 16777216,
    "message_bytes_max": 67108864,
    "push_operations_max": 100000,
    "pull_operations_max": 100000,
    "collections_max": 4096,
    "database_collections_max": 65536,
}
HANDSHAKE_RESPONSE: Final[Message] = {
    "major": 1,
    "minor": 0,
    "history": HISTORY,
    "head": 70000,
    "floor": 23,
    "limits": LIMITS,
    "features": ["zstd", "gzip"],
    "time": 1764000000123,
    "granted": ["Läden/東京", "notes"],
    "subject": "Ann Müller",
}
PULL_REQUEST: Final[Message] = {
    "db_id": "household",
    "device_id": DEVICE,
    "history": HISTORY,
    "cursor": 41,
    "have": [[43, 43], [50, 70]],
    "limit": 1000,
    "bytes_max": 1048576,
    "collections": ["notes", "Läden/東京"],
    "full": False,
    "columns": False,
    "schema": 24,
    "seen": [70, TERM],
}
PULL_RESPONSE: Final[Message] = {
    "collections": ["notes", "lists"],
    "columns": None,
    "commits": [
        [42, DEVICE, STAMP, [[0, ENTITY, PAYLOAD], [1, ENTITY, None]]],
        [255, ID_LIKE_A_LINK, STAMP + 1, [[0, ID_LIKE_A_LINK, PAYLOAD_LIKE_A_LINK]]],
        [4294967296, DEVICE, 2**64 - 1, [[1, OTHER, b"\xf6"]]],
    ],
    "cursor": 4294967296,
    "has_more": True,
    "head": 2**63 - 1,
    "floor": 0,
    "time": 1764000000123,
    "granted": ["lists", "notes"],
    "term": [65536, TERM],
    "live": 70003,
}
#: The first two commits of ``PULL_RESPONSE``, three operations, a tombstone among them.
PULL_COLUMNS: Final[Message] = {
    "ids": ENTITY + ENTITY + ID_LIKE_A_LINK,
    "heads": b"".join(
        version.to_bytes(8, "big") + device + stamp.to_bytes(8, "big")
        for version, device, stamp in (
            (42, DEVICE, STAMP),
            (42, DEVICE, STAMP),
            (255, ID_LIKE_A_LINK, STAMP + 1),
        )
    ),
    "sizes": b"".join(
        size.to_bytes(4, "big") for size in (len(PAYLOAD), 2**32 - 1, len(PAYLOAD_LIKE_A_LINK))
    ),
    "values": PAYLOAD + PAYLOAD_LIKE_A_LINK,
    "indexes": b"\0\0\0\1\0\0",
}
IN_COLUMNS: Final[Message] = {"commits": [], "columns": PULL_COLUMNS, "cursor": 255}
PUSH_REQUEST: Final[Message] = {
    "db_id": "household",
    "device_id": DEVICE,
    "history": HISTORY,
    "cursor": 65536,
    "collections": ["notes", "lists"],
    "transactions": [
        [OTHER, STAMP, [[0, ENTITY, 65535, PAYLOAD], [1, ENTITY, 24, None]]],
        [ID_LIKE_A_LINK, 0, [[1, ID_LIKE_A_LINK, 0, PAYLOAD_LIKE_A_LINK]]],
    ],
    "schema": 256,
    "subject": "東京",
    "seen": [65540, TERM],
}
PUSH_RESPONSE: Final[Message] = {
    "results": [
        [0, 70001, 0, [], "", ""],
        [0, 70002, STAMP, [], "", ""],
        [1, 9, 0, [], "", ""],
        [2, 0, 0, [[0, ENTITY, 66000, PAYLOAD], [0, OTHER, 66001, None]], "", ""],
        [3, 0, 0, [], "forbidden", "notes is read-only"],
    ],
    "collections": ["notes"],
    "head": 70002,
    "time": 1764000000123,
    "term": [70001, bytes(reversed(TERM))],
}
ROUND_REQUEST: Final[Message] = {
    "pull": PULL_REQUEST
    | {"cursor": 65536, "have": [[65538, 65540]], "schema": 256, "seen": [65540, TERM]},
    "push": {key: item for key, item in PUSH_REQUEST.items() if key != "seen"},
}
ROUND_RESPONSE: Final[Message] = {"pull": PULL_RESPONSE, "push": PUSH_RESPONSE}
DIGEST_REQUEST: Final[Message] = {
    "db_id": "household",
    "device_id": DEVICE,
    "history": HISTORY,
    "cursor": 65536,
    "collections": ["notes", "lists"],
    "collection": "notes",
    "after": bytes(16),
    "last": ENTITY,
    "block": 512,
    "ids": [],
    "schema": 256,
}
DIGEST_RESPONSE: Final[Message] = {
    "collections": [],
    "blocks": [[bytes(15) + b"\1", 1, DEVICE], [ENTITY, 511, HISTORY]],
    "states": [[ENTITY, 65535, DEVICE, STAMP, PAYLOAD]],
    "newer": [bytes(15) + b"\2"],
    "more": True,
    "head": 65540,
    "granted": ["lists", "notes"],
}
SNAPSHOT_REQUEST: Final[Message] = {
    "db_id": "household",
    "device_id": DEVICE,
    "history": HISTORY,
    "collections": ["notes", "Läden/東京"],
    "packings": ["zstd", "gzip"],
    "schema": 24,
    "seen": [70, TERM],
}
MANIFEST: Final[Message] = {
    "history": HISTORY,
    "head": 65540,
    "floor": 23,
    "collections": ["lists", "notes"],
    "segments": [
        [bytes(range(32)), 0, 4096, 65536, bytes(16), ENTITY, "zstd"],
        [bytes(range(1, 33)), 1, 300, 2, bytes(16), ENTITY, "zstd"],
        [bytes(range(2, 34)), 1, 200, 1, OTHER, OTHER, "gzip"],
    ],
    "entities": 65539,
    "ends": 1764003600123,
    "time": 1764000000123,
    "granted": ["lists", "notes"],
    "term": [65500, TERM],
}
ERROR_RESPONSE: Final[Message] = {
    "code": "rate_limited",
    "message": "slow down",
    "retryable": True,
    "retry_after": 1.5,
    "details": {"floor": 12},
}
COMPLETE: Final[dict[str, Message]] = {
    "HandshakeRequest": HANDSHAKE_REQUEST,
    "HandshakeResponse": HANDSHAKE_RESPONSE,
    "PullRequest": PULL_REQUEST,
    "PullResponse": PULL_RESPONSE,
    "PushRequest": PUSH_REQUEST,
    "PushResponse": PUSH_RESPONSE,
    "RoundRequest": ROUND_REQUEST,
    "RoundResponse": ROUND_RESPONSE,
    "DigestRequest": DIGEST_REQUEST,
    "DigestResponse": DIGEST_RESPONSE,
    "SnapshotRequest": SNAPSHOT_REQUEST,
    "Manifest": MANIFEST,
    "ErrorResponse": ERROR_RESPONSE,
}
#: Keys a message may lack, with what their absence means.
DEFAULTS: Final[dict[str, Message]] = {
    "HandshakeRequest": {"client": "", "schema": 0},
    "PullRequest": {
        "have": [],
        "collections": None,
        "full": False,
        "columns": False,
        "schema": 0,
        "seen": None,
    },
    "PushRequest": {"schema": 0, "subject": None, "seen": None},
    "PushResponse": {"term": None},
    "HandshakeResponse": {"granted": None, "subject": None},
    "PullResponse": {"columns": None, "granted": None, "term": None, "live": None},
    "DigestRequest": {
        "collections": None,
        "collection": None,
        "after": None,
        "last": b"\xff" * 16,
        "block": 512,
        "ids": [],
        "schema": 0,
    },
    "DigestResponse": {
        "collections": [],
        "blocks": [],
        "states": [],
        "newer": [],
        "more": False,
        "granted": None,
    },
    "SnapshotRequest": {"history": None, "collections": None, "schema": 0, "seen": None},
    "Manifest": {"granted": None, "term": None},
    "ErrorResponse": {"retry_after": None, "details": {}},
}


#: What says nothing is the same as what is not there, and is not written.
NOT_WRITTEN: Final[Message] = {
    "schema": 0,
    "subject": None,
    "seen": None,
    "term": None,
    "live": None,
}


def canonical(value: Any) -> bytes:
    """The deterministic bytes. cbor2's own canonical form would shorten floats."""
    return cbor2.dumps(_ordered(value))


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: (len(key.encode()), key.encode()))
        return {key: _ordered(value[key]) for key in keys}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


# --- valid ------------------------------------------------------------------------------------


def valid() -> Iterator[dict[str, Any]]:
    for kind, message in COMPLETE.items():
        yield _valid(kind, "complete", message)
        newer = canonical(message | {"a_newer_key": {"nested": [1, None]}})
        yield _valid(kind, "an unknown key is ignored", message, newer)
        if kind in DEFAULTS:
            short = {key: item for key, item in message.items() if key not in DEFAULTS[kind]}
            meaning = message | DEFAULTS[kind]
            for name, none in NOT_WRITTEN.items():
                if meaning.get(name, 0) == none:
                    meaning.pop(name, None)
            data = None if short == meaning else canonical(short)
            yield _valid(kind, "what is absent has its default", meaning, data)
            if data is not None:
                yield _valid(kind, "defaults written out", meaning)
            if "schema" in message:
                zero = canonical(meaning | {"schema": 0})
                yield _valid(kind, "a schema of 0 says nothing", meaning, zero)
            if "subject" in message:
                nobody = canonical(meaning | {"subject": None})
                yield _valid(kind, "a subject that is null says nothing", meaning, nobody)
    yield from _valid_edges()


def _valid_edges() -> Iterator[dict[str, Any]]:
    yield _valid("HandshakeRequest", "the first meeting", HANDSHAKE_REQUEST | {"history": None})
    name = {"db_id": "ß" * 127 + "x"}
    yield _valid("HandshakeRequest", "a name of 255 bytes", HANDSHAKE_REQUEST | name)
    empty: Message = {"collections": [], "commits": [], "cursor": 41, "head": 41}
    yield _valid("PullResponse", "nothing new", PULL_RESPONSE | empty | {"has_more": False})
    largest = PULL_REQUEST | {"cursor": 2**63 - 1, "limit": 2**63 - 1, "have": [[0, 2**63 - 1]]}
    yield _valid("PullRequest", "the largest numbers", largest)
    full: Message = {"cursor": 0, "full": True, "columns": True}
    yield _valid("PullRequest", "a full pull", PULL_REQUEST | full)
    yield _valid("PullResponse", "in columns", PULL_RESPONSE | IN_COLUMNS)
    yield _valid("HandshakeResponse", "nothing is granted", HANDSHAKE_RESPONSE | {"granted": []})
    everything: Message = {"granted": None}
    yield _valid("PullResponse", "all in columns", PULL_RESPONSE | IN_COLUMNS | everything)
    none: Message = dict.fromkeys(PULL_COLUMNS, b"")
    yield _valid("PullResponse", "empty columns", PULL_RESPONSE | IN_COLUMNS | {"columns": none})
    yield _valid("RoundResponse", "nothing was decided", ROUND_RESPONSE | {"push": None})
    image: Message = {"collections": [], "segments": [], "entities": 0, "ends": 0}
    none = {key: item for key, item in (MANIFEST | image).items() if key != "term"}
    yield _valid("Manifest", "no image", none)
    newer = [[*segment, "newer"] for segment in MANIFEST["segments"]]
    yield _valid(
        "Manifest",
        "unknown elements of a segment are ignored",
        MANIFEST,
        canonical(MANIFEST | {"segments": newer}),
    )
    longest: Message = {"subject": "ß" * 255}
    yield _valid("HandshakeResponse", "a long subject", HANDSHAKE_RESPONSE | longest)
    nothing: Message = {"collections": [], "transactions": []}
    yield _valid("PushRequest", "no transaction at all", PUSH_REQUEST | nothing)
    for length in (23, 24, 255, 256, 4095, 4096):
        payload = canonical("x" * length)
        one = [[OTHER, STAMP, [[0, ENTITY, 1, payload]]]]
        message = PUSH_REQUEST | {"transactions": one}
        yield _valid("PushRequest", f"a payload of {len(payload)} bytes", message)
    for number in (0, 23, 24, 255, 256, 1023, 1024, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1):
        one = [[OTHER, number, [[0, ENTITY, number, None]]]]
        yield _valid("PushRequest", f"the number {number}", PUSH_REQUEST | {"transactions": one})
    yield _valid(
        "PullRequest",
        "unknown elements of what was seen are ignored",
        PULL_REQUEST,
        canonical(PULL_REQUEST | {"seen": [70, TERM, "newer"]}),
    )
    more = [[OTHER, STAMP, [[0, ENTITY, 1, None, "newer"]], "newer", {"a": 1}]]
    fewer = [[OTHER, STAMP, [[0, ENTITY, 1, None]]]]
    yield _valid(
        "PushRequest",
        "unknown elements are ignored",
        PUSH_REQUEST | {"transactions": fewer},
        canonical(PUSH_REQUEST | {"transactions": more}),
    )
    yield _valid(
        "PushResponse",
        "a result may end after what it needs",
        PUSH_RESPONSE | {"results": [[0, 7, 0, [], "", ""]]},
        canonical(PUSH_RESPONSE | {"results": [[0, 7]]}),
    )
    taken = [3, 0, 0, [[0, OTHER, 9, PAYLOAD]], "not_unique", "'email' is taken"]
    yield _valid("PushResponse", "who has what is unique", PUSH_RESPONSE | {"results": [taken]})


def _valid(kind: str, name: str, meaning: Message, data: bytes | None = None) -> dict[str, Any]:
    return {
        "type": kind,
        "name": name,
        "canonical": data is None,
        "hex": (canonical(meaning) if data is None else data).hex(),
        "message": _as_json(meaning),
    }


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list) else value


# --- refused ----------------------------------------------------------------------------------


def refused() -> Iterator[dict[str, Any]]:
    yield from _refused_bytes()
    for kind, message in COMPLETE.items():
        for key in message:
            absent = {other: item for other, item in message.items() if other != key}
            if key not in DEFAULTS.get(kind, {}):
                yield _refused(kind, f"{key} is missing", absent)
            yield _refused(kind, f"{key} has another type", message | {key: [[{}]]})
    yield from _refused_values()
    yield from _refused_together()
    yield from _refused_rounds()
    yield from _refused_digests()
    yield from _refused_manifests()


def _refused_bytes() -> Iterator[dict[str, Any]]:
    whole = canonical(HANDSHAKE_REQUEST)
    link = b"\xd8\x2a\x51\x00" + ID_LIKE_A_LINK
    cases = {
        "nothing": b"",
        "cut off": whole[:-1],
        "one byte too many": whole + b"\x00",
        "an indefinite map": b"\xbf" + whole[1:] + b"\xff",
        "a key that comes twice": b"\xa2\x61a\x01\x61a\x02",
        "keys out of order": b"\xa2\x62aa\x01\x61a\x02",
        "a key that is not text": b"\xa1\x01\x02",
        "not a number": b"\xa1\x61a\xfb\x7f\xf8" + bytes(6),
        "infinity": b"\xa1\x61a\xfb\x7f\xf0" + bytes(6),
        "a float of 16 bits": b"\xa1\x61a\xf9\x3c\x00",
        "undefined": b"\xa1\x61a\xf7",
        "an unknown simple value": b"\xa1\x61a\xf0",
        "text that is not UTF-8": b"\xa1\x61a\x61\xff",
        "a tag": b"\xa1\x61a\xc0\x61x",
        "a link": b"\xa1\x61a" + link,
        "a link where an id belongs": whole.replace(b"\x50" + DEVICE, link),
        "an array that claims to be huge": b"\x9b\x7f" + b"\xff" * 7,
        "a byte string that claims to be huge": b"\x5b\x7f" + b"\xff" * 7,
    }
    for name, data in cases.items():
        yield {"type": "HandshakeRequest", "name": name, "code": "codec_error", "hex": data.hex()}
    for name, item in {"an array": [1], "text": "x", "null": None}.items():
        yield _refused("HandshakeRequest", f"{name} instead of a map", item)


def _refused_values() -> Iterator[dict[str, Any]]:
    for name, change in _each(
        {
            "a negative number": {"cursor": -1},
            "a number of 64 bits": {"cursor": 2**63},
            "a number as a float": {"cursor": 1.0},
            "a number as a truth value": {"cursor": True},
            "an id of 15 bytes": {"device_id": DEVICE[:15]},
            "an id of 17 bytes": {"device_id": DEVICE + b"x"},
            "an id as text": {"device_id": DEVICE.hex()},
            "an empty name": {"db_id": ""},
            "a name of 256 bytes": {"db_id": "ß" * 128},
            "a name with a line feed": {"db_id": "a\nb"},
            "a name with a C1 control": {"db_id": "a\x85b"},
            "a client of 256 characters": {"client": "x" * 256},
        }
    ):
        yield _refused("HandshakeRequest", name, HANDSHAKE_REQUEST | change)
    for name, change in _each(
        {
            "a commit that was seen without its term": {"seen": [70]},
            "a term of 7 bytes": {"seen": [70, TERM[:7]]},
            "a term of 9 bytes": {"seen": [70, TERM + b"x"]},
            "a term as text": {"seen": [70, TERM.hex()]},
            "a negative version was seen": {"seen": [-1, TERM]},
            "no operations asked for": {"limit": 0},
            "no bytes asked for": {"bytes_max": 0},
            "a range that ends before it begins": {"have": [[5, 4]]},
            "ranges that overlap": {"have": [[1, 4], [4, 9]]},
            "ranges out of order": {"have": [[5, 6], [1, 2]]},
            "a range of three": {"have": [[1, 2, 3]]},
            "a collection that comes twice": {"collections": ["a", "a"]},
            "an empty collection name": {"collections": [""]},
            "a full that is a number": {"full": 1},
        }
    ):
        yield _refused("PullRequest", name, PULL_REQUEST | change)


def _refused_together() -> Iterator[dict[str, Any]]:
    operation = [0, ENTITY, 1, PAYLOAD]
    transaction = [OTHER, STAMP, [operation]]
    for name, transactions in _each(
        {
            "a transaction id that comes twice": [transaction, transaction],
            "a transaction without operations": [[OTHER, STAMP, []]],
            "an entity that comes twice": [[OTHER, STAMP, [operation, operation]]],
            "a collection that is not there": [[OTHER, STAMP, [[2, ENTITY, 1, PAYLOAD]]]],
            "the second collection is not there": [
                [OTHER, STAMP, [operation, [2, ENTITY, 1, PAYLOAD]]]
            ],
            "an operation cut short": [[OTHER, STAMP, [[0, ENTITY, 1]]]],
            "a payload as text": [[OTHER, STAMP, [[0, ENTITY, 1, "x"]]]],
            "a transaction as a map": [{"id": OTHER}],
        }
    ):
        yield _refused("PushRequest", name, PUSH_REQUEST | {"transactions": transactions})
    pulled = [[0, ENTITY, PAYLOAD]]
    for name, change in _each(
        {
            "versions that stand still": {
                "commits": [[42, DEVICE, 0, pulled], [42, DEVICE, 0, pulled]]
            },
            "versions that go back": {
                "commits": [[42, DEVICE, 0, pulled], [41, DEVICE, 0, pulled]]
            },
            "version 0": {"commits": [[0, DEVICE, 0, pulled]]},
            "an entity twice in a commit": {"commits": [[42, DEVICE, 0, pulled * 2]]},
            "a collection that is not there": {"commits": [[42, DEVICE, 0, [[2, ENTITY, None]]]]},
            "a grant that comes twice": {"granted": ["notes", "notes"]},
            "an empty name in the grant": {"granted": [""]},
            "a cursor below the last commit": {"cursor": 4294967295},
            "a cursor above the head": {"head": 4294967295},
        }
    ):
        yield _refused("PullResponse", name, PULL_RESPONSE | change)
    columns, heads = PULL_COLUMNS, PULL_COLUMNS["heads"]
    for name, change in _each(
        {
            "columns and commits": {"commits": PULL_RESPONSE["commits"]},
            "columns that lack an id": {"columns": columns | {"ids": columns["ids"][16:]}},
            "columns with half an id": {"columns": columns | {"ids": columns["ids"][:-8]}},
            "columns that lack an index": {"columns": columns | {"indexes": b"\0\0"}},
            "columns with too much in them": {"columns": columns | {"values": PAYLOAD * 9}},
            "columns of a collection that is not there": {"collections": ["notes"]},
            "columns whose versions go back": {
                "columns": columns | {"heads": heads[64:] + heads[:64]}
            },
            "columns of version 0": {"columns": columns | {"heads": bytes(8) + heads[8:]}},
            "columns beyond the cursor": {"cursor": 254},
            "columns as a list": {"columns": list(columns.values())},
        }
    ):
        yield _refused("PullResponse", name, PULL_RESPONSE | IN_COLUMNS | change)
    for name, result in _each(
        {
            "an unknown verdict": [4, 1],
            "accepted without a version": [0, 0],
            "superseded without a version": [1],
            "rejected without a code": [3, 0, 0, [], "", "because"],
            "a state of a collection that is not there": [2, 0, 0, [[1, ENTITY, 1, None]]],
            "a state that comes twice": [2, 0, 0, [[0, ENTITY, 1, None], [0, ENTITY, 2, None]]],
        }
    ):
        yield _refused("PushResponse", name, PUSH_RESPONSE | {"results": [result]})
    for name, change in _each(
        {"no subject's name": {"subject": ""}, "too long a subject": {"subject": "x" * 256}}
    ):
        yield _refused("HandshakeResponse", name, HANDSHAKE_RESPONSE | change)
        yield _refused("PushRequest", name, PUSH_REQUEST | change)
    yield _refused(
        "ErrorResponse", "a time to wait below 0", ERROR_RESPONSE | {"retry_after": -1.0}
    )


def _refused_rounds() -> Iterator[dict[str, Any]]:
    """Two halves that do not belong together, or are none."""
    pull, push = ROUND_REQUEST["pull"], ROUND_REQUEST["push"]
    others: Message = {
        "db_id": "office",
        "device_id": OTHER,
        "history": OTHER,
        "cursor": 65535,
        "schema": 255,
    }
    for key, other in others.items():
        message = {"pull": pull, "push": push | {key: other}}
        yield _refused("RoundRequest", f"the halves have different values of {key}", message)
    for key in ("full", "columns"):
        message = {"pull": pull | {key: True}, "push": push}
        yield _refused("RoundRequest", f"a round that asks for {key}", message)
    nothing = {"pull": pull, "push": push | {"transactions": []}}
    yield _refused("RoundRequest", "a round that pushes nothing", nothing)
    one = {"pull": pull | {"have": [[5, 4]]}, "push": push}
    yield _refused("RoundRequest", "its pull alone would be refused", one)
    bad = {"pull": PULL_RESPONSE | {"cursor": 41}, "push": None}
    yield _refused("RoundResponse", "its page alone would be refused", bad)


def _refused_digests() -> Iterator[dict[str, Any]]:
    few, many = bytes(15) + b"\1", bytes(15) + b"\2"
    requests: dict[str, Message] = {
        "a range that ends before it begins": {"after": ENTITY, "last": ENTITY},
        "ids that do not ascend": {"ids": [many, few]},
        "an id twice": {"ids": [few, few]},
        "blocks of nothing": {"block": 0},
    }
    for name, fields in requests.items():
        yield _refused("DigestRequest", name, DIGEST_REQUEST | fields)
    responses: dict[str, Message] = {
        "blocks that do not ascend": {"blocks": [[many, 1, DEVICE], [few, 1, DEVICE]]},
        "a digest of 32 bytes": {"blocks": [[few, 1, bytes(32)]]},
        "a state twice": {"states": [[few, 1, DEVICE, 0, None], [few, 1, DEVICE, 0, None]]},
    }
    for name, fields in responses.items():
        yield _refused("DigestResponse", name, DIGEST_RESPONSE | fields)


def _refused_manifests() -> Iterator[dict[str, Any]]:
    one, two, three = MANIFEST["segments"]
    for name, fields in _each(
        {
            "a collection that is not there": {"segments": [one, [two[0], 2, *two[2:]], three]},
            "collections in turns": {"segments": [two, one, three]},
            "segments out of order": {"segments": [one, three, two]},
            "segments that overlap": {"segments": [one, [*two[:5], OTHER, "zstd"], three]},
            "a segment that ends before it begins": {
                "segments": [one, [*two[:4], ENTITY, bytes(16), "zstd"], three]
            },
            "a segment without rows": {"segments": [one, [*two[:3], 0, *two[4:]], three]},
            "a segment of too many rows": {"segments": [[*one[:3], 65537, *one[4:]], two, three]},
            "a segment without bytes": {"segments": [one, [*two[:2], 0, *two[3:]], three]},
            "a name of 31 bytes": {"segments": [[bytes(31), *one[1:]], two, three]},
            "other rows than there are": {"entities": 65538},
            "a floor above the head": {"floor": 65541},
            "a collection that comes twice": {"collections": ["notes", "notes"]},
        }
    ):
        yield _refused("Manifest", name, MANIFEST | fields)


def _refused(kind: str, name: str, value: Any) -> dict[str, Any]:
    hexed = canonical(value).hex()
    return {"type": kind, "name": name, "code": "invalid_message", "hex": hexed}


# --- digests ----------------------------------------------------------------------------------


def digests() -> Iterator[dict[str, Any]]:
    many = [
        [index % 2, bytes([index]) * 16, 0, b"\x18" + bytes([index])] for index in range(24, 54)
    ]
    for name, operations in _each(
        {
            "one put": [[0, ENTITY, 7, PAYLOAD]],
            "base versions do not count": [[0, ENTITY, 8, PAYLOAD]],
            "a put and a deletion": [[0, ENTITY, 7, PAYLOAD], [1, OTHER, 7, None]],
            "order counts": [[1, OTHER, 7, None], [0, ENTITY, 7, PAYLOAD]],
            "an id like a link": [[1, ID_LIKE_A_LINK, 0, PAYLOAD_LIKE_A_LINK]],
            "thirty operations": many,
            "nothing at all": [],
        }
    ):
        names = ["notes", "Läden/東京"]
        content = [[names[index], entity, payload] for index, entity, _, payload in operations]
        yield {
            "name": name,
            "collections": names,
            "operations": _as_json(operations),
            "sha256": hashlib.sha256(canonical(content)).hexdigest(),
        }


# --- payloads ---------------------------------------------------------------------------------


def payloads() -> Iterator[dict[str, Any]]:
    """What a receiver must take, and what it must refuse, as the value of an entity."""
    for name, value in _each(
        {
            "the largest integer": 2**64 - 1,
            "the smallest integer": -(2**64),
            "the largest integer that every language has": 2**53 - 1,
            "one more than a double can tell apart": 2**53 + 1,
            "an integer that a double would round": -(2**63) - 1,
            "a one that is an integer": 1,
            "a one that is a float": 1.0,
            "a zero that is a float": 0.0,
            "the smallest float": 5e-324,
            "a float beyond all integers": 1.7976931348623157e308,
            "a tenth": 0.1,
            "a null inside": {"a": None},
            "a false": False,
            "an empty map": {},
            "an empty list": [],
            "an empty text": "",
            "empty bytes": b"",
            "keys in the order of their lengths": {"b": 1, "c": 2, "aa": 3, "é": 4},
            "keys longer than 23 bytes": {"k" * 23: 1, "k" * 24: 2, "a" * 25: 3},
            "text with a byte-order mark": "\ufeffmark",
            "composed and decomposed text are two": ["é", "e\u0301"],
            "text beyond the basic plane": "😀",
            "text with a zero": "a\x00b",
            "bytes that look like a link": ID_LIKE_A_LINK,
            "64 lists inside each other": _nested(64),
        }
    ):
        yield {"name": name, "valid": True, "hex": canonical(value).hex(), "value": _as_json(value)}
    refused = {
        "null, which is no value: a deletion has no payload": b"\xf6",
        "65 lists inside each other": canonical(_nested(65)),
        "nothing": b"",
        "two items": b"\x01\x01",
        "an integer in a longer form": b"\x18\x01",
        "an integer of 64 bits in a longer form": b"\x1b" + bytes(7) + b"\x01",
        "an integer above 64 bits, as a tag": b"\xc2\x49\x01" + bytes(8),
        "a length in a longer form": b"\x78\x01a",
        "a float of 32 bits": b"\xfa\x3f\x80\x00\x00",
        "a float of 16 bits": b"\xf9\x3c\x00",
        "negative zero": b"\xfb\x80" + bytes(7),
        "not a number": b"\xfb\x7f\xf8" + bytes(6),
        "infinity": b"\xfb\x7f\xf0" + bytes(6),
        "a longer key before a shorter one": b"\xa2\x62aa\x01\x61b\x02",
        "keys of one length out of order": b"\xa2\x61b\x01\x61a\x02",
        "a key that comes twice": b"\xa2\x61a\x01\x61a\x01",
        "a key that is a number": b"\xa1\x01\x02",
        "a key that is bytes": b"\xa1\x41a\x02",
        "half a surrogate": b"\x63\xed\xa0\x80",
        "a surrogate pair in UTF-8": b"\x66\xed\xa0\xbd\xed\xb8\x80",
        "text that is not UTF-8": b"\x61\xff",
        "a list without an end": b"\x9f\x01\xff",
        "text in pieces": b"\x7f\x61a\xff",
        "a date as a tag": b"\xc1\x00",
        "a link": b"\xd8\x2a\x51\x00" + ID_LIKE_A_LINK,
        "undefined": b"\xf7",
        "a simple value": b"\xe0",
        "a list cut off": b"\x82\x01",
    }
    for name, data in refused.items():
        yield {"name": name, "valid": False, "hex": data.hex()}


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


# --- segments ---------------------------------------------------------------------------------

#: Rows of a segment: id, version, device, timestamp, payload.
ROWS: Final = [
    [ENTITY, 42, DEVICE, STAMP, PAYLOAD],
    [ID_LIKE_A_LINK, 2**63 - 1, ID_LIKE_A_LINK, 2**64 - 1, PAYLOAD_LIKE_A_LINK],
    [b"\xff" * 16, 1, DEVICE, 0, b"\xf6\xf6"],
]


def _columns(rows: list[Any]) -> bytes:
    return b"".join(
        (
            b"".join(row[0] for row in rows),
            b"".join(
                row[1].to_bytes(8, "big") + row[2] + row[3].to_bytes(8, "big") for row in rows
            ),
            b"".join(len(row[4]).to_bytes(4, "big") for row in rows),
            b"".join(row[4] for row in rows),
        )
    )


def _stored_zstd(data: bytes) -> bytes:
    """One frame with one block that is not compressed (RFC 8878): the same bytes everywhere."""
    block = (len(data) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\xa0" + len(data).to_bytes(4, "little") + block + data


def _stored_gzip(data: bytes) -> bytes:
    """The same as one member of gzip (RFC 1952)."""
    size = len(data).to_bytes(2, "little")
    block = b"\x01" + size + bytes(255 - byte for byte in size) + data
    tail = zlib.crc32(data).to_bytes(4, "little") + len(data).to_bytes(4, "little")
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" + block + tail


def _segment(held: list[Any], body: bytes | None = None, **changes: Any) -> tuple[Message, bytes]:
    header = {
        "collection": "notes",
        "rows": len(held),
        "first": held[0][0],
        "last": held[-1][0],
        "packing": "none",
        "size": len(_columns(held)),
    } | changes
    head = canonical(header)
    packed = _columns(held) if body is None else body
    return header, b"EntiDB-segment\0\1" + len(head).to_bytes(4, "big") + head + packed


def segments() -> Iterator[dict[str, Any]]:
    rows = sorted(ROWS)
    whole = _columns(rows)
    for name, made in _each(
        {
            "three rows": _segment(rows),
            "one row": _segment(rows[:1]),
            "a stored block of zstd": _segment(rows, _stored_zstd(whole), packing="zstd"),
            "a stored block of gzip": _segment(rows, _stored_gzip(whole), packing="gzip"),
            "an unknown key of the header": _segment(rows, a_newer_key=[1]),
        }
    ):
        header, data = made
        header = {key: item for key, item in header.items() if key != "a_newer_key"}
        entities = rows[: header["rows"]]
        yield {
            "name": name,
            "hex": data.hex(),
            "header": _as_json(header),
            "entities": _as_json(entities),
        }
    for name, data in _each(_broken_segments(rows, whole)):
        yield {"name": name, "hex": data.hex()}


def _broken_segments(rows: list[Any], whole: bytes) -> dict[str, bytes]:
    data = _segment(rows)[1]
    twice = [rows[0], [rows[0][0], *rows[1][1:]], rows[2]]
    turned = [rows[0], rows[2], rows[1], [b"\xff" * 15 + b"\xff", *rows[2][1:]]]
    empty = [rows[0], [*rows[1][:4], b""], rows[2]]
    unborn = [rows[0], [rows[1][0], 0, *rows[1][2:]], rows[2]]
    return {
        "nothing": b"",
        "another magic": b"entidb-segment" + data[14:],
        "another version": data[:15] + b"\2" + data[16:],
        "a header without an end": data[:16] + b"\xff" * 4 + data[20:],
        "a header that is no map": b"EntiDB-segment\0\1\0\0\0\1\x01" + whole,
        "cut off": data[:-1],
        "one byte too many": data + b"\0",
        "a size that is too small": _segment(rows, size=len(whole) - 1)[1],
        "a size that no such segment has": _segment(rows, size=2**62)[1],
        "too many rows": _segment(rows, rows=65537)[1],
        "one row less than there are": _segment(rows, rows=2)[1],
        "one row more than there are": _segment(rows, rows=4)[1],
        "another first id": _segment(rows, first=bytes(16))[1],
        "another last id": _segment(rows[:2], last=b"\xff" * 16)[1],
        "an id that comes twice": _segment(twice)[1],
        "ids that do not ascend": _segment(turned)[1],
        "a value without bytes": _segment(empty)[1],
        "version 0": _segment(unborn)[1],
        "no collection": _segment(rows, collection="")[1],
        "an unknown packing": _segment(rows, packing="brotli")[1],
        "not packed as it says": _segment(rows, packing="zstd")[1],
        "a frame cut off": _segment(rows, _stored_zstd(whole)[:-1], packing="zstd")[1],
        "something behind the frame": _segment(rows, _stored_zstd(whole) + b"\0", packing="zstd")[
            1
        ],
        "something behind the member": _segment(rows, _stored_gzip(whole) + b"\0", packing="gzip")[
            1
        ],
        "more in the frame than it says": _segment(
            rows, _stored_zstd(whole + b"\0"), packing="zstd"
        )[1],
        "less in the frame than it says": _segment(rows, _stored_zstd(whole[:-1]), packing="zstd")[
            1
        ],
        "a size that does not fit its value": _segment(
            rows, whole[:147] + bytes([whole[147] ^ 1]) + whole[148:]
        )[1],
    }


# --- answers that nobody may believe ----------------------------------------------------------


def unbelieved() -> Iterator[dict[str, Any]]:
    """Answers whose form is right and that cannot be true of their request: nothing of them may
    be applied or settled."""
    one = PUSH_REQUEST | {"collections": ["notes"], "cursor": 5}
    two = [[bytes([n]) * 16, STAMP, [[0, bytes([n]) * 16, 0, PAYLOAD]]] for n in (1, 2)]
    push = one | {"transactions": two}
    for name, results, head in (
        ("accepted beyond the head", [[0, 6], [0, 8]], 7),
        ("superseded beyond the head", [[0, 6], [1, 8]], 7),
        ("two accepted as one version", [[0, 6], [0, 6]], 7),
        ("accepted and superseded as one version", [[0, 6], [1, 6]], 7),
        ("one verdict too few", [[0, 6]], 7),
        ("one verdict too many", [[0, 6], [0, 7], [2]], 7),
    ):
        answer = PUSH_RESPONSE | {"results": results, "head": head}
        yield _unbelieved("PushRequest", "PushResponse", name, push, answer)
    pull = PULL_REQUEST | {"cursor": 41, "have": [], "collections": None}
    page = PULL_RESPONSE | {"cursor": 50, "head": 60, "commits": [], "collections": ["notes"]}

    def commit(version: int, payload: bytes | None = PAYLOAD) -> list[Any]:
        return [version, DEVICE, STAMP, [[0, ENTITY, payload]]]

    for name, change in _each(
        {
            "a version at the cursor": {"commits": [commit(41)]},
            "a version below the cursor": {"commits": [commit(7)]},
            "a page that goes nowhere": {"cursor": 41},
            "a page that goes back": {"cursor": 40},
            "a payload that is null": {"commits": [commit(42, b"\xf6")]},
            "a payload that is not canonical": {"commits": [commit(42, b"\x18\x01")]},
            "a payload with a tag": {"commits": [commit(42, b"\xc1\x00")]},
            "one entity in two commits": {"commits": [commit(42), commit(43)]},
        }
    ):
        yield _unbelieved("PullRequest", "PullResponse", name, pull, page | change)


def _unbelieved(
    asked: str, kind: str, name: str, request: Message, answer: Message
) -> dict[str, Any]:
    return {
        "request_type": asked,
        "request": _as_json(request),
        "type": kind,
        "name": name,
        "hex": canonical(answer).hex(),
    }


def _each(cases: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    return cases.items()


def build() -> str:
    vectors = {
        "valid": [*valid()],
        "refused": [*refused()],
        "digests": [*digests()],
        "payloads": [*payloads()],
        "segments": [*segments()],
        "unbelieved": [*unbelieved()],
    }
    lines = []
    for name, rows in vectors.items():
        body = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
        lines.append(f'  "{name}": [\n{body}\n  ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(build(), encoding="utf-8")
    print(f"wrote {TARGET.name}")
