"""Planted bugs: pushes refused as a whole, and transactions that are rejected, withdrawn, held."""

from __future__ import annotations

from typing import Any, Final
from unittest import mock

from entidb.errors import (
    SyncCodecError,
    SyncError,
)
from entidb.protocol import PushResponse
from entidb.server import decide
from entidb.sync.apply import batch
from entidb.sync.apply.rebase import Rebase
from entidb.sync.pulling import Pulling
from entidb.sync.pushing import Pushing
from entidb.sync.refusal import Path
from tests.planted.garden import CALM, WILD, Garden, bug

_POISONED: Final = CALM | {"older_server": 1, "invalid": 60}


@bug("refused-push-stays-in-flight", "LIVENESS", knobs=_POISONED)
def _refusal_keeps_the_flight(garden: Garden) -> None:
    """A push that is refused as a whole is sent again before anything else, for ever."""

    def make(original: Any) -> Any:
        def ask(self: Any, batch: Any, state: Any, request: Any = None) -> Any:
            asked = self.request(batch, state) if request is None else request
            return (yield from self._exchange.ask(asked, PushResponse))

        return ask

    garden.replace(Pushing, "_ask_push", make)


@bug("refusal-withdraws-the-batch", "NO-SILENT-LOSS", knobs=_POISONED | {"pause_ms": 3000})
def _refusal_withdraws_all(garden: Garden) -> None:
    """For one transaction that is refused, all that were sent with it are withdrawn."""

    def make(original: Any) -> Any:
        def take(self: Any, batch: Any, error: SyncError) -> Any:
            yield from ()
            self._exchange.report(self._exchange.applier.refuse(batch, error.code, error.message))

        return take

    garden.replace(Pushing, "_take_refusal", make)


@bug("own-doubt-is-a-refusal", "NO-SILENT-LOSS", knobs=CALM | {"cut": 300})
def _own_doubt(garden: Garden) -> None:
    """What the device finds wrong with an answer counts as if the server had refused."""
    garden.replace(SyncCodecError, "refused_by", lambda original: "server")


@bug("kept-back-for-ever", "LIVENESS", knobs=CALM | {"body_limit": 1000, "firewall": 300})
def _kept_for_ever(garden: Garden) -> None:
    """What did not get through once is never tried again."""
    garden.replace(Path, "try_again", lambda original: lambda self: None)


@bug("kept-back-without-what-follows", "ORDER", knobs=CALM | {"firewall": 300})
def _kept_alone(garden: Garden) -> None:
    """What is built on a transaction that is kept back goes out without it."""

    def make(original: Any) -> Any:
        def leave_out(view: Any, key: bytes, row: bytes, without: Any, left_out: Any) -> Any:
            return original(view, key, row, without, set())

        return leave_out

    garden.replace(batch, "_leave_out", make)


@bug("rights-before-what-was-accepted", "EXACTLY-ONCE", knobs=WILD | {"read_only": 300})
def _rights_first(garden: Garden) -> None:
    """A token that may not write any more is refused what it had accepted before."""

    def make(original: Any) -> Any:
        def known(self: Any, transaction: Any, row: bytes, digest: bytes, keys: Any) -> Any:
            if not self._grant.write:
                return self._refuse([], "forbidden", "this token may not write")
            return original(self, transaction, row, digest, keys)

        return known

    garden.replace(decide.Deciding, "_known", make)


@bug("rejected-is-tried-again", "LIVENESS", "NO-POISON", knobs=CALM | {"refuse": 100})
def _rejected_stays(garden: Garden) -> None:
    """A refused transaction stays in the outbox and is pushed for ever."""

    def make(original: Any) -> Any:
        def withdraw(self: Rebase, roots: Any, code: str, message: str, lost: Any) -> None:
            if code == "conflict":
                original(self, roots, code, message, lost)

        return withdraw

    garden.replace(Rebase, "withdraw", make)


@bug("withdrawn-not-listed", "NO-SILENT-LOSS")
def _withdrawn_not_listed(garden: Garden) -> None:
    """A withdrawn transaction does not reach the discarded list."""

    def make(original: Any) -> Any:
        def discard(self: Rebase, transaction: Any, code: str, message: str, lost: Any) -> None:
            return None

        return discard

    garden.replace(Rebase, "_discard", make)


@bug("withdrawn-not-reported", "SURFACED-ONCE")
def _withdrawn_not_reported(garden: Garden) -> None:
    """A withdrawn transaction is listed, and no report names it."""

    def make(original: Any) -> Any:
        def discard(self: Rebase, *rest: Any) -> None:
            original(self, *rest)
            self.report.withdrawn.clear()

        return discard

    garden.replace(Rebase, "_discard", make)


@bug("conflict-not-held", "SURFACED-ONCE", knobs=CALM | {"policy_notes": 7, "operations": 3})
def _conflict_not_held(garden: Garden) -> None:
    """A conflict nobody decided is neither listed nor reported."""

    def make(original: Any) -> Any:
        return lambda self, ref, chain, conflict, known: None

    garden.replace(Rebase, "hold", make)


@bug("withdrawn-still-shown", "READ-YOUR-WRITES", "CONVERGE", "UNEXPECTED")
def _withdrawn_still_shown(garden: Garden) -> None:
    """The view keeps what was withdrawn."""

    def make(original: Any) -> Any:
        def withdraw(self: Rebase, *rest: Any) -> None:
            with mock.patch.object(self, "show_top", return_value=None):
                original(self, *rest)

        return withdraw

    garden.replace(Rebase, "withdraw", make)


@bug("dependents-left-behind", "WHOLE", "PREFIX", "CONVERGE", "READ-YOUR-WRITES", "UNEXPECTED")
def _dependents_left(garden: Garden) -> None:
    """What was built on a withdrawn transaction stays pending."""
    garden.replace(Rebase, "_closure", lambda original: lambda self, roots, **more: list(roots))


@bug("idle-cycle-asks-twice", "LIVENESS")
def _idle_cycle_asks_twice(garden: Garden) -> None:
    """A cycle with nothing to do pulls a second time."""

    def make(original: Any) -> Any:
        def pull(self: Any, look: Any, first: Any = None) -> Any:
            yield from original(self, look, first)
            yield from original(self, self._exchange.applier.look())

        return pull

    garden.replace(Pulling, "pull", make)
