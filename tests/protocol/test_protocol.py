"""The messages: vectors, round trips against an independent encoder, and everything refused."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import to_builtins
from msgspec.structs import fields, replace

from entidb import cbor, protocol
from entidb.db.replica import ReplicaState
from entidb.errors import ERROR_TABLE, CborDecodeError, ProtocolError, SyncCodecError
from entidb.protocol import (
    HAVE_RANGES_MAX,
    LIMITS,
    PATHS,
    DigestRequest,
    DigestResponse,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    Limits,
    Manifest,
    PullColumns,
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    PushOperation,
    PushRequest,
    PushResponse,
    PushResult,
    PushTransaction,
    RoundRequest,
    RoundResponse,
    SegmentInfo,
    ServerState,
    SnapshotRequest,
    Verdict,
    decode,
    decode_request,
    decode_response,
    encode,
    expanded,
)
from entidb.sync.apply.applier import MemorySyncApplier
from entidb.sync.apply.seam import BatchLimits

ROOT = Path(__file__).parent.parent.parent
VECTORS = json.loads((ROOT / "tests/vectors/protocol.json").read_text(encoding="utf-8"))
DOCS = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        HandshakeRequest,
        HandshakeResponse,
        PullRequest,
        PullResponse,
        PushRequest,
        RoundRequest,
        RoundResponse,
        PushResponse,
        DigestRequest,
        DigestResponse,
        SnapshotRequest,
        Manifest,
        ErrorResponse,
    )
}

#: 16 bytes that parse as a content identifier: DAG-CBOR encoders like to make links of them.
ID_LIKE_A_LINK = bytes.fromhex("0171120c") + bytes(12)
DEVICE = bytes(range(16))
HISTORY = bytes(range(16, 32))


def canonical(value: Any) -> bytes:
    """cbor2's bytes for ``value``, keys ordered by hand: its canonical form shortens floats."""

    def ordered(item: Any) -> Any:
        if isinstance(item, dict):
            keys = sorted(item, key=lambda key: (len(key.encode()), key.encode()))
            return {key: ordered(item[key]) for key in keys}
        return [ordered(part) for part in item] if isinstance(item, list | tuple) else item

    return cbor2.dumps(ordered(value))


def from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"hex"}:
            return bytes.fromhex(value["hex"])
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value


def as_lists(message: Any) -> Any:
    """``message`` as maps and lists, the way cbor2 reads it back."""
    return cbor2.loads(cbor2.dumps(envelope_of(message)))


def envelope_of(message: Any) -> dict[str, Any]:
    """``message`` as it is written: a schema of 0 is none, and so is what is null of these."""
    envelope: dict[str, Any] = to_builtins(message, builtin_types=(bytes,))
    return without_nothing(envelope)


def without_nothing(envelope: dict[str, Any]) -> dict[str, Any]:
    nothing = (("schema", 0), ("subject", None), ("seen", None), ("term", None), ("live", None))
    return {
        name: without_nothing(item) if name in ("pull", "push") and item else item
        for name, item in envelope.items()
        if (name, item) not in nothing
    }


def named(row: dict[str, Any]) -> str:
    return "-".join(str(row[key]) for key in ("type", "name") if key in row)


def push(**changes: Any) -> PushRequest:
    request = PushRequest(
        db_id="household",
        device_id=DEVICE,
        history=HISTORY,
        cursor=7,
        collections=["notes"],
        transactions=[
            PushTransaction(bytes([n]) * 16, 1, [PushOperation(0, DEVICE, 3, b"\x01")])
            for n in range(3)
        ],
    )
    return replace(request, **changes)


def pull(**changes: Any) -> PullRequest:
    request = PullRequest(
        db_id="household", device_id=DEVICE, history=HISTORY, cursor=7, limit=10, bytes_max=1000
    )
    return replace(request, **changes)


def limits(**changes: Any) -> Limits:
    return replace(LIMITS, **changes)


# --- vectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", VECTORS["valid"], ids=named)
def test_a_valid_vector_means_what_it_says(row: dict[str, Any]):
    message = decode(KINDS[row["type"]], bytes.fromhex(row["hex"]))
    assert as_lists(message) == from_json(row["message"])
    again = encode(message)
    assert again == canonical(from_json(row["message"]))
    assert (again.hex() == row["hex"]) is row["canonical"]


