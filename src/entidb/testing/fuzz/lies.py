"""Servers that lie, for ``MockTransport``: ``LIES`` has one name for each lie; and one that breaks
the answers of another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec import to_builtins
from msgspec.structs import replace

from entidb import cbor
from entidb.protocol import (
    LIMITS,
    DigestRequest,
    DigestResponse,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    Limits,
    Manifest,
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    PushResult,
    SnapshotRequest,
    SyncRequest,
    SyncResponse,
    Verdict,
    decode_response,
)
from entidb.sync.transport import HttpAnswer, HttpResponse, LoopbackServer
from entidb.testing.fuzz.messages import SEQUENCE_MAX, STAMP_MAX, garbled

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
    #: How often each lie was used.
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
            # An honest server may refuse what a lie has made the device send; a liar goes on.
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
        # The encoder for messages does not check their shape, and writes no other; this one writes
        # any.
        return decode_response(
            request, cbor.encode_message(to_builtins(response, builtin_types=(bytes,)))
        )

    return exchange


@dataclass
class _Empty:
    """The least that a server can answer so that a device believes it."""

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
        if isinstance(request, DigestRequest):
            return DigestResponse(head=self.head)
        if isinstance(request, SnapshotRequest):
            return Manifest(
                history=b"h" * 16,
                head=self.head,
                floor=0,
                collections=[],
                segments=[],
                entities=0,
                ends=0,
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

__all__ = ["LIES", "GarblingServer", "HostileServer", "hostile_server", "wired"]
