"""Planted bugs: what waits for a person: discarded, overruled, in conflict."""

from __future__ import annotations

from typing import Any
from unittest import mock

from msgspec.structs import replace

from entidb.db import adopt, overruled
from entidb.db.fields import Side
from entidb.db.outbox import DiscardedTransaction
from entidb.db.overruled import OverruledKeeper
from entidb.db.writer import Writer
from entidb.sync.apply import review
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.rebase import Rebase
from entidb.sync.apply.review import Review
from tests.planted.garden import CALM, Garden, bug


@bug("discarded-in-a-second-commit", "NO-SILENT-LOSS", knobs=CALM | {"crash_after": 60})
def _discarded_later(garden: Garden) -> None:
    """A withdrawn transaction reaches the list with the next commit only."""
    late: dict[int, dict[bytes, bytes | None]] = {}

    def make(original: Any) -> Any:
        def discard(self: Rebase, transaction: Any, *rest: Any) -> None:
            changes = self._writer.changes
            changes.update(late.pop(id(self._policy_for), {}))
            before = dict(changes)
            original(self, transaction, *rest)
            made = [key for key in changes if key not in before]
            late[id(self._policy_for)] = {key: changes.pop(key) for key in made}

        return discard

    garden.replace(Rebase, "_discard", make)


@bug("loser-not-kept", "NO-SILENT-LOSS")
def _loser_not_kept(garden: Garden) -> None:
    """What a policy decides against is not kept."""
    garden.replace(OverruledKeeper, "add", lambda original: lambda self, *rest: None)


@bug("own-side-kept-only", "NO-SILENT-LOSS", knobs=CALM | {"policy_notes": 1})
def _own_side_only(garden: Garden) -> None:
    """What the server's side loses to this device is not kept."""

    def make(original: Any) -> Any:
        def add(self: OverruledKeeper, *rest: Any) -> None:
            ref, mine, theirs, identity, lost, *more = rest
            own = [each for each in lost if each[0] is Side.LOCAL]
            if own:
                original(self, ref, mine, theirs, identity, own, *more)

        return add

    garden.replace(OverruledKeeper, "add", make)


@bug("loser-kept-in-a-second-commit", "NO-SILENT-LOSS", knobs=CALM | {"crash_after": 60})
def _loser_later(garden: Garden) -> None:
    """What a policy decides against is kept with the next commit only."""
    waiting: list[tuple[Any, ...]] = []

    def make(original: Any) -> Any:
        def store(self: OverruledKeeper) -> int:
            late, waiting[:] = waiting[:], self._values
            self._values = late
            made: int = original(self)
            return made

        return store

    garden.replace(OverruledKeeper, "store", make)


@bug("wrong-side-kept", "NO-SILENT-LOSS")
def _wrong_side_kept(garden: Garden) -> None:
    """The value that won is kept, and not the one that lost."""

    def make(original: Any) -> Any:
        def add(self: OverruledKeeper, *rest: Any) -> None:
            ref, mine, theirs, identity, lost, *more = rest
            turned = [(side, path, won, lost, base) for side, path, lost, won, base in lost]
            original(self, ref, mine, theirs, identity, turned, *more)

        return add

    garden.replace(OverruledKeeper, "add", make)


@bug("persons-loser-not-kept", "NO-SILENT-LOSS", knobs=CALM | {"policy_notes": 7, "person": 100})
def _persons_loser(garden: Garden) -> None:
    """What a person decides against is not kept."""

    def make(original: Any) -> Any:
        def resolve(self: Rebase, *rest: Any) -> None:
            with mock.patch.object(self, "_keeps", False):
                original(self, *rest)

        return resolve

    garden.replace(Rebase, "resolve", make)


@bug("prune-takes-one-more", "NO-SILENT-LOSS", knobs=CALM | {"overruled_max": 2})
def _prune_one_more(garden: Garden) -> None:
    """Pruning leaves one overruled value less than may be kept."""

    def make(original: Any) -> Any:
        def prune(writer: Writer, *, count_max: int, before_ms: int) -> bool:
            more: bool = original(writer, count_max=count_max - 1, before_ms=before_ms)
            return more

        return prune

    garden.replace(overruled, "prune", make)


@bug("prune-takes-the-newest", "NO-SILENT-LOSS", knobs=CALM | {"overruled_max": 2})
def _prune_newest(garden: Garden) -> None:
    """Where there are too many overruled values the newest are forgotten."""
    garden.replace(
        overruled, "_numbers", lambda original: lambda raw: list(reversed(original(raw)))
    )


@bug("prune-by-a-wrong-clock", "NO-SILENT-LOSS", knobs=CALM | {"clock_offset_ms": 315_576_000_000})
def _prune_wrong_clock(garden: Garden) -> None:
    """The age of overruled values counts by the device's clock alone."""

    def make(original: Any) -> Any:
        def prune(self: DatabaseApplier, *rest: Any) -> bool:
            self._heard_ms = 2**60
            done: bool = original(self, *rest)
            return done

        return prune

    garden.replace(DatabaseApplier, "_prune_overruled", make)


@bug("written-back-nowhere", "READ-YOUR-WRITES", knobs=CALM | {"person": 100})
def _written_back_nowhere(garden: Garden) -> None:
    """An overruled value leaves the list, and its field stays as it is."""
    garden.replace(review, "with_field", lambda original: lambda payload, path, field: payload)