@pytest.mark.parametrize("row", VECTORS["refused"], ids=named)
def test_a_vector_to_refuse_is_refused_with_its_code(row: dict[str, Any]):
    with pytest.raises(ERROR_TABLE[row["code"]].error) as caught:
        decode(KINDS[row["type"]], bytes.fromhex(row["hex"]))
    assert caught.value.code == row["code"]


@pytest.mark.parametrize("row", VECTORS["digests"], ids=named)
def test_a_digest_vector_is_reproduced(row: dict[str, Any]):
    operations = [PushOperation(*operation) for operation in from_json(row["operations"])]
    digest = protocol.operations_digest(row["collections"], operations)
    assert digest.hex() == row["sha256"]


@pytest.mark.parametrize("row", VECTORS["payloads"], ids=named)
def test_a_payload_vector_is_taken_or_refused_as_it_says(row: dict[str, Any]):
    data = bytes.fromhex(row["hex"])
    assert (cbor.all_pass([data]) or _passes(data)) is row["valid"]
    if row["valid"]:
        value = cbor.check(data)
        assert repr(value) == repr(from_json(row["value"]))
        assert cbor.encode(value) == data


def _passes(data: bytes) -> bool:
    """As a server and a device look at a payload from outside when the quick look says no."""
    try:
        return cbor.check(data) is not None
    except CborDecodeError:
        return False


@pytest.mark.parametrize("row", VECTORS["unbelieved"], ids=named)
def test_an_answer_that_cannot_be_true_changes_nothing_on_a_device(row: dict[str, Any]):
    request = decode(KINDS[row["request_type"]], canonical(from_json(row["request"])))
    answer = decode(KINDS[row["type"]], bytes.fromhex(row["hex"]))
    applier = MemorySyncApplier()
    with applier.database.write() as writer:
        state = ReplicaState(
            db_id=request.db_id, history=request.history, cursor=request.cursor, full=False
        )
        writer.set_sync_state(state)
    believe = _page if isinstance(answer, PullResponse) else _verdicts
    with pytest.raises((ProtocolError, SyncCodecError), match="nothing was"):
        believe(applier, request, answer)
    assert applier.state() == state
    assert applier.stage() is None


def _page(applier: MemorySyncApplier, request: Any, answer: PullResponse) -> None:
    if answer.has_more:
        applier.stage_page(request, answer, [])
    else:
        applier.apply(request, answer)


def _verdicts(applier: MemorySyncApplier, request: PushRequest, answer: Any) -> None:
    notes = applier.database.collection("notes")
    for number in range(len(request.transactions)):
        notes.add({"number": number})
    batch = applier.prepare(BatchLimits())
    assert batch is not None and len(batch.transactions) == len(request.transactions)
    try:
        applier.settle(batch, answer, None)
    finally:
        assert applier.ready() == len(request.transactions)
        assert [b.ranges for b in applier.inflight()] == [batch.ranges]


def test_digests_differ_in_order_and_content_but_not_in_base_versions():
    of = {row["name"]: row["sha256"] for row in VECTORS["digests"]}
    assert of["one put"] == of["base versions do not count"]
    assert len(set(of.values())) == len(of) - 1


def test_the_vectors_are_those_the_script_writes():
    assert _make_vectors().build() == (ROOT / "tests/vectors/protocol.json").read_text("utf-8")


def test_every_field_of_every_message_has_a_vector_without_it_and_one_of_another_type():
    names = {(row["type"], row["name"]) for row in VECTORS["refused"]}
    for kind, message in KINDS.items():
        for field in fields(message):
            assert (kind, f"{field.encode_name} has another type") in names
            if field.required:
                assert (kind, f"{field.encode_name} is missing") in names


def _make_vectors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_vectors", ROOT / "scripts/make_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- round trips ------------------------------------------------------------------------------

ids = st.binary(min_size=16, max_size=16) | st.just(ID_LIKE_A_LINK)
sequences = st.integers(0, 2**63 - 1) | st.integers(0, 70_000)
stamps = st.integers(0, 2**64 - 1)
names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60) | st.just(
    "ß" * 127
)
payloads = st.binary(max_size=300) | st.just(ID_LIKE_A_LINK) | st.just(bytes(5000)) | st.none()
name_lists = st.lists(names, min_size=1, max_size=4, unique=True)


