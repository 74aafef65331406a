"""What a person or a program looks at and decides on a device, between cycles.

Open conflicts (R25, R26), what was withdrawn or overruled (R4), the outbox, a reset (R29): each
change is one storage commit, and the next cycle pushes what comes of it. The steps of a cycle are
``applier``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

from msgspec.structs import replace

from entidb.db import Database, machine, overruled
from entidb.db.fields import LostField, Overruled, Side, field_at, lost_fields, with_field
from entidb.db.local import Writes
from entidb.db.outbox import DiscardedTransaction, discard_key, read_pending
from entidb.db.overruled import OverruledKeeper, OverruledValue, read_overruled
from entidb.db.pending import PendingTransaction
from entidb.db.records import (
    CONFLICT,
    NO_DEVICE,
    BaseRow,
    EntityRow,
    absent_base,
    conflict_key,
    end_of,
    split_numbered_key,
)
from entidb.db.subjects import count_others, discarded_of
from entidb.db.writer import Ref, Writer
from entidb.errors import ConfigError, ConflictError
from entidb.sync.apply.conflict_rows import decode_conflict
from entidb.sync.apply.position import remember_doubt
from entidb.sync.apply.rebase import Rebase
from entidb.sync.apply.report import RebaseReport
from entidb.sync.apply.signing import Export, hand_over, sign_out, withdraw_own
from entidb.sync.conflict import Action, Conflict, ConflictPolicy, ConflictResolution
from entidb.sync.policies import resolve_policy

_DAY_MS = 24 * 3600 * 1000


class Review:
    """A device's database with the policies of its collections: by name or callable in
    ``policies``, ``default_policy`` for the others. With ``keeps`` what they decide against is
    kept (R4)."""

    def __init__(
        self,
        database: Database,
        *,
        default_policy: str | ConflictPolicy,
        policies: Mapping[str, str | ConflictPolicy] | None,
        keeps: bool,
    ) -> None:
        self.database = database
        self._default = resolve_policy(default_policy)
        self._policies = {name: resolve_policy(p) for name, p in (policies or {}).items()}
        self._keeps = keeps

    def policy_for(self, collection: str) -> ConflictPolicy:
        return self._policies.get(collection, self._default)

    def _rebase(self, writer: Writer, server_ms: int, foreign: Set[int] = frozenset()) -> Rebase:
        return Rebase(writer, self.policy_for, server_ms, foreign=foreign, keeps=self._keeps)

    # ------------------------------------------------------------ conflicts (R25, R26)

    def conflicts(self) -> list[Conflict]:
        """Unresolved conflicts, in order of collection and id."""
        found = []
        with self.database.view() as view:
            names = view.catalogue.by_number
            for key, raw in view.snapshot.scan(CONFLICT, end_of(CONFLICT)):
                number, entity_id = split_numbered_key(key)
                info = names[number]
                row = view.entity((number, entity_id))
                local = None if row is None else row.payload
                found.append(decode_conflict(raw, info.name, (number, entity_id), local))
        return found

    def resolve(self, conflict: Conflict, resolution: ConflictResolution) -> RebaseReport:
        """Deal with an unresolved conflict; its transactions, and those that waited for them, are
        pushed by the next cycle. Raises ``ConflictError`` (``conflict_gone``) if it is not open,
        and (``conflict_changed``) if the server's side has changed since it was listed."""
        if not isinstance(conflict, Conflict):
            raise ConfigError(
                f"resolve takes an entry of conflicts(), not {conflict!r:.60}; list them first"
            )
        if resolution.action is Action.SKIP:
            raise ConflictError("skip leaves a conflict open", code="conflict_skipped")
        with self.database.write("local") as writer:
            info = writer.catalogue.by_name.get(conflict.collection)
            ref = (0 if info is None else info.number, conflict.id_bytes)
            raw = None if info is None else writer.get(conflict_key(*ref))
            if raw is None:
                raise ConflictError(
                    f"there is no open conflict on {conflict.collection}/{conflict.entity_id}; "
                    "list them again",
                    code="conflict_gone",
                )
            now = decode_conflict(raw, "", ref, None)
            # The same number can be of another history (R29).
            if (now.remote_version, now.remote_payload) != (
                conflict.remote_version,
                conflict.remote_payload,
            ):
                raise ConflictError(
                    f"the server's side of {conflict.collection}/{conflict.entity_id} has changed "
                    "since this conflict was listed; list them again",
                    code="conflict_changed",
                )
            rebase = self._rebase(writer, writer.now_ms)
            rebase.resolve(ref, conflict, resolution)
            rebase.release()
            return rebase.report

    # ------------------------------------------------------------ discarded and overruled (R4)

    def discarded(self) -> list[DiscardedTransaction]:
        """Withdrawn transactions, oldest first, each with whose it is."""
        with self.database.view() as view:
            return discarded_of(view)

    def overruled(self) -> list[OverruledValue]:
        """Values that a policy or a person decided against, from either side, oldest first."""
        with self.database.view() as view:
            return read_overruled(view)

    def overruled_count(self) -> int:
        """How many of them there are."""
        with self.database.view() as view:
            return overruled.read_head(view).count

    def recommit(self, discarded: DiscardedTransaction | OverruledValue) -> int:
        """Commit a discarded transaction again, as a new one on the present state, and take it
        off the list; returns the commit sequence. What it takes the place of, where that came from
        another device, is kept as overruled by a person, in the same commit (R4).

        Of an overruled value its field is written back, of an overruled entity the fields that
        were changed, and nothing else of what is there now; 0 is returned if that changes
        nothing. What another device has written there since is kept as well. Raises
        ``ConflictError`` (``discarded_gone``) if it is not in its list any more, and
        (``overruled_place_gone``) if the entity is deleted, or holds no map where the field was;
        then nothing has changed."""
        if isinstance(discarded, OverruledValue):
            return self._put_back(discarded)
        _check_entry("recommit", discarded)
        with self.database.write("local") as writer:
            key = discard_key(discarded)
            if writer.get(key) is None:
                raise ConflictError(
                    f"transaction {discarded.transaction_id.hex()} is not in the discarded list "
                    "any more",
                    code="discarded_gone",
                )
            writer.delete(key)
            writer.head.discarded -= 1
            writes: dict[str, dict[bytes, bytes | None]] = {}
            keeper = OverruledKeeper(writer, writer.now_ms)
            for name, entity_id, payload in discarded.operations:
                writes.setdefault(name, {})[entity_id] = payload
                if self._keeps:
                    _keep_replaced(writer, keeper, discarded, (name, entity_id, payload))
            keeper.store()
            return self.database.commit_writes(writer, writes)

    def _put_back(self, value: OverruledValue) -> int:
        with self.database.write("local") as writer:
            if not overruled.forget(writer, value.number):
                raise ConflictError(
                    f"the overruled value {value.number} of {value.collection}/{value.entity_id} "
                    "is not kept any more; list them again",
                    code="discarded_gone",
                )
            info = writer.catalogue.by_name.get(value.collection)
            row = None if info is None else writer.entity((info.number, value.id_bytes))
            there = payload = None if row is None else row.payload
            fields = value.fields()
            if there is None and value.payload is not None and not value.path:
                # The entity is not there, so it comes back whole.
                fields = [((), value.payload, value.won_payload)]
            for path, lost, _ in fields:
                try:
                    payload = with_field(payload, path, lost)
                except LookupError:
                    raise ConflictError(
                        f"{value.collection}/{value.entity_id} is deleted, or has no place for "
                        f"field {'.'.join(path)!r} any more; write the entity itself",
                        code="overruled_place_gone",
                    ) from None
            if payload == there:
                return 0
            if self._keeps and info is not None:
                _keep_unseen(writer, (info.number, value.id_bytes), value, fields)
            writes: Writes = {value.collection: {value.id_bytes: payload}}
            return self.database.commit_writes(writer, writes)

    def prune(self, discarded: DiscardedTransaction | OverruledValue) -> bool:
        """Forget a discarded transaction, or an overruled value, for good; returns whether it
        was there."""
        if isinstance(discarded, OverruledValue):
            with self.database.write("local") as writer:
                return overruled.forget(writer, discarded.number)
        _check_entry("prune", discarded)
        with self.database.write("local") as writer:
            key = discard_key(discarded)
            if writer.get(key) is None:
                return False
            writer.delete(key)
            writer.head.discarded -= 1
            return True

    def pending(self) -> Iterator[PendingTransaction]:
        """The outbox, oldest first, held ones included."""
        with self.database.view() as view:
            yield from read_pending(view.snapshot)

    # ------------------------------------------------------------ persons (R36)

    def others(self) -> dict[str, int]:
        """How many transactions wait for each of the other subjects."""
        with self.database.view() as view:
            return count_others(view.snapshot, view.sync_state)

    def sign_out(self, subject: str | None) -> int:
        """Keep what is pending for who has committed it, ``subject`` where no server has said who
        that is; how many transactions that are. Raises ``SyncStateError`` if nobody knows."""
        with self.database.write() as writer:
            own = writer.sync_state.subject or subject
            sign_out(writer, subject)
            kept = count_others(writer.snapshot, writer.sync_state)
        return 0 if own is None else kept.get(own, 0)

    def withdraw_own(self, export: Export | None) -> int:
        """Take out what is pending of the present subject, written by ``export`` before, and have
        them signed out."""
        with self.database.write() as writer:
            return withdraw_own(writer, self._rebase(writer, writer.now_ms), export)

    def hand_over(self, subject: str) -> int:
        """Make what waits for ``subject`` the present subject's; how many transactions."""
        with self.database.write() as writer:
            count = count_others(writer.snapshot, writer.sync_state).get(subject, 0)
            hand_over(writer, subject)
            return count

    # ------------------------------------------------------------ reset (R29)

    def reset(self, keep: str) -> None:
        """Start over with the server's present history. ``keep="server"`` takes its state;
        ``keep="device"`` also commits again what this device has newer or the server no longer
        has. Pending transactions stay pending either way."""
        if keep not in ("server", "device"):
            raise ConfigError(f"keep={keep!r}: choose 'server' or 'device'")
        with self.database.write() as writer:
            writer.abandon_stage()
            remember_doubt(writer)
            writer.set_inflight(machine.DISOWN(writer.inflight, None))
            state = writer.sync_state
            now = replace(
                state,
                history=None,
                cursor=0,
                have=[],
                full=True,
                foreign=True,
                keep_device=keep == "device",
                seen=None,
            )
            move = machine.RESET_DEVICE if keep == "device" else machine.RESET_SERVER
            writer.set_sync_state(move(state, now))


