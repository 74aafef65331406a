"""A push that is refused as a whole: what a device learns from it, and remembers (R5).

An answer that proves that nothing was decided ends the flight. The cycle decides what to do then;
here is how it finds the transactions that are meant (``Search``), and what it remembers of the way
to the server while a connection lasts (``Path``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from msgspec import Struct

from entidb.errors import (
    ProtocolError,
    ServerError,
    SyncError,
    SyncTimeoutError,
    TransportError,
)
from entidb.types import SEQUENCE_MAX

#: What a server refuses for good, whatever else is sent with it: such a transaction is withdrawn
#: (R4). A person can remove the cause of all other refusals, so the transaction is kept back.
_FOR_GOOD: Final = frozenset(("codec_error", "invalid_message", "too_large"))
#: After so many cycles of one connection the device tries again what it has learned about the way.
TRY_AGAIN_CYCLES: Final = 100
#: From this size on a batch that passed leads to one without a limit.
_SEARCH_MAX: Final = 1024
_SHOWN_MAX: Final = 3


class KeptBack(Struct, frozen=True):
    """A transaction that does not get through to the server, and why: ``code`` and ``message``
    are those of the refusal. It stays pending and visible, with those built on it, and is tried
    again with the next connection; where the connection was cut, after some cycles too."""

    sequence: int
    transaction_id: bytes
    code: str
    message: str


@dataclass
class Path:
    """What gets through to the server, as far as this device knows.

    ``bytes_max`` is the size of a batch that was small enough, or has not been refused yet;
    ``kept`` are transactions that did not get through alone, by their sequence; ``forbidden``
    says that the last push was refused because of the token."""

    bytes_max: int = SEQUENCE_MAX
    kept: dict[int, KeptBack] = field(default_factory=dict)
    forbidden: bool = False
    #: The smallest push whose connection was cut while it was sent, until one of its size passes.
    cut_bytes: int | None = None
    _cycles: int = 0
    #: Cycles after which that is tried again whose connection was cut, and how many there were. A
    #: server with more devices than connections cuts them by chance, and more than once.
    _patience: int = 1
    _waited: int = 0

    def begin_cycle(self) -> None:
        self._cycles += 1
        self._waited += 1
        if self._cycles > TRY_AGAIN_CYCLES:
            self.try_again()
        elif self.kept and self._waited > self._patience:
            self._try_cut_again()

    def _try_cut_again(self) -> None:
        cut = [each for each, kept in self.kept.items() if kept.code == TransportError.code]
        if cut:
            self._patience *= 2
        for sequence in cut:
            del self.kept[sequence]
        self._waited = 0

    def try_again(self) -> None:
        """A limit may have been raised since: let the next batches try it, one step up."""
        self._cycles = 0
        self.forbidden = False
        self.kept.clear()
        self.bytes_max = min(2 * self.bytes_max, SEQUENCE_MAX)

    def refused(self, size: int) -> None:
        """A batch of several transactions and ``size`` bytes was too large."""
        self.bytes_max = max(1, size // 2)

    def is_chance(self, error: SyncError, size: int) -> bool:
        """Whether a refusal of a batch of ``size`` bytes may be an accident: a connection that is
        cut in the middle of it. Once is an accident; twice is a limit that the other side does not
        name."""
        if error.code != TransportError.code:
            return False
        first = self.cut_bytes is None
        self.cut_bytes = size if self.cut_bytes is None else min(size, self.cut_bytes)
        return first

    def passed(self, size: int) -> None:
        self.forbidden = False
        if self.cut_bytes is not None and size >= self.cut_bytes:
            self.cut_bytes = None
            self._patience = 1

    def forget_all_but(self, sequences: Iterable[int]) -> list[KeptBack]:
        """Drop what is not pending any more; returns the rest."""
        self.kept = {sequence: self.kept[sequence] for sequence in sequences}
        return list(self.kept.values())


class Search:
    """Which transactions of a refused batch are the refused ones: halve it until one is alone.

    ``transactions_max`` is how many the next batch may have. While some are ``suspects``, they
    are the first that are ready, and one of them is refused."""

    def __init__(self) -> None:
        self.transactions_max = SEQUENCE_MAX
        self._suspects = 0

    @property
    def active(self) -> bool:
        return self.transactions_max < SEQUENCE_MAX

    def refused(self, count: int) -> None:
        """A batch of ``count`` transactions was refused; a single one has been withdrawn or kept
        back."""
        self._suspects = count if count > 1 else 0
        self.transactions_max = max(1, count // 2)

    def passed(self, count: int) -> None:
        if self._suspects > count:
            self._suspects -= count
            self.transactions_max = max(1, self._suspects // 2)
            return
        # The one was found. Where there is another soon, this finds it with few requests.
        self._suspects = 0
        wider = 2 * self.transactions_max
        self.transactions_max = wider if wider < _SEARCH_MAX else SEQUENCE_MAX


def is_about_size(error: SyncError) -> bool:
    """Whether a smaller batch can avoid this refusal."""
    return error.code in ("too_large", TransportError.code)


def is_for_good(error: SyncError) -> bool:
    """Whether a transaction that was refused alone with ``error`` can never be accepted: the
    server itself has said so."""
    return error.refused_by == "server" and error.code in _FOR_GOOD


def is_forbidden(error: SyncError) -> bool:
    """Whether the server itself says that this token may not do this."""
    return error.refused_by == "server" and error.code == "forbidden"


def closed(error: SyncError) -> SyncError:
    """``error``, which refuses every push, whatever is in it."""
    return _saying(
        error,
        f"nothing can be pushed: {error.message}. What is pending stays pending, and what others "
        "wrote was pulled",
    )


def still_open(error: SyncError) -> SyncError:
    """``error``, with which a push was answered that had been sent before, so that nobody knows
    whether it arrived (R5); where a server, or what is in front of it, may answer so for ever."""
    if error.code not in (ServerError.code, SyncTimeoutError.code):
        return error
    return _saying(
        error,
        f"{error.message}. This push was sent before and may have arrived, so it is sent again "
        "until it is answered, and nothing is pulled before; what is written here is kept, and "
        "pushed then. If the server answers other requests meanwhile, let what stands in front of "
        "it pass POST /v1/push and /v1/sync",
    )


def _saying(error: SyncError, message: str) -> SyncError:
    """The same answer in other words."""
    made = type(error)(
        message, code=error.code, retry_after=error.retry_after, details=error.details
    )
    made.refused_by, made.request_id = error.refused_by, error.request_id
    return made


def kept_back_error(kept: list[KeptBack]) -> SyncError:
    """What ``status()`` says while transactions do not get through."""
    first = kept[0]
    ids = ", ".join(entry.transaction_id.hex() for entry in kept[:_SHOWN_MAX])
    more = "" if len(kept) <= _SHOWN_MAX else f" and {len(kept) - _SHOWN_MAX} more"
    way_out = (
        "raise the limit for bodies of the proxy before the server (nginx: client_max_body_size)"
        if first.code == "too_large"
        else "let the proxy or firewall before the server pass them"
    )
    return ProtocolError(
        f"{len(kept)} transactions do not get through to the server and are kept back, the rest "
        f"goes on: {first.message}. They stay pending and are tried again with the next "
        f"connection; {way_out}. Transactions: {ids}{more}",
        code=first.code,
    )


__all__ = [
    "KeptBack",
    "Path",
    "Search",
    "closed",
    "is_about_size",
    "is_for_good",
    "is_forbidden",
    "still_open",
]