def of_collections(count: int, fields_after: tuple[st.SearchStrategy[Any], ...], kind: Any) -> Any:
    """Lists of operations, no entity twice, on ``count`` collections."""
    one = st.builds(kind, st.integers(0, count - 1), ids, *fields_after)
    entity = lambda operation: (operation.collection, operation.entity_id)  # noqa: E731
    return st.lists(one, min_size=1, max_size=4, unique_by=entity)


@st.composite
def push_requests(draw: st.DrawFn) -> PushRequest:
    collections = draw(name_lists)
    operations = of_collections(len(collections), (sequences, payloads), PushOperation)
    transaction = st.builds(PushTransaction, ids, stamps, operations)
    transactions = st.lists(transaction, max_size=5, unique_by=lambda item: item.transaction_id)
    return PushRequest(
        db_id=draw(names),
        device_id=draw(ids),
        history=draw(ids),
        cursor=draw(sequences),
        collections=collections,
        transactions=draw(transactions),
        schema=draw(st.just(0) | sequences),
        subject=draw(st.none() | st.text(min_size=1, max_size=255)),
    )


@st.composite
def pull_responses(draw: st.DrawFn) -> PullResponse:
    collections = draw(name_lists)
    operations = of_collections(len(collections), (payloads,), PullOperation)
    versions = sorted(draw(st.sets(st.integers(1, 2**63 - 1), max_size=5)))
    cursor = draw(st.integers(versions[-1] if versions else 0, 2**63 - 1))
    commits = [
        PullCommit(version, draw(ids), draw(stamps), draw(operations)) for version in versions
    ]
    columns = in_columns(commits) if draw(st.booleans()) else None
    return PullResponse(
        collections=collections,
        commits=[] if columns is not None else commits,
        columns=columns,
        cursor=cursor,
        has_more=draw(st.booleans()),
        head=draw(st.integers(cursor, 2**63 - 1)),
        floor=draw(sequences),
        time=draw(sequences),
        granted=draw(st.none() | name_lists),
    )


def in_columns(commits: list[PullCommit]) -> PullColumns:
    rows = [(commit, op) for commit in commits for op in commit.operations]
    return PullColumns(
        ids=b"".join(op.entity_id for _, op in rows),
        heads=b"".join(
            commit.version.to_bytes(8, "big")
            + commit.device_id
            + commit.timestamp.to_bytes(8, "big")
            for commit, _ in rows
        ),
        sizes=b"".join(
            (2**32 - 1 if op.payload is None else len(op.payload)).to_bytes(4, "big")
            for _, op in rows
        ),
        values=b"".join(op.payload or b"" for _, op in rows),
        indexes=b"".join(op.collection.to_bytes(2, "big") for _, op in rows),
    )


@st.composite
def push_responses(draw: st.DrawFn) -> PushResponse:
    collections = draw(name_lists)
    states = of_collections(len(collections), (sequences, payloads), ServerState)
    versions = st.integers(1, 2**63 - 1)
    result = st.one_of(
        st.builds(PushResult, st.sampled_from([0, 1]), versions, stamps),
        st.builds(PushResult, st.just(2), st.just(0), st.just(0), states | st.just([])),
        st.builds(
            PushResult,
            st.just(3),
            st.just(0),
            st.just(0),
            st.just([]),
            st.text(min_size=1, max_size=9),
            st.text(max_size=40),
        ),
    )
    # Many that differ in their versions alone are written in another way.
    verdict = draw(st.sampled_from([0, 1]))
    alike = st.builds(PushResult, st.just(verdict), st.integers(1, 2**20) | versions)
    results = draw(st.lists(result, max_size=6) | st.lists(alike, min_size=9, max_size=12))
    if len(results) > 8 and draw(st.booleans()):
        results[draw(st.integers(0, len(results) - 1))] = draw(result)
    return PushResponse(
        results=results,
        collections=collections,
        head=draw(sequences),
        time=draw(sequences),
    )


