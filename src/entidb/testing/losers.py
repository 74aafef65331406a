"""NO-SILENT-LOSS field by field: what a policy or a person decides against has to be kept, in the
commit that decides (R4), and nothing that is kept may go by itself too early.

What was lost is worked out from the three values of the question and from what the view shows
after the commit, leaf by leaf, and not with the code under test.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from entidb import cbor
from entidb.db.overruled import OverruledValue, values_of
from entidb.db.records import OVERRULED
from entidb.sync import Conflict
from entidb.testing.invariants import Checks
from entidb.testing.oracle import Ref
from entidb.types import Clock

Path = tuple[str, ...]
Records = Mapping[bytes, bytes]
_DAY_MS = 24 * 3600 * 1000


class KeepLimits(NamedTuple):
    """How many values a device keeps, and for how long."""

    count_max: int
    days: float


class Losers:
    """The overruled values of one device, as they should be."""

    def __init__(self, checks: Checks, name: str, server_clock: Clock) -> None:
        self.checks = checks
        self.name = name
        self._server_clock = server_clock
        self.limits = KeepLimits(10_000, 90.0)
        #: Fields that a policy adds up or joins, by collection: neither side loses there.
        self.combined: dict[str, frozenset[str]] = {}
        #: Whether the policies are known, so that what they combine is.
        self.judges = True
        self.kept: dict[int, OverruledValue] = {}
        #: What a person is taking off the list.
        self.by_person: int | None = None
        #: How many were kept since the last report, and whether that says so of all (a reset
        #: keeps some outside of a cycle's report).
        self.unreported = 0
        self._reset = False

    def adopt(self, records: Records) -> None:
        self.kept = dict(_kept(records[key] for key in sorted(records) if key[:1] == OVERRULED))
        self.forget_reports()

    def forget_reports(self) -> None:
        self.unreported, self._reset = 0, False

    def set_aside(self) -> tuple[int, bool]:
        """What a cycle under way has not reported yet: a person's decision reports for itself."""
        aside = self.unreported, self._reset
        self.forget_reports()
        return aside

    def take_back(self, aside: tuple[int, bool]) -> None:
        self.unreported, self._reset = aside

    def same_as(self, records: Records) -> bool:
        rows = (records[key] for key in sorted(records) if key[:1] == OVERRULED)
        return dict(_kept(rows)) == self.kept

    # ------------------------------------------------------------ commits

    def on_commit(
        self, batch: Mapping[bytes, bytes | None], old: Mapping[bytes, bytes | None]
    ) -> dict[tuple[str, bytes], list[OverruledValue]]:
        """Follow the list; returns what this commit adds to it, by entity."""
        before: dict[int, OverruledValue] = {}
        after: dict[int, OverruledValue] = {}
        for key, raw in batch.items():
            if key[:1] == OVERRULED:
                was = old[key]
                before.update(_kept([was] if was is not None else []))
                after.update(_kept([raw] if raw is not None else []))
        added: dict[tuple[str, bytes], list[OverruledValue]] = {}
        for number, value in after.items():
            if number in before:
                self.checks.that(
                    value == before[number],
                    "NO-SILENT-LOSS",
                    f"{self.name} changed the overruled value {number}",
                )
            else:
                added.setdefault((value.collection, value.id_bytes), []).append(value)
                self.kept[number] = value
                self.unreported += 1
                self._reset |= value.decided_by == "reset"
        gone = sorted(before.keys() - after.keys())
        # One may go because there are too many, although others go for their age in the same
        # commit.
        for number in gone:
            self._check_gone(before[number])
        for number in gone:
            self.kept.pop(number)
        return added

    def _check_gone(self, value: OverruledValue) -> None:
        newer = sum(number > value.number for number in self.kept)
        too_old = self._server_clock.now_ms() - self.limits.days * _DAY_MS
        self.checks.that(
            value.number == self.by_person
            or newer >= self.limits.count_max
            or value.at_ms < too_old,
            "NO-SILENT-LOSS",
            f"{self.name} forgot the overruled value {value.number} by itself, with {newer} newer "
            f"ones of {self.limits.count_max} that may be kept",
        )

    def check(
        self,
        conflict: Conflict,
        view: bytes | None,
        added: Iterable[OverruledValue],
        discarded: Iterable[bytes | None],
        *,
        combines: bool,
        accepted: bool,
    ) -> None:
        """What was decided about ``conflict`` left ``view``. ``discarded`` is what withdrawn
        transactions wrote to the entity; ``accepted`` says that the server has this device's side
        from one of them."""
        if not self.judges or not self.limits.count_max:
            return
        base, local, remote = conflict.base_payload, conflict.local_payload, conflict.remote_payload
        whole = any(type(_value(each)) is not dict for each in (local, remote, view))
        joined = self.combined.get(conflict.collection, frozenset())
        added = list(added)
        withdrawn = [((), payload) for payload in discarded]
        for side, payload in (("local", local), ("remote", remote)):
            if side == "local" and accepted:
                continue
            places = [(value.path, value.payload) for value in added if value.side == side]
            places += withdrawn
            for path, leaf in lost_leaves(base, payload, view):
                if combines and not whole and path[:1] and path[0] in joined:
                    continue
                self.checks.that(
                    any(_covers(place, held, path, leaf) for place, held in places),
                    "NO-SILENT-LOSS",
                    f"{self.name} decided against the {side} {leaf!r} at {'.'.join(path)!r} of "
                    f"{conflict.collection}/{conflict.id_bytes.hex()}, and keeps nothing of it",
                )

    def check_replaced(
        self,
        ref: Ref,
        was: bytes | None,
        shown: bytes | None,
        view: bytes | None,
        added: Iterable[OverruledValue],
    ) -> None:
        """A person committed a transaction again over what another device wrote or deleted: ``was``
        on the server, of which the view still ``shown``."""
        if not self.limits.count_max:
            return
        places = [(value.path, value.payload) for value in added if value.side == "remote"]
        if was is None and shown is None and view is not None:
            self.checks.that(
                ((), None) in places,
                "NO-SILENT-LOSS",
                f"{self.name} commits again over a deletion of {ref[0]}/{ref[1].hex()}, which "
                "another device made, and keeps nothing of it",
            )
        there = leaves(shown)
        for path, leaf in lost_leaves(None, was, view):
            self.checks.that(
                there.get(path) != leaf
                or any(_covers(place, held, path, leaf) for place, held in places),
                "NO-SILENT-LOSS",
                f"{self.name} commits again over {leaf!r} at {'.'.join(path)!r} of {ref[0]}/"
                f"{ref[1].hex()}, which another device wrote, and keeps nothing of it",
            )

    def check_put_back(
        self,
        ref: Ref,
        was: bytes | None,
        won: Mapping[Path, bytes],
        view: bytes | None,
        added: Iterable[OverruledValue],
    ) -> None:
        """A person put an overruled value back, over ``was``; the list showed what had ``won``."""
        places = [(value.path, value.payload) for value in added if value.side == "remote"]
        for path, leaf in lost_leaves(None, was, view) if self.limits.count_max else ():
            self.checks.that(
                won.get(path) == leaf
                or any(_covers(place, held, path, leaf) for place, held in places),
                "NO-SILENT-LOSS",
                f"{self.name} puts a value back over {leaf!r} at {'.'.join(path)!r} of {ref[0]}/"
                f"{ref[1].hex()}, which another device wrote since, and keeps nothing of it",
            )

    def check_undecided(self, refs: Iterable[Ref], added: Mapping[Ref, Any]) -> None:
        """No value is overruled without a decision."""
        for ref in added.keys() - set(refs):
            values = added[ref]
            self.checks.that(
                all(value.decided_by == "reset" for value in values),
                "NO-SILENT-LOSS",
                f"{self.name} says that {ref[0]}/{ref[1].hex()} was overruled, without a decision",
            )

    def check_report(self, overruled: int) -> None:
        self.checks.that(
            self._reset or overruled == self.unreported,
            "SURFACED-ONCE",
            f"{self.name} keeps {self.unreported} new overruled values, and reported {overruled}",
        )
        self.forget_reports()