def _keep_replaced(
    writer: Writer,
    keeper: OverruledKeeper,
    discarded: DiscardedTransaction,
    write: tuple[str, bytes, bytes | None],
) -> None:
    """Keep what the server has for an entity from another device, a deletion too, where ``write``
    has something else: whether it was there already when the transaction was made is not known any
    more."""
    name, entity_id, payload = write
    info = writer.catalogue.by_name.get(name)
    if info is None:
        return
    ref = info.number, entity_id
    row = writer.entity(ref)
    theirs, known = _from_server(writer, ref, row), _lost_to(discarded, name, entity_id)
    if row is None and known is not None:
        # Deleted since, nobody knows by whom.
        theirs = known if known.payload is None else absent_base(0)
    elif theirs is not None and theirs.device_id == NO_DEVICE:
        # A base that is absent does not say whose deletion it was, nor that it was one.
        theirs = known and (known if known.version == theirs.version else theirs)
    if theirs is None or theirs.device_id == writer.device_id:
        return
    there = None if row is None else row.payload
    lost = [(Side.REMOTE, *each, None) for each in _replaced(theirs.payload, there, payload)]
    origin = theirs.device_id, theirs.timestamp, theirs.version
    mine = writer.device_id, discarded.timestamp, 0
    identity, sequence = discarded.transaction_id, discarded.sequence
    keeper.add(ref, mine, origin, identity, lost, overruled.BY_PERSON, sequence)