@st.composite
def pull_requests(draw: st.DrawFn) -> PullRequest:
    ends = sorted(draw(st.sets(sequences, max_size=8)))
    return PullRequest(
        db_id=draw(names),
        device_id=draw(ids),
        history=draw(ids),
        cursor=draw(sequences),
        have=list(zip(ends[::2], ends[1::2], strict=False)),
        limit=draw(st.integers(1, 2**63 - 1)),
        bytes_max=draw(st.integers(1, 2**63 - 1)),
        collections=draw(st.none() | st.lists(names, max_size=3, unique=True)),
        full=draw(st.booleans()),
        schema=draw(st.just(0) | sequences),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    collections = draw(name_lists)
    segments = []
    for collection in range(len(collections)):
        ends = sorted(draw(st.sets(ids, max_size=6)))
        for first, last in zip(ends[::2], ends[1::2], strict=False):
            packed = draw(st.sampled_from(["zstd", "gzip"]))
            size, rows = draw(st.integers(1, 2**63 - 1)), draw(st.integers(1, 65536))
            name = draw(st.binary(min_size=32, max_size=32))
            segments.append(SegmentInfo(name, collection, size, rows, first, last, packed))
    floor, head = sorted((draw(sequences), draw(sequences)))
    return Manifest(
        history=draw(ids),
        head=head,
        floor=floor,
        collections=collections,
        segments=segments,
        entities=sum(segment.rows for segment in segments),
        ends=draw(sequences),
        time=draw(sequences),
        granted=draw(st.none() | name_lists),
    )


snapshot_requests = st.builds(
    SnapshotRequest,
    db_id=names,
    device_id=ids,
    history=ids | st.none(),
    collections=st.none() | name_lists,
    packings=st.lists(st.text(min_size=1, max_size=9), max_size=3),
    schema=st.just(0) | sequences,
)
handshake_requests = st.builds(
    HandshakeRequest,
    major=sequences,
    minor=sequences,
    db_id=names,
    device_id=ids,
    history=ids | st.none(),
    cursor=sequences,
    client=st.text(max_size=255),
    schema=st.just(0) | sequences,
)
handshake_responses = st.builds(
    HandshakeResponse,
    major=sequences,
    minor=sequences,
    history=ids,
    head=sequences,
    floor=sequences,
    limits=st.builds(Limits, **dict.fromkeys(Limits.__struct_fields__, sequences)),
    features=st.lists(st.text(max_size=9), max_size=3),
    time=sequences,
    granted=st.none() | name_lists,
    subject=st.none() | st.text(min_size=1, max_size=255),
)
error_responses = st.builds(
    ErrorResponse,
    code=st.sampled_from(sorted(ERROR_TABLE)),
    message=st.text(max_size=40),
    retryable=st.booleans(),
    retry_after=st.none() | st.floats(0.5, 1e9),
    details=st.dictionaries(st.text(max_size=5), st.integers(-9, 2**63) | ids, max_size=3),
)
messages: st.SearchStrategy[Any] = st.one_of(
    handshake_requests,
    handshake_responses,
    pull_requests(),
    pull_responses(),
    push_requests(),
    push_responses(),
    snapshot_requests,
    manifests(),
    error_responses,
)


@given(messages)
def test_what_is_encoded_is_canonical_and_decodes_to_itself(message: Any):
    data = encode(message)
    assert data == canonical(envelope_of(message))
    assert decode(type(message), data) == message


@given(messages)
def test_unknown_keys_are_ignored(message: Any):
    envelope = to_builtins(message, builtin_types=(bytes,)) | {"from a newer minor version": [1]}
    assert decode(type(message), canonical(envelope)) == message


@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=200))
def test_garbage_raises_a_protocol_error_and_nothing_else(kind: str, data: bytes):
    with pytest.raises(ProtocolError):
        decode(KINDS[kind], data)


@given(messages, st.data())
def test_a_damaged_message_decodes_or_raises_a_protocol_error(message: Any, data: st.DataObject):
    raw = bytearray(encode(message))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= data.draw(st.integers(1, 255))
    try:
        damaged = decode(type(message), bytes(raw))
    except ProtocolError:
        return
    # What passes is a message like any other: it keeps the promises of its type.
    assert decode(type(message), encode(damaged)) == damaged


@given(messages, st.data())
def test_a_message_cut_off_anywhere_is_no_cbor(message: Any, data: st.DataObject):
    raw = encode(message)
    with pytest.raises(SyncCodecError):
        decode(type(message), raw[: data.draw(st.integers(0, len(raw) - 1))])