@bug(
    "dependents-not-held",
    "SURFACED-ONCE",
    "ORDER",
    "CONVERGE",
    knobs=CALM | {"policy_notes": 7, "policy_pairs": 7},
)
def _dependents_not_held(garden: Garden) -> None:
    """What was built on a transaction in conflict is pushed without it."""

    def make(original: Any) -> Any:
        def hold(self: Rebase, *rest: Any) -> None:
            with mock.patch.object(self, "_closure", lambda roots, **more: list(roots)):
                original(self, *rest)

        return hold

    garden.replace(Rebase, "hold", make)


@bug(
    "one-decision-releases-all",
    "SURFACED-ONCE",
    knobs=CALM | {"policy_notes": 7, "policy_pairs": 7, "person": 100},
)
def _one_releases_all(garden: Garden) -> None:
    """Deciding one conflict lets go what is held by others."""
    garden.replace(Rebase, "_is_blocked", lambda original: lambda self, transaction: False)


@bug(
    "held-for-no-reason",
    "LIVENESS",
    knobs=CALM
    | {"policy_notes": 7, "policy_pairs": 7, "operations": 4, "lost": 50}
    | {"restore_device": 30, "put_back": 60},
)
def _held_for_no_reason(garden: Garden) -> None:
    """What was held only through a write that the server has by now stays held."""

    def make(original: Any) -> Any:
        def remove(self: Rebase, step: Any) -> None:
            freed = set(self._freed)
            original(self, step)
            if self.load(step.transaction.sequence) is not None:
                self._freed = freed

        return remove

    garden.replace(Rebase, "_remove_op", make)


@bug(
    "stale-decision-taken",
    "SURFACED-ONCE",
    "NO-SILENT-LOSS",
    knobs=CALM | {"policy_notes": 7, "policy_pairs": 7, "think_ms": 100, "pause_ms": 100},
)
def _stale_decision(garden: Garden) -> None:
    """A person's decision counts although the server's side has changed since they looked."""

    def make(original: Any) -> Any:
        def resolve(self: Review, conflict: Any, resolution: Any) -> Any:
            for now in self.conflicts():
                if (now.collection, now.id_bytes) == (conflict.collection, conflict.id_bytes):
                    conflict = now
            return original(self, conflict, resolution)

        return resolve

    garden.replace(Review, "resolve", make)


@bug("recommit-loses-a-write", "READ-YOUR-WRITES", "WHOLE", knobs=CALM | {"person": 100})
def _recommit_loses(garden: Garden) -> None:
    """A discarded transaction is committed again without its first write."""

    def make(original: Any) -> Any:
        def recommit(self: Review, discarded: Any) -> int:
            if isinstance(discarded, DiscardedTransaction):
                discarded = replace(discarded, operations=discarded.operations[1:])
            made: int = original(self, discarded)
            return made

        return recommit

    garden.replace(Review, "recommit", make)


@bug(
    "committed-again-over-others",
    "NO-SILENT-LOSS",
    knobs=CALM | {"person": 300, "invalid": 200},
)
def _committed_again(garden: Garden) -> None:
    """What a transaction that is committed again takes the place of is not kept."""
    garden.replace(review, "_keep_replaced", lambda original: lambda *rest: None)


@bug(
    "committed-again-over-a-deletion",
    "NO-SILENT-LOSS",
    knobs=CALM | {"person": 300, "invalid": 200},
)
def _committed_over_a_deletion(garden: Garden) -> None:
    """That another device deleted what is committed again is not kept."""

    def make(original: Any) -> Any:
        def replaced(theirs: bytes | None, *rest: Any) -> Any:
            return [] if theirs is None else original(theirs, *rest)

        return replaced

    garden.replace(review, "_replaced", make)


@bug(
    "committed-again-over-what-is-below",
    "NO-SILENT-LOSS",
    knobs=CALM | {"person": 300, "invalid": 200},
)
def _committed_over_what_is_below(garden: Garden) -> None:
    """Where this device has changed an entity since, what is committed again replaces the fields of
    others without a trace."""

    def make(original: Any) -> Any:
        def keep(writer: Writer, keeper: Any, discarded: Any, write: Any) -> None:
            info = writer.catalogue.by_name.get(write[0])
            row = None if info is None else writer.entity((info.number, write[1]))
            if row is None or not row.pending:
                original(writer, keeper, discarded, write)

        return keep

    garden.replace(review, "_keep_replaced", make)


@bug(
    "put-back-over-what-came-since",
    "NO-SILENT-LOSS",
    knobs=CALM | {"person": 300, "policy_notes": 1},
)
def _put_back_over_what_came_since(garden: Garden) -> None:
    """What another device has written since where an overruled value is put back is not kept."""
    garden.replace(review, "_keep_unseen", lambda original: lambda *rest: None)


@bug(
    "reset-passes-over-what-was-written",
    "NO-SILENT-LOSS",
    knobs=CALM | {"restore_server": 50, "events": 2000, "pause_ms": 100},
)
def _reset_passes_over(garden: Garden) -> None:
    """A reset that keeps the device's side keeps nothing of what this device wrote where the
    server has a larger version."""
    garden.replace(adopt, "_keep_own", lambda original: lambda *rest: None)