def _kept(rows: Iterable[bytes]) -> Iterator[tuple[int, OverruledValue]]:
    for raw in rows:
        for value in values_of(raw):
            yield value.number, value


# ---------------------------------------------------------------- leaves


def _value(payload: bytes | None) -> Any:
    return None if payload is None else cbor.decode_trusted(payload)


def leaves(payload: bytes | None) -> dict[Path, bytes]:
    """Every value that is no map, by its path. Maps without anything in them do not count."""
    found: dict[Path, bytes] = {}
    todo: list[tuple[Path, Any]] = [] if payload is None else [((), _value(payload))]
    while todo:
        path, value = todo.pop()
        if type(value) is dict:
            todo += [((*path, key), inner) for key, inner in value.items()]
        else:
            found[path] = cbor.encode(value)
    return found


def lost_leaves(
    base: bytes | None, side: bytes | None, view: bytes | None
) -> list[tuple[Path, bytes | None]]:
    """What ``side`` changed of ``base`` and the view has not; None where that is a removal."""
    if side is None:
        return [((), None)] if base is not None and view is not None else []
    was, mine, now = leaves(base), leaves(side), leaves(view)
    lost: list[tuple[Path, bytes | None]] = [
        (path, leaf) for path, leaf in mine.items() if leaf not in (was.get(path), now.get(path))
    ]
    for path in was:
        replaced = any(path[: len(p)] == p or p[: len(path)] == path for p in mine)
        if path in now and not replaced:
            lost.append((path, None))
    return lost


def _covers(place: Path, held: bytes | None, path: Path, leaf: bytes | None) -> bool:
    """Whether what is kept at ``place`` has the leaf, or is the removal."""
    return path[: len(place)] == place and leaves(held).get(path[len(place) :]) == leaf


__all__ = ["KeepLimits", "Losers", "leaves", "lost_leaves"]