@given(messages, st.data())
def test_a_key_that_comes_twice_is_no_cbor(message: Any, data: st.DataObject):
    envelope = envelope_of(message)
    key = data.draw(st.sampled_from(sorted(envelope)))
    twice = bytes([0xA0 + len(envelope) + 1])
    for name in sorted(envelope, key=lambda name: (len(name), name)):
        item = canonical(name) + canonical(envelope[name])
        twice += item * 2 if name == key else item
    with pytest.raises(SyncCodecError):
        decode(type(message), twice)


# --- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["d82a", "d9002a", "da0000002a", "db000000000000002a"])
@pytest.mark.parametrize("length", ["51", "5811", "590011", "5a00000011", "5b0000000000000011"])
def test_a_link_is_refused_in_every_form_it_can_have(head: str, length: str):
    link = bytes.fromhex(head + length + "00") + ID_LIKE_A_LINK
    plain = encode(push(device_id=ID_LIKE_A_LINK))
    assert decode(PushRequest, plain).device_id == ID_LIKE_A_LINK
    with pytest.raises(SyncCodecError):
        decode(PushRequest, plain.replace(b"\x50" + ID_LIKE_A_LINK, link))


@given(st.binary(max_size=40), st.binary(max_size=40))
@example(b"", b"")
def test_bytes_that_only_look_like_a_link_pass(before: bytes, after: bytes):
    payload = before + b"\xd8\x2a\x51\x00" + ID_LIKE_A_LINK + after
    operations = [PushOperation(0, ID_LIKE_A_LINK, 0, payload)]
    request = push(transactions=[PushTransaction(ID_LIKE_A_LINK, 0, operations)])
    assert decode(PushRequest, encode(request)) == request


# --- limits -----------------------------------------------------------------------------------


def test_a_message_over_its_limit_is_too_large_before_it_is_read():
    data = encode(push())
    assert decode(PushRequest, data, limits(message_bytes_max=len(data))) == push()
    with pytest.raises(ProtocolError) as caught:
        decode(PushRequest, data, limits(message_bytes_max=len(data) - 1))
    assert caught.value.code == "too_large"


def test_a_push_with_more_operations_than_the_limit_is_too_large():
    data = encode(push())
    assert decode(PushRequest, data, limits(push_operations_max=3)) == push()
    with pytest.raises(ProtocolError) as caught:
        decode(PushRequest, data, limits(push_operations_max=2))
    assert caught.value.code == "too_large"


def test_a_transaction_alone_may_have_more_operations_than_a_batch():
    operations = [PushOperation(0, bytes([n]) * 16, 0, None) for n in range(9)]
    request = push(transactions=[PushTransaction(DEVICE, 0, operations)])
    assert decode(PushRequest, encode(request), limits(push_operations_max=2)) == request


@pytest.mark.parametrize("message", [push(collections=["a", "b"]), pull(collections=["a", "b"])])
def test_more_collections_than_the_limit_are_too_large(message: Any):
    data = encode(message)
    assert decode(type(message), data, limits(collections_max=2)) == message
    with pytest.raises(ProtocolError) as caught:
        decode(type(message), data, limits(collections_max=1))
    assert caught.value.code == "too_large"


def test_the_number_of_have_ranges_is_bounded():
    ranges = [(2 * n, 2 * n) for n in range(HAVE_RANGES_MAX + 1)]
    assert decode(PullRequest, encode(pull(have=ranges[1:]))).have == ranges[1:]
    with pytest.raises(ProtocolError) as caught:
        decode(PullRequest, encode(pull(have=ranges)))
    assert caught.value.code == "too_large"


def test_a_transaction_over_its_limit_is_left_to_the_verdict_so_that_it_stops_no_other():
    request = push()
    data = encode(request)
    assert decode(PushRequest, data, limits(transaction_bytes_max=1)) == request
    assert protocol.transaction_bytes(request.transactions[0].operations) == 64 + 1


def test_a_transaction_of_the_largest_size_fits_into_a_message():
    most = LIMITS.transaction_bytes_max // 64
    operation = len(canonical([4095, DEVICE, 2**63 - 1, None]))
    frame = len(canonical([DEVICE, 2**64 - 1, []]))
    names_at_most = LIMITS.collections_max * 258
    assert most * operation + frame + names_at_most + 1000 < LIMITS.message_bytes_max


