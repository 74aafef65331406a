"""What every ``SyncTransport`` must do: its promises as tests.

Use it by inheriting: ``class TestMine(SyncTransportContract)`` with ``make_transport``; pytest
collects the tests. The peer is a function that the test gives, so that only the transport is under
test. One whose requests take no time says so with a flag.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from entidb.errors import (
    ProtocolError,
    ServerBusyError,
    SyncCancelledError,
    SyncError,
    TransportError,
)
from entidb.protocol import (
    LIMITS,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    SyncRequest,
    SyncResponse,
)
from entidb.sync.transport import SyncTransport
from entidb.testing.contracts import STUCK_SECONDS, raises

#: What a test puts in the place of the server; it may raise ``TransportError``, which means a
#: connection that is lost before the answer.
Peer = Callable[[SyncRequest], SyncResponse]

_HISTORY = b"h" * 16
_DEVICE = b"d" * 16
#: Seconds within which an end counts as prompt: more than the 100 ms that are promised, for busy
#: machines.
_PROMPT_S = 5.0


def a_handshake() -> HandshakeRequest:
    return HandshakeRequest(
        major=1, minor=0, db_id="contract", device_id=_DEVICE, history=None, cursor=0
    )


def a_pull(cursor: int = 0) -> PullRequest:
    return PullRequest(
        db_id="contract",
        device_id=_DEVICE,
        history=_HISTORY,
        cursor=cursor,
        limit=100,
        bytes_max=1 << 20,
    )


def a_push() -> PushRequest:
    return PushRequest(
        db_id="contract",
        device_id=_DEVICE,
        history=_HISTORY,
        cursor=0,
        collections=[],
        transactions=[],
    )


def an_answer(request: SyncRequest, head: int = 7) -> SyncResponse:
    """One that fits ``request``, with ``head`` to know it by."""
    if isinstance(request, HandshakeRequest):
        return HandshakeResponse(
            major=1,
            minor=0,
            history=_HISTORY,
            head=head,
            floor=0,
            limits=LIMITS,
            features=[],
            time=1,
        )
    if isinstance(request, PullRequest):
        return PullResponse(
            collections=[],
            commits=[],
            cursor=request.cursor,
            has_more=False,
            head=head,
            floor=0,
            time=1,
        )
    return PushResponse(results=[], collections=[], head=head, time=1)


def is_connected(transport: SyncTransport) -> bool:
    return transport.connected


class SyncTransportContract:
    """The promises of ``SyncTransport``."""

    #: False: an answer is there when ``send`` returns to itself, so nothing is ever under way.
    waits = True

    def make_transport(self, peer: Peer) -> SyncTransport:
        """A transport to a server that answers with ``peer``; ``fresh`` closes it."""
        raise NotImplementedError("a contract needs make_transport")

    @contextlib.contextmanager
    def fresh(self, peer: Peer = an_answer) -> Iterator[SyncTransport]:
        transport = self.make_transport(peer)
        try:
            yield transport
        finally:
            transport.close()

    # ---- answers

    def test_each_method_returns_the_answer_that_belongs_to_it(self) -> None:
        with self.fresh() as transport:
            assert transport.handshake(a_handshake()).history == _HISTORY
            assert transport.pull(a_pull(3)).cursor == 3
            assert transport.push(a_push()).head == 7

    def test_send_returns_the_answer_to_any_request(self) -> None:
        with self.fresh() as transport:
            for request in (a_handshake(), a_pull(5), a_push(), a_pull(6)):
                assert transport.send(request) == an_answer(request)

    def test_a_request_arrives_as_it_was_sent(self) -> None:
        seen: list[SyncRequest] = []

        def peer(request: SyncRequest) -> SyncResponse:
            seen.append(request)
            return an_answer(request)

        with self.fresh(peer) as transport:
            for request in (a_handshake(), a_pull(5), a_push()):
                transport.send(request)
        assert seen == [a_handshake(), a_pull(5), a_push()]

    def test_an_error_response_is_raised_as_the_class_of_its_code(self) -> None:
        def peer(request: SyncRequest) -> SyncResponse:
            return ErrorResponse(
                code="busy", message="later", retryable=True, retry_after=3.0, details={"n": 1}
            )

        with self.fresh(peer) as transport, raises(ServerBusyError) as raised:
            transport.send(a_pull())
        error = raised.error
        assert isinstance(error, ServerBusyError)
        assert (error.code, error.message, error.retry_after) == ("busy", "later", 3.0)
        assert error.details == {"n": 1}
        assert error.retryable

    def test_an_answer_of_another_kind_is_an_error(self) -> None:
        def peer(request: SyncRequest) -> SyncResponse:
            return an_answer(a_push())

        with self.fresh(peer) as transport, raises(ProtocolError):
            transport.send(a_handshake())

    # ---- connected

    def test_it_is_connected_from_the_first_answer_on(self) -> None:
        with self.fresh() as transport:
            assert not is_connected(transport)
            transport.send(a_pull())
            assert is_connected(transport)
            transport.send(a_push())
            assert is_connected(transport)

    def test_a_refusal_leaves_the_connection_as_it_was(self) -> None:
        refuses = [True]

        def peer(request: SyncRequest) -> SyncResponse:
            if refuses[0]:
                return ErrorResponse(code="forbidden", message="no", retryable=False)
            return an_answer(request)

        with self.fresh(peer) as transport:
            with raises(SyncError):
                transport.send(a_pull())
            assert not is_connected(transport)
            refuses[0] = False
            transport.send(a_pull())
            refuses[0] = True
            with raises(SyncError):
                transport.send(a_pull())
            assert is_connected(transport)

    def test_a_lost_connection_is_a_transport_error_and_the_request_can_be_sent_again(self) -> None:
        lost = [False]

        def peer(request: SyncRequest) -> SyncResponse:
            if lost[0]:
                raise TransportError("the connection is lost")
            return an_answer(request)

        with self.fresh(peer) as transport:
            transport.send(a_pull())
            lost[0] = True
            with raises(TransportError) as raised:
                transport.send(a_pull())
            assert isinstance(raised.error, TransportError) and raised.error.retryable
            assert not is_connected(transport)
            lost[0] = False
            assert transport.send(a_pull()) == an_answer(a_pull())
            assert is_connected(transport)

    # ---- ahead of time

    def test_what_was_hinted_at_is_answered_by_the_send_of_an_equal_request(self) -> None:
        with self.fresh() as transport:
            transport.send(a_pull(1))
            transport.send_ahead(a_pull(2))
            transport.send_ahead(a_pull(3))
            assert transport.send(a_pull(2)) == an_answer(a_pull(2))
            assert transport.send(a_pull(3)) == an_answer(a_pull(3))
            assert transport.send(a_pull(4)) == an_answer(a_pull(4))

    def test_no_answer_from_before_forget_ahead_is_taken_for_a_fresh_one(self) -> None:
        heads = iter(range(10, 1000))

        def peer(request: SyncRequest) -> SyncResponse:
            return an_answer(request, next(heads))

        with self.fresh(peer) as transport:
            transport.send(a_pull(1))
            transport.send_ahead(a_pull(2))
            transport.forget_ahead()
            mark = next(heads)
            assert transport.pull(a_pull(2)).head > mark

    def test_another_send_drops_what_was_hinted_at(self) -> None:
        heads = iter(range(10, 1000))

        def peer(request: SyncRequest) -> SyncResponse:
            return an_answer(request, next(heads))

        with self.fresh(peer) as transport:
            transport.send(a_pull(1))
            transport.send_ahead(a_pull(2))
            assert transport.pull(a_pull(9)).cursor == 9
            mark = next(heads)
            assert transport.pull(a_pull(2)).head > mark

    def test_an_error_of_what_was_hinted_at_comes_out_of_its_send(self) -> None:
        def peer(request: SyncRequest) -> SyncResponse:
            if request == a_pull(2):
                return ErrorResponse(code="busy", message="later", retryable=True)
            return an_answer(request)

        with self.fresh(peer) as transport:
            transport.send(a_pull(1))
            transport.send_ahead(a_pull(2))
            with raises(ServerBusyError):
                transport.send(a_pull(2))
            assert transport.send(a_pull(3)) == an_answer(a_pull(3))

    # ---- the end

    def test_a_closed_transport_refuses_and_is_not_connected(self) -> None:
        transport = self.make_transport(an_answer)
        transport.send(a_pull())
        transport.close()
        transport.close()
        assert not is_connected(transport)
        with raises(SyncError):
            transport.send(a_pull())

    def test_close_ends_a_request_that_is_under_way(self) -> None:
        if self.waits:
            self._check_ended(lambda transport: transport.close(), SyncError)

    def test_interrupt_ends_a_request_that_is_under_way(self) -> None:
        if self.waits:
            self._check_ended(_interrupt, None)

    def _check_ended(
        self, end: Callable[[SyncTransport], None], kind: type[SyncError] | None
    ) -> None:
        """``kind`` None: what ``interrupt`` promises, of a transport that has it."""
        begun, over = threading.Event(), threading.Event()

        def peer(request: SyncRequest) -> SyncResponse:
            begun.set()
            over.wait(STUCK_SECONDS)
            return an_answer(request)

        transport = self.make_transport(peer)
        try:
            if kind is None and not hasattr(transport, "interrupt"):
                return
            with ThreadPoolExecutor(1) as pool:
                sending = pool.submit(transport.send, a_pull())
                assert begun.wait(STUCK_SECONDS)
                began = time.monotonic()
                end(transport)
                error = sending.exception(STUCK_SECONDS)
                assert time.monotonic() - began < _PROMPT_S
            assert isinstance(error, kind or SyncCancelledError), error
            assert not is_connected(transport)
            if kind is None:
                with raises(SyncCancelledError):
                    transport.send(a_pull())  # until the next ``forget_ahead``
                over.set()
                transport.forget_ahead()
                assert transport.send(a_pull()) == an_answer(a_pull())
        finally:
            over.set()
            transport.close()


def _interrupt(transport: SyncTransport) -> None:
    interrupt: Callable[[], None] = getattr(transport, "interrupt")  # noqa: B009 - not in all
    interrupt()


__all__ = ["Peer", "SyncTransportContract", "an_answer"]