def _from_server(writer: Writer, ref: Ref, row: EntityRow | None) -> BaseRow | None:
    """What the server has of an entity; None if this device knows nothing of it, or has deleted
    the entity on top of that."""
    if row is None or (row.pending and row.payload is None):
        return None
    if row.pending:
        return writer.base(ref, row)
    return BaseRow(row.version, row.device_id, row.timestamp, row.payload)


def _keep_unseen(
    writer: Writer, ref: Ref, value: OverruledValue, fields: Sequence[LostField]
) -> None:
    """Keep what another device has written where ``value`` is put back: something else than what
    won, which is all that the list shows of it."""
    row = writer.entity(ref)
    theirs = _from_server(writer, ref, row)
    if row is None or theirs is None or theirs.device_id == writer.device_id:
        return
    lost: list[Overruled] = []
    for path, back, won in fields:
        there = field_at(row.payload, path)
        if there not in (back, won) and there == field_at(theirs.payload, path):
            lost.append((Side.REMOTE, path, there, back, None))
    keeper = OverruledKeeper(writer, writer.now_ms)
    mine = writer.device_id, value.timestamp, 0
    origin = theirs.device_id, theirs.timestamp, theirs.version
    keeper.add(ref, mine, origin, value.transaction_id, lost, overruled.BY_PERSON)
    keeper.store()


def _lost_to(discarded: DiscardedTransaction, name: str, entity_id: bytes) -> BaseRow | None:
    """The server's state of an entity that ``discarded`` lost to. It is known after a full pull
    too, which brings no tombstones."""
    for collection, lost_id, version, device, timestamp, payload in discarded.lost_to:
        if (collection, lost_id) == (name, entity_id):
            return BaseRow(version, device, timestamp, payload)
    return None


def _replaced(theirs: bytes | None, there: bytes | None, now: bytes | None) -> list[LostField]:
    """What of ``theirs`` goes when ``now`` takes the place of what is ``there``. What is not there
    any more was replaced by this device before, knowingly."""
    if theirs is None:
        return [((), None, now)] if there is None and now is not None else []
    known = [path for path, *_ in lost_fields(None, theirs, there)]
    return [
        each
        for each in lost_fields(None, theirs, now)
        if not any(each[0][: len(path)] == path for path in known)
    ]


def _check_entry(method: str, given: object) -> None:
    if not isinstance(given, DiscardedTransaction):
        raise ConfigError(
            f"{method} takes an entry of discarded() or overruled(), not {given!r:.60}; list them "
            "first"
        )