def test_nesting_without_end_is_no_cbor():
    with pytest.raises(SyncCodecError):
        decode(PushRequest, b"\x81" * 1_000_000)


def test_the_error_names_the_place():
    operations = [PushOperation(0, DEVICE, 0, None), PushOperation(5, DEVICE, 0, None)]
    request = push(transactions=[PushTransaction(DEVICE, 0, operations)])
    with pytest.raises(ProtocolError, match=re.escape("$.transactions[0].operations[1]")):
        decode(PushRequest, canonical(as_lists(request)))


# --- paths and answers ------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PATHS))
def test_each_path_takes_its_request(path: str):
    request: Any = {
        HandshakeRequest: HandshakeRequest(
            major=1, minor=0, db_id="a", device_id=DEVICE, history=None, cursor=0
        ),
        PullRequest: pull(),
        PushRequest: push(),
        RoundRequest: RoundRequest(
            pull=replace(pull(), cursor=push().cursor, have=[]), push=push()
        ),
        DigestRequest: DigestRequest(
            db_id="a", device_id=DEVICE, history=DEVICE, cursor=3, collection="notes", ids=[DEVICE]
        ),
        SnapshotRequest: SnapshotRequest(db_id="a", device_id=DEVICE, packings=["gzip"]),
    }[PATHS[path]]
    assert decode_request(path, encode(request)) == request
    assert protocol.path_of(request) == path
    answer = PATHS[path].__name__[:-7] + "Response"
    answer = "Manifest" if answer == "SnapshotResponse" else answer
    assert protocol.response_type(request).__name__ == answer


def many(*odd: PushTransaction) -> PushRequest:
    """Transactions of one operation each, more than are looked at one by one; and ``odd`` ones."""
    plain = [
        PushTransaction(bytes([number]) * 16, 0, [PushOperation(0, DEVICE, 0, b"\x01")])
        for number in range(1, 21)
    ]
    return replace(push(), collections=["a", "b"], transactions=[*plain[:10], *odd, *plain[10:]])


def test_what_is_wrong_with_one_of_many_is_found_as_among_few():
    wrote = [PushOperation(0, DEVICE, 0, b"\x01")]
    fine = PushTransaction(b"\x99" * 16, 0, [*wrote, PushOperation(1, HISTORY, 0, None)])
    for request in (many(), many(fine)):
        assert decode(PushRequest, encode(request)) == request
        count = protocol.operations_count(request)
        assert decode(PushRequest, encode(request), limits(push_operations_max=count)) == request
        with pytest.raises(ProtocolError, match=f"have {count} operations"):
            decode(PushRequest, encode(request), limits(push_operations_max=count - 1))
    for odd, said in (
        (PushTransaction(b"\x03" * 16, 0, wrote), r"transactions\[10\].*id came before"),
        (PushTransaction(b"\x99" * 16, 0, [PushOperation(2, DEVICE, 0, b"\x01")]), r"\[10\]"),
        (PushTransaction(b"\x99" * 16, 0, []), r"\[10\]"),
        (PushTransaction(b"\x99" * 16, 0, [*wrote, *wrote]), r"\[10\]"),
    ):
        with pytest.raises((ProtocolError, SyncCodecError), match=said):
            decode(PushRequest, encode(many(odd)))


def test_an_unknown_path_is_not_found():
    with pytest.raises(ProtocolError) as caught:
        decode_request("/v1/peek", b"\xa0")
    assert caught.value.code == "not_found"


def test_a_push_is_answered_with_one_result_for_each_transaction():
    results = [PushResult(Verdict.ACCEPTED, 8)] * 3
    answer = PushResponse(results=results, collections=[], head=8, time=0)
    assert decode_response(push(), encode(answer)) == answer
    with pytest.raises(ProtocolError, match="2 results answer 3 transactions"):
        decode_response(push(), encode(replace(answer, results=results[:2])))


