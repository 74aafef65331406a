"""Hostile input: broken messages, bombs, forged tokens, lying servers, and canaries to find leaks.

Everything is drawn from the seed or the ``random.Random`` given in, so that a finding can be made
again. Nothing here judges: what a server or a client has to do about it is for the tests, ours
and those of whoever writes another server or client from ``docs/protocol.md``.

    mutations       one message with each field removed, doubled, retyped, at its limits
    garbled         bytes with bits, heads and lengths changed
    bombs           bodies that are small on the wire and huge in memory
    forged_tokens   tokens that no server may believe
    hostile_server  a server that lies, for ``MockTransport``; ``LIES`` has one name for each lie
    GarblingServer  a ``LoopbackServer`` that breaks the answers of another one
    Canary          what must never be seen in an answer to somebody else
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import importlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec import to_builtins
from msgspec.structs import replace

from entidb import cbor
from entidb.protocol import (
    LIMITS,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    Limits,
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    PushResult,
    SyncRequest,
    SyncResponse,
    Verdict,
    decode_response,
    encode,
)
from entidb.sync.transport import HttpAnswer, HttpResponse, LoopbackServer

SEQUENCE_MAX: Final = 2**63 - 1
STAMP_MAX: Final = 2**64 - 1

# ---------------------------------------------------------------- broken messages


@dataclass
class _Map:
    """A map as pairs, so that it can hold a key twice and in any order."""

    pairs: list[tuple[Any, Any]]


#: What stands in the place of a field that is retyped or taken to its limits.
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
    """CBOR of what an encoder with manners would refuse to write."""
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


# ---------------------------------------------------------------- tokens


def forged_tokens(
    token: str, rng: random.Random, *, public_key: bytes = b""
) -> Iterator[tuple[str, str]]:
    """Tokens made from a valid JWT by somebody without the key; each has to be refused.

    ``public_key`` is the PEM a server checks with: a server that lets the token choose the
    algorithm takes it for an HMAC secret.
    """
    head, body, signature = token.split(".")
    claims = json.loads(_unbase64(body))
    for name in ("none", "None", "nOnE", "HS256", "HS512", "RS256", "ES256", "EdDSA", "", "HS257"):
        forged = _segment({"alg": name, "typ": "JWT"})
        yield f"alg {name!r} without a signature", f"{forged}.{body}."
        if forged != head:
            yield f"alg {name!r} with the old signature", f"{forged}.{body}.{signature}"
    for secret in (b"", b"secret", public_key, public_key.strip()):
        forged = _segment({"alg": "HS256", "typ": "JWT"})
        yield f"signed with {secret[:12]!r}", _signed(forged, body, secret)
    for name, value in _TEMPTING_CLAIMS:
        changed = _segment({**claims, name: value})
        yield f"claim {name} changed", f"{head}.{changed}.{signature}"
        yield f"claim {name} changed, alg none", f"{_segment({'alg': 'none'})}.{changed}."
    for extra in _TEMPTING_HEADERS:
        forged = _segment({"alg": "HS256", "typ": "JWT", **extra})
        yield f"header {next(iter(extra))}", _signed(forged, body, b"")
    yield from _misshapen(head, body, signature)
    for _ in range(64):
        at = rng.randrange(len(token))
        flipped = chr(ord(token[at]) ^ 1 << rng.randrange(7))
        changed = token[:at] + flipped + token[at + 1 :]
        if not _same_token(token, changed):
            yield f"bit flipped at {at}", changed


_TEMPTING_CLAIMS: Final[tuple[tuple[str, Any], ...]] = (
    ("databases", {"*": "rw"}),
    ("databases", ["*"]),
    ("exp", 2**40),
    ("exp", "never"),
    ("exp", None),
    ("aud", "*"),
    ("sub", "admin"),
    ("nbf", -1),
)
_TEMPTING_HEADERS: Final[tuple[dict[str, Any], ...]] = (
    {"kid": "/dev/null"},
    {"kid": "' UNION SELECT ''--"},
    {"jwk": {"kty": "oct", "k": ""}},
    {"jku": "http://localhost:1/keys"},
    {"crit": ["b64"], "b64": False},
    {"zip": "DEF"},
)


def _misshapen(head: str, body: str, signature: str) -> Iterator[tuple[str, str]]:
    yield "no signature", f"{head}.{body}"
    yield "nothing but dots", ".."
    yield "four parts", f"{head}.{body}.{signature}.{signature}"
    yield "parts swapped", f"{body}.{head}.{signature}"
    yield "cut", f"{head}.{body}.{signature[:-4]}"
    yield "long", f"{head}.{body}.{signature * 200}"
    yield "deep claims", f"{head}.{_base64(b'[' * 5000)}.{signature}"
    yield "no JSON", f"{head}.{_base64(bytes(range(256)))}.{signature}"
    yield "claims that are a list", f"{head}.{_segment([])}.{signature}"


def _signed(head: str, body: str, secret: bytes) -> str:
    digest = hmac.new(secret, f"{head}.{body}".encode(), hashlib.sha256).digest()
    return f"{head}.{body}.{_base64(digest)}"


def _same_token(one: str, other: str) -> bool:
    """The last letter of a part has bits that mean nothing: flipping them changes nothing."""
    if one.count(".") != other.count("."):
        return False
    try:
        return [_unbase64(part) for part in one.split(".")] == [
            _unbase64(part) for part in other.split(".")
        ]
    except ValueError:
        return False


def _segment(value: Any) -> str:
    return _base64(json.dumps(value).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# ---------------------------------------------------------------- canaries


class Canary:
    """A text that stands in one database and nowhere else; ``value`` goes into its entities."""

    def __init__(self, seed: int) -> None:
        self.text = "canary" + hashlib.sha256(str(seed).encode()).hexdigest()[:32]
        self.entity_id = hashlib.sha256(self.text.encode()).digest()[:16]

    @property
    def value(self) -> dict[str, str]:
        return {"secret": self.text}

    def sings_in(self, data: bytes) -> bool:
        """Whether the text or the id is in ``data`` (unpacked), as it is, as hex or as base64."""
        raw, entity = self.text.encode(), self.entity_id
        forms = (raw, entity, raw.hex().encode(), entity.hex().encode(), base64.b64encode(raw))
        return any(form in data for form in forms)


def leaks(data: bytes, canaries: Iterable[Canary]) -> list[str]:
    """The texts of those canaries that are in ``data``."""
    return [canary.text for canary in canaries if canary.sings_in(data)]


# ---------------------------------------------------------------- lying servers

Honest = Callable[[SyncRequest], SyncResponse]
Lie = Callable[["HostileServer", Any, Any], Any]


@dataclass
class HostileServer:
    """Answers as ``honest`` does, and lies about it: always ``lie``, or, if that is None, one of
    ``LIES`` drawn for each request. Called with a request, as ``MockTransport`` wants it.

    ``asked`` counts the requests. Pushes that are lied about reach ``honest`` all the same,
    unless the liar is ``deaf``.
    """

    rng: random.Random
    honest: Honest
    lie: str | None = None
    deaf: bool = False
    asked: int = 0
    #: Lies that were told, with how often.
    told: dict[str, int] = field(default_factory=dict)

    def __call__(self, request: SyncRequest) -> SyncResponse:
        self.asked += 1
        unheard = self.deaf and isinstance(request, PushRequest)
        answer = _Empty(b"", request.cursor)(request) if unheard else self.honest(request)
        name = self.lie if self.lie is not None else self._drawn(request)
        kind, lie = LIES[name]
        if not isinstance(request, kind):
            return answer
        if isinstance(answer, ErrorResponse):
            # What a lie has brought the device to, an honest server refuses; a liar goes on.
            answer = _Empty(b"h" * 16, request.cursor)(request)
        self.told[name] = self.told.get(name, 0) + 1
        told: SyncResponse = lie(self, request, answer)
        return told

    def _drawn(self, request: SyncRequest) -> str:
        fitting = [name for name, (kind, _) in LIES.items() if isinstance(request, kind)]
        return self.rng.choice(sorted(fitting))


def hostile_server(
    seed: int, honest: Honest | None = None, *, lie: str | None = None, deaf: bool = False
) -> HostileServer:
    """A liar for ``MockTransport``. Without ``honest`` it lies about an empty database that
    accepts everything."""
    rng = random.Random(f"hostile {seed}")
    return HostileServer(rng, honest or _Empty(rng.randbytes(16)), lie, deaf)


def wired(answer: Honest) -> Honest:
    """``answer`` as it arrives over HTTP: encoded, decoded, and refused where it breaks the
    protocol."""

    def exchange(request: SyncRequest) -> SyncResponse:
        response = answer(request)
        if isinstance(response, ErrorResponse):
            return response
        # The encoder for messages takes their shape on trust; this one writes any shape.
        return decode_response(
            request, cbor.encode_message(to_builtins(response, builtin_types=(bytes,)))
        )

    return exchange


@dataclass
class _Empty:
    """The least a server can say and be believed."""

    history: bytes
    head: int = 0

    def __call__(self, request: SyncRequest) -> SyncResponse:
        if isinstance(request, HandshakeRequest):
            return HandshakeResponse(
                major=1,
                minor=0,
                history=request.history or self.history,
                head=self.head,
                floor=0,
                limits=LIMITS,
                features=[],
                time=1,
            )
        if isinstance(request, PullRequest):
            self.head = max(self.head, request.cursor)
            return PullResponse(
                collections=[],
                commits=[],
                cursor=self.head,
                has_more=False,
                head=self.head,
                floor=0,
                time=1,
            )
        results = []
        for _ in request.transactions:
            self.head += 1
            results.append(PushResult(Verdict.ACCEPTED, self.head))
        return PushResponse(results=results, collections=[], head=self.head, time=1)


def _handshake(**fields: Any) -> Lie:
    def lie(server: HostileServer, request: Any, answer: Any) -> Any:
        return replace(answer, **{name: _value(server, it) for name, it in fields.items()})

    return lie


def _value(server: HostileServer, given: Any) -> Any:
    return given(server.rng) if callable(given) else given


def _new_id(rng: random.Random) -> bytes:
    return rng.randbytes(16)


def _limits(number: int) -> Limits:
    return Limits(**dict.fromkeys(Limits.__struct_fields__, number))


def _refused(**fields: Any) -> Lie:
    """An ``ErrorResponse`` instead of the answer."""
    values: dict[str, Any] = {"message": "no", "retryable": True} | fields

    def lie(server: HostileServer, request: Any, answer: Any) -> Any:
        return ErrorResponse(**values)

    return lie


def _verdict(**fields: Any) -> Lie:
    """The same verdict for everything that was pushed."""

    def lie(server: HostileServer, request: Any, answer: Any) -> Any:
        made = [
            PushResult(**{name: _value(server, it) for name, it in fields.items()})
            for _ in request.transactions
        ]
        return replace(answer, results=made)

    return lie


def _results(change: Callable[[list[PushResult]], list[PushResult]], **fields: Any) -> Lie:
    def lie(server: HostileServer, request: Any, answer: Any) -> Any:
        return replace(answer, results=change(answer.results), **fields)

    return lie


def _accepted_as(*versions: int, head: int | None = None) -> Lie:
    def lie(server: HostileServer, request: Any, answer: Any) -> Any:
        count = len(request.transactions)
        named = [versions[index % len(versions)] for index in range(count)]
        results = [PushResult(Verdict.ACCEPTED, version, STAMP_MAX) for version in named]
        return replace(answer, results=results, head=answer.head if head is None else head)

    return lie


def _mixed_verdicts(server: HostileServer, request: Any, answer: Any) -> Any:
    def one(index: int) -> PushResult:
        kind = server.rng.choice(list(Verdict))
        version = answer.head + 1 + index if kind <= Verdict.SUPERSEDED else 0
        return PushResult(kind, version, 0, [], "odd" if kind is Verdict.REJECTED else "", "")

    count = len(request.transactions)
    return replace(answer, results=[one(n) for n in range(count)], head=answer.head + count + 1)


def _page(
    server: HostileServer, payload: bytes | None, *versions: int, name: str = "notes"
) -> dict[str, Any]:
    commits = [
        PullCommit(
            version,
            _new_id(server.rng),
            STAMP_MAX,
            [PullOperation(0, _new_id(server.rng), payload)],
        )
        for version in versions
    ]
    return {"collections": [name], "commits": commits}


def _pages(step: Callable[[PullRequest], dict[str, Any]], payload: bytes | None = b"\xa0") -> Lie:
    """Pages that claim there is more. ``step`` says where one ends; without ``commits`` in what
    it answers, a commit of the newest version is made up."""

    def lie(server: HostileServer, request: Any, answer: Any) -> Any:
        fields: dict[str, Any] = {"has_more": True} | step(request)
        if "commits" not in fields:
            fields = _page(server, payload, fields["cursor"]) | fields
        return replace(answer, **fields)

    return lie


def _commits(
    *offsets: int, payload: bytes | None = b"\xa0", name: str = "notes", **fields: Any
) -> Lie:
    """A last page with commits at these distances from the cursor."""

    def lie(server: HostileServer, request: Any, answer: Any) -> Any:
        versions = [max(0, request.cursor + offset) for offset in offsets]
        head = max(*versions, request.cursor, 0)
        page = _page(server, payload, *versions, name=name)
        return replace(answer, **({"cursor": head, "head": head} | page | fields))

    return lie


def _many_collections(count: int) -> Lie:
    def lie(server: HostileServer, request: Any, answer: Any) -> Any:
        names = [f"c{number}" for number in range(count)]
        version = request.cursor + 1
        operations = [PullOperation(n, _new_id(server.rng), b"\xa0") for n in range(count)]
        commits = [PullCommit(version, _new_id(server.rng), 1, operations)]
        return replace(answer, collections=names, commits=commits, cursor=version, head=version)

    return lie


def _floor_moves(server: HostileServer, request: Any, answer: Any) -> Any:
    at = request.cursor + 1
    page = _page(server, b"\xa0", at)
    return replace(answer, cursor=at, head=at + 5, has_more=True, floor=server.asked, **page)


def _floor_moves_on_reset(server: HostileServer, request: Any, answer: Any) -> Any:
    if not request.full:
        return ErrorResponse(code="reset_required", message="all of it", retryable=False)
    return _floor_moves(server, request, answer)


def _wrong_kind(server: HostileServer, request: Any, answer: Any) -> Any:
    if isinstance(request, PushRequest):
        return replace(_Empty(b"h" * 16)(_PULL), head=0)
    return PushResponse(results=[], collections=[], head=0, time=0)


_PULL: Final = PullRequest(
    db_id="x", device_id=b"d" * 16, history=b"h" * 16, cursor=0, limit=1, bytes_max=1
)
_ANY: Final[Any] = (HandshakeRequest, PullRequest, PushRequest)
_DEEP: Final = b"\x81" * 1000 + b"\x80"

#: Every lie: its name, the requests it answers, and how.
LIES: Final[dict[str, tuple[Any, Lie]]] = {
    # the handshake
    "limits_zero": (HandshakeRequest, _handshake(limits=_limits(0))),
    "limits_huge": (HandshakeRequest, _handshake(limits=_limits(SEQUENCE_MAX))),
    "limits_one": (HandshakeRequest, _handshake(limits=_limits(1))),
    "time_far_future": (HandshakeRequest, _handshake(time=SEQUENCE_MAX)),
    "head_huge": (HandshakeRequest, _handshake(head=SEQUENCE_MAX, floor=SEQUENCE_MAX)),
    "other_history": (HandshakeRequest, _handshake(history=_new_id)),
    "other_major": (HandshakeRequest, _handshake(major=2)),
    "odd_features": (HandshakeRequest, _handshake(features=["zstd", "\x00", "x" * 9999] * 99)),
    # pushes
    "no_results": (PushRequest, _results(lambda results: [])),
    "one_result_more": (PushRequest, _results(lambda results: [*results, results[0]])),
    "one_result_less": (PushRequest, _results(lambda results: results[1:])),
    "accepted_as_0": (PushRequest, _accepted_as(0)),
    "accepted_all_as_1": (PushRequest, _accepted_as(1)),
    "accepted_above_head": (PushRequest, _accepted_as(SEQUENCE_MAX, SEQUENCE_MAX - 1)),
    "accepted_backwards": (
        PushRequest,
        _results(lambda results: [PushResult(0, 900 - n) for n in range(len(results))], head=999),
    ),
    "accepted_as_the_last": (PushRequest, _accepted_as(SEQUENCE_MAX, head=SEQUENCE_MAX)),
    "conflict_for_ever": (PushRequest, _verdict(verdict=Verdict.CONFLICT)),
    "superseded": (
        PushRequest,
        _results(
            lambda results: [PushResult(1, n + 1) for n in range(len(results))], head=SEQUENCE_MAX
        ),
    ),
    "rejected_loudly": (
        PushRequest,
        _verdict(verdict=Verdict.REJECTED, code="c" * 99_999, message="\x1b[2J" + "m" * 2_000_000),
    ),
    "rejected_without_code": (PushRequest, _verdict(verdict=Verdict.REJECTED)),
    "verdicts_mixed": (PushRequest, _mixed_verdicts),
    "unknown_verdict": (PushRequest, _verdict(verdict=7)),
    # pulls that do not end
    "pages_tiny": (PullRequest, _pages(lambda r: {"cursor": r.cursor + 1, "head": r.cursor + 9})),
    "pages_empty": (
        PullRequest,
        _pages(lambda r: {"cursor": r.cursor + 1, "head": SEQUENCE_MAX, "commits": []}),
    ),
    "pages_of_tombstones": (
        PullRequest,
        _pages(lambda r: {"cursor": r.cursor + 1, "head": r.cursor + 9}, None),
    ),
    "pages_without_progress": (
        PullRequest,
        _pages(lambda r: {"cursor": r.cursor, "head": r.cursor, "commits": []}),
    ),
    "pages_backwards": (
        PullRequest,
        _pages(lambda r: {"cursor": max(0, r.cursor - 1), "head": SEQUENCE_MAX, "commits": []}),
    ),
    "floor_moves": (PullRequest, _floor_moves),
    "floor_moves_on_reset": (PullRequest, _floor_moves_on_reset),
    "reset_for_ever": (PullRequest, _refused(code="reset_required", retryable=False)),
    # pages that cannot be
    "cursor_past_head": (PullRequest, _commits(1, head=0)),
    "cursor_at_the_end": (PullRequest, _commits(1, cursor=SEQUENCE_MAX, head=SEQUENCE_MAX)),
    "cursor_back_to_0": (PullRequest, _commits(cursor=0, head=SEQUENCE_MAX)),
    "versions_repeat": (PullRequest, _commits(1, 1, 2)),
    "versions_descend": (PullRequest, _commits(3, 2, 1)),
    "version_0": (PullRequest, _commits(-(2**63), 1)),
    "versions_below_the_cursor": (PullRequest, _commits(-5, 0, 1)),
    "version_at_the_end": (PullRequest, _commits(SEQUENCE_MAX)),
    "index_out_of_range": (PullRequest, _commits(1, collections=[])),
    "name_empty": (PullRequest, _commits(1, name="")),
    "name_of_controls": (PullRequest, _commits(1, name="a\x00\x1bb")),
    "name_too_long": (PullRequest, _commits(1, name="ü" * 200)),
    "out_of_scope": (PullRequest, _commits(1, 2, name="somewhere else")),
    "local_collection": (PullRequest, _commits(1, 2, name="drafts")),
    "collections_200": (PullRequest, _many_collections(200)),
    "collections_5000": (PullRequest, _many_collections(5000)),
    "collections_2000": (PullRequest, _many_collections(2000)),
    "late": (PullRequest, _commits(1, 2)),
    "payload_null": (PullRequest, _commits(1, payload=b"\xf6")),
    "payload_empty": (PullRequest, _commits(1, payload=b"")),
    "payload_not_canonical": (PullRequest, _commits(1, payload=b"\x18\x01")),
    "payload_tagged": (PullRequest, _commits(1, payload=b"\xd8\x2a\x41\x00")),
    "payload_deep": (PullRequest, _commits(1, payload=_DEEP)),
    "payload_cut": (PullRequest, _commits(1, payload=b"\x5b" + b"\x7f" * 8)),
    "payload_dense": (
        PullRequest,
        _commits(1, payload=cbor.array_head(2_000_000) + b"\x80" * 2_000_000),
    ),
    # errors, and what is no answer
    "wrong_message": (_ANY, _wrong_kind),
    "error_unknown": (_ANY, _refused(code="\x00odd" * 500, details={"a": [{}] * 99})),
    "error_retry_for_ever": (_ANY, _refused(code="busy", retry_after=1e308)),
    "error_retry_negative": (_ANY, _refused(code="rate_limited", retry_after=-1e308)),
    "error_ok": (_ANY, _refused(code="", retryable=False)),
    "error_history": (_ANY, _refused(code="history_changed", details={"history": 7})),
    "error_unauthorized": (_ANY, _refused(code="unauthorized")),
    "error_reset": (_ANY, _refused(code="reset_required", details={"floor": "much"})),
}


class GarblingServer:
    """A ``LoopbackServer`` between a client and ``server``: requests arrive whole, and of the
    answers some have their bytes, statuses or headers changed. For ``LoopbackClient``."""

    def __init__(self, server: LoopbackServer, seed: int, *, per_cent: int = 50) -> None:
        self._server = server
        self._rng = random.Random(f"garbling {seed}")
        self._per_cent = per_cent

    def handle_http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> HttpAnswer:
        answer = self._server.handle_http(method, path, headers, body)
        if self._rng.randrange(100) >= self._per_cent:
            return answer
        kind = self._rng.randrange(4)
        named = dict(answer.headers)
        if kind == 0:
            return HttpResponse(self._rng.choice(_STATUSES), named, answer.body)
        if kind == 1:
            named |= self._rng.choice(_ODD_HEADERS)
        return HttpResponse(answer.status, named, garbled(answer.body, self._rng))


_STATUSES: Final = (100, 200, 204, 206, 301, 307, 400, 401, 403, 404, 409, 410, 429, 500, 503, 999)
_ODD_HEADERS: Final[tuple[dict[str, str], ...]] = (
    {"content-type": "text/html"},
    {"content-encoding": "gzip"},
    {"content-encoding": "br, gzip, zstd"},
    {"retry-after": "9" * 400},
    {"retry-after": "Thu, 99 Foo 99999 25:61:61 GMT"},
    {"location": "\x1b]0;owned\x07"},
)

__all__ = [
    "LIES",
    "Canary",
    "GarblingServer",
    "HostileServer",
    "dense",
    "forged_tokens",
    "garbled",
    "hostile_server",
    "leaks",
    "mutations",
    "packed",
    "wired",
]