def test_counts_for_statistics_add_up():
    assert protocol.operations_count(push()) == 3
    assert protocol.payload_bytes(push()) == 3
    commit = PullCommit(
        1, DEVICE, 0, [PullOperation(0, DEVICE, b"abc"), PullOperation(0, HISTORY, None)]
    )
    page = PullResponse(
        collections=["a"], commits=[commit], cursor=1, has_more=False, head=1, floor=0, time=0
    )
    assert (protocol.operations_count(page), protocol.payload_bytes(page)) == (2, 3)


def test_columns_say_the_same_as_commits():
    operations = [PullOperation(1, DEVICE, b"abc"), PullOperation(0, HISTORY, None)]
    commits = [
        PullCommit(3, DEVICE, 2**63, operations),
        PullCommit(9, HISTORY, 7, [PullOperation(0, DEVICE, b"")]),
    ]
    page = PullResponse(
        collections=["a", "b"], commits=commits, cursor=9, has_more=False, head=9, floor=0, time=0
    )
    columns = replace(page, commits=[], columns=in_columns(commits))
    again = decode(PullResponse, encode(columns))
    assert expanded(again) == page
    assert expanded(page) is page
    assert protocol.operations_count(again) == protocol.operations_count(page) == 3
    assert protocol.payload_bytes(again) == protocol.payload_bytes(page) == 3


@pytest.mark.parametrize("tombstone", [False, True])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 200])
def test_columns_are_cut_into_rows_at_any_number(count: int, tombstone: bool):
    payloads = [bytes([number]) * (number % 5) for number in range(count)]
    operations = [
        PullOperation(number % 3, number.to_bytes(16, "big"), payload)
        for number, payload in enumerate(payloads)
    ]
    if tombstone and count:
        operations[count // 2] = replace(operations[count // 2], payload=None)
    commits = [
        PullCommit(2**62 + number, bytes([number]) * 16, 2**63 + number, [op])
        for number, op in enumerate(operations)
    ]
    rows = protocol.column_rows(in_columns(commits))
    assert rows.ids == [op.entity_id for op in operations]
    assert rows.payloads == [op.payload for op in operations]
    assert list(rows.indexes) == [op.collection for op in operations]
    assert rows.versions == [commit.version for commit in commits]
    assert rows.timestamps == [commit.timestamp for commit in commits]
    assert rows.devices == [commit.device_id for commit in commits]


# --- the document -----------------------------------------------------------------------------


def test_the_error_table_of_the_document_is_that_of_the_code():
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) \| (yes|no) \| `(\w+)` \| (.+) \|$", DOCS, re.MULTILINE
    )
    assert rows == [
        (
            row.code,
            str(row.status),
            "yes" if row.retryable else "no",
            row.error.__name__,
            row.action,
        )
        for row in ERROR_TABLE.values()
    ]


@pytest.mark.parametrize("kind", [*KINDS.values(), Limits], ids=lambda kind: kind.__name__)
def test_the_cddl_has_exactly_the_fields_of_the_message(kind: Any):
    rule = re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower()
    found = re.search(rf"^{rule} = {{\n(.*?)^}}$", DOCS, re.MULTILINE | re.DOTALL)
    assert found is not None
    keys = re.findall(r'(\? )?"(\w+)":', re.sub(r";.*", "", found[1]))
    documented = {name: not optional for optional, name in keys}
    assert documented == {field.encode_name: field.required for field in fields(kind)}


def test_the_document_names_every_path_and_limit():
    for word in (*PATHS, str(HAVE_RANGES_MAX), protocol.CONTENT_TYPE, *Limits.__struct_fields__):
        assert word in DOCS
    assert f"version {protocol.PROTOCOL_MAJOR}.{protocol.PROTOCOL_MINOR}" in DOCS


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"db_id": None}, "field db_id: it is missing"),
        ({"db_id": 5}, "field db_id: expected str, got int"),
        ({"device_id": b"short"}, "field device_id: expected bytes of length >= 16"),
        ({"transactions": [5]}, "field transactions[0]: expected"),
    ],
)
def test_what_is_wrong_with_a_message_is_said_in_our_words(
    changes: dict[str, Any], said: str
) -> None:
    raw = {**cbor.decode(encode(push())), **changes}
    data = cbor.encode_message({name: value for name, value in raw.items() if value is not None})
    with pytest.raises(ProtocolError) as caught:
        decode(PushRequest, data)
    assert said in str(caught.value)
    assert "$" not in str(caught.value) and "`" not in str(caught.value)
