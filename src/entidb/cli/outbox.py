"""``status``, ``pending``, ``conflicts``, ``resolve``, ``discarded``, ``reset``: what is not on the
server yet, what waits for a person, and what was withdrawn or overruled. Nothing here needs a
network.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click

from entidb import cbor
from entidb.cli.exits import NotFoundError, UsageError
from entidb.cli.output import (
    code_text,
    facts,
    fit,
    id_text,
    note,
    one_line,
    plural,
    safe,
    say,
    size_text,
    time_text,
    timestamp_text,
    told,
)
from entidb.cli.summary import place, waiting
from entidb.cli.values import print_json, read_value, shown
from entidb.cli.words import bind, full_id, json_option, opened, pick_id, words
from entidb.db import Database, DiscardedTransaction, OverruledValue, Role, inspect
from entidb.db.outbox import read_pending
from entidb.db.pending import PendingOp, PendingTransaction
from entidb.errors import ConfigError, ConflictError
from entidb.sync import Conflict, ConflictResolution, DatabaseApplier
from entidb.types import ms_from_timestamp, uuid_from_bytes

_OPERATIONS_SHOWN = 4


def _applier(database: Database) -> DatabaseApplier:
    if database.role is Role.SERVER:
        raise ConfigError(f"{database.where} is a server's database: it has no outbox")
    return DatabaseApplier(database)


# ---------------------------------------------------------------- status


@click.command("status")
@words("")
@json_option
def status_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """Say what is synchronised, pending, and waiting for you."""
    path = bind(words, directory).path
    with opened(path, read_only=True) as database:
        found = inspect(database)
        scope = database.scope
        who, others = None, {}
        if database.role is not Role.SERVER:
            applier = _applier(database)
            who, others = applier.state().subject, applier.others()
    document = {
        "path": path,
        "role": found["role"],
        "sequence": found["sequence"],
        "collections": len(found["collections"]),
        "entities": sum(each["entities"] for each in found["collections"].values()),
        "db_id": found["db_id"],
        "scope": None if scope is None else sorted(scope),
        "cursor": found["cursor"],
        "pending": found["pending"],
        "held": found["held"],
        "conflicts": found["conflicts"],
        "discarded": found["discarded"],
        "overruled": found["overruled"],
        "subject": who,
        "others": others,
    }
    if as_json:
        print_json(document)
        return
    for line in facts(_status(document)):
        say(line)


def _status(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "database", f"{found['path']} ({found['role']}, commit {found['sequence']:,})"
    yield (
        "holds",
        (
            f"{plural(found['entities'], 'entity', 'entities')} in "
            f"{plural(found['collections'], 'collection')}"
        ),
    )
    if found["role"] == Role.SERVER.value:
        return
    if found["db_id"] is None:
        yield "server", "never synchronised: `entidb sync` does"
    else:
        yield "server", f"database {found['db_id']}, up to its commit {found['cursor']:,}"
    if found["subject"] is not None:
        yield "subject", found["subject"]
    scope = found["scope"]
    yield "synchronises", "all that is not local" if scope is None else ", ".join(scope)
    yield "pending", _open(found["pending"], "transaction", "`entidb pending`")
    yield from (("", line) for line in waiting(found["others"]))
    if found["held"]:
        yield "held", f"{plural(found['held'], 'transaction')}, by conflicts"
    yield "conflicts", _open(found["conflicts"], "conflict", "`entidb conflicts`")
    yield "discarded", _open(found["discarded"], "transaction", "`entidb discarded`")
    yield "overruled", _open(found["overruled"], "value", "`entidb discarded`")


def _open(count: int, noun: str, command: str) -> str:
    return f"{plural(count, noun)}: see {command}" if count else "none"


# ---------------------------------------------------------------- pending


@click.command("pending")
@words("")
@json_option
def pending_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """List what the server has not decided yet, oldest first."""
    path = bind(words, directory).path
    count = 0
    with opened(path, read_only=True) as database:
        sent = {n for batch in _applier(database).inflight() for n in batch.sequences}
        with database.view() as view:
            names = {number: info.name for number, info in view.catalogue.by_number.items()}
            for transaction in read_pending(view.snapshot):
                count += 1
                state = (
                    "held"
                    if transaction.held
                    else "sent"
                    if transaction.sequence in sent
                    else "ready"
                )
                if as_json:
                    print_json(_pending_document(transaction, state, names))
                else:
                    say(fit(_pending_line(transaction, state, names)))
    if not count:
        note("nothing is pending: the server has decided everything")


def _pending_document(
    transaction: PendingTransaction, state: str, names: dict[int, str]
) -> dict[str, Any]:
    return {
        "transaction": str(uuid_from_bytes(transaction.transaction_id)),
        "sequence": transaction.sequence,
        "time_ms": ms_from_timestamp(transaction.timestamp),
        "state": state,
        "operations": [_operation(op, names) for op in transaction.operations],
    }


def _operation(op: PendingOp, names: dict[int, str]) -> dict[str, Any]:
    head = {"collection": names[op.collection], "id": str(uuid_from_bytes(op.entity_id))}
    if op.payload is None:
        return {**head, "kind": "delete"}
    return {**head, "kind": "put", "value": cbor.decode_trusted(op.payload)}


def _pending_line(transaction: PendingTransaction, state: str, names: dict[int, str]) -> str:
    counts = Counter(
        (names[op.collection], "deleted" if op.payload is None else "written")
        for op in transaction.operations
    )
    size = sum(len(op.payload or b"") for op in transaction.operations)
    what = ", ".join(f"{count} {kind} in {safe(name)}" for (name, kind), count in counts.items())
    identity = uuid_from_bytes(transaction.transaction_id)
    when = timestamp_text(transaction.timestamp)
    return f"{id_text(identity)}  {when}  {state:<5}  {what} ({size_text(size)})"


# ---------------------------------------------------------------- conflicts


@click.command("conflicts")
@words("")
@json_option
def conflicts_command(words: tuple[str, ...], directory: str | None, as_json: bool) -> None:
    """List the conflicts that wait for you, with all values."""
    path = bind(words, directory).path
    with opened(path, read_only=True) as database:
        found = _applier(database).conflicts()
    for conflict in found:
        if as_json:
            print_json(_conflict_document(conflict))
        else:
            for line in told(conflict.explain()):
                say(line)
            say(f"  entidb resolve {conflict.collection} {conflict.entity_id} mine|theirs|VALUE")
            say()
    if not found:
        note("no conflicts are open")


def _conflict_document(conflict: Conflict) -> dict[str, Any]:
    return {
        **place(conflict),
        "transaction": str(uuid_from_bytes(conflict.transaction_id)),
        "base": _side(conflict.base_payload, conflict.base_version, conflict.base_timestamp),
        "mine": _side(conflict.local_payload, None, conflict.local_timestamp),
        "theirs": _side(
            conflict.remote_payload, conflict.remote_version, conflict.remote_timestamp
        ),
        "policy_error": conflict.error,
    }


def _side(payload: bytes | None, version: int | None, timestamp: int) -> dict[str, Any]:
    """A value that is absent has no key ``value``: null would be one."""
    made: dict[str, Any] = {"exists": payload is not None, "time_ms": ms_from_timestamp(timestamp)}
    if version is not None:
        made["version"] = version
    if payload is not None:
        made["value"] = cbor.decode_trusted(payload)
    return made


@click.command("resolve")
@words("COLLECTION ID mine|theirs|delete|VALUE")
@click.option("--all", "every", is_flag=True, help="Every open conflict: DIR mine, or DIR theirs.")
@json_option
def resolve_command(
    words: tuple[str, ...], directory: str | None, every: bool, as_json: bool
) -> None:
    """Decide a conflict; the next sync pushes what was decided.

    mine: what this device has. theirs: what the server has; the transaction goes to the discarded
    list. delete: neither. VALUE: JSON, @FILE or - to be written instead of both.
    """
    names = ("CHOICE",) if every else ("COLLECTION", "ID", "CHOICE")
    bound = bind(words, directory, *names)
    resolution = _resolution(bound["CHOICE"])
    with opened(bound.path) as database:
        applier = _applier(database)
        chosen = applier.conflicts()
        if not every:
            chosen = [_one_conflict(chosen, bound["COLLECTION"], bound["ID"])]
        withdrawn = resolved = 0
        for conflict in chosen:
            try:
                report = applier.resolve(conflict, resolution)
            except ConflictError as error:
                # Taking the server's side can settle others that the same transaction touched.
                if error.code == "conflict_gone" and resolved:
                    continue
                raise
            withdrawn += len(report.withdrawn)
            resolved += 1
        left = database.read_head().conflicts
    if as_json:
        print_json({"resolved": resolved, "withdrawn": withdrawn, "open_conflicts": left})
        return
    say(f"resolved {plural(resolved, 'conflict')}; {plural(left, 'conflict')} left")
    if withdrawn:
        note(f"{plural(withdrawn, 'transaction')} withdrawn: see `entidb discarded`")


def _resolution(choice: str) -> ConflictResolution:
    if choice == "mine":
        return ConflictResolution.keep_local()
    if choice == "theirs":
        return ConflictResolution.accept_remote()
    if choice == "delete":
        return ConflictResolution.merge(None)
    value = read_value(choice, instead_of="mine, theirs or delete")
    if value is None:
        raise UsageError("null cannot be an entity; `delete` deletes it")
    return ConflictResolution.merge(value)


def _one_conflict(found: list[Conflict], collection: str, text: str) -> Conflict:
    there = {each.entity_id: each for each in found if each.collection == collection}
    wanted = full_id(text, collection) or pick_id(text, there, f"open conflict in {collection}")
    conflict = there.get(wanted)
    if conflict is None:
        raise NotFoundError(
            f"there is no open conflict on {wanted} in {collection}; `entidb conflicts` lists them"
        )
    return conflict


# ---------------------------------------------------------------- discarded


@click.command("discarded")
@words("")
@click.option("--recommit", metavar="ID", help="Commit this transaction again, or write this "
              "overruled value back, on what is there now; the next sync pushes it.")  # fmt: skip
@click.option("--prune", metavar="ID", help="Forget this transaction, or value, for good.")
@click.option("--recommit-all", is_flag=True, help="Commit all transactions again, oldest first.")
@click.option("--prune-all", "--all", is_flag=True, help="Forget all transactions and overruled "
              "values for good.")  # fmt: skip
@json_option
def discarded_command(
    words: tuple[str, ...],
    directory: str | None,
    recommit: str | None,
    prune: str | None,
    recommit_all: bool,
    prune_all: bool,
    as_json: bool,
) -> None:
    """List what was withdrawn or overruled, why, and what it lost to.

    Withdrawn transactions have a UUID as ID. Values that a policy or a person decided against, from
    either side, have one such as o17. With --recommit or --prune, decide what happens to one.
    """
    path = bind(words, directory).path
    changes = sum((recommit is not None, prune is not None, recommit_all, prune_all))
    if changes > 1:
        raise UsageError("one thing at a time: --recommit, --prune, --recommit-all or --prune-all")
    with opened(path, read_only=not changes) as database:
        applier = _applier(database)
        found: list[DiscardedTransaction | OverruledValue] = [*applier.discarded()]
        withdrawn = len(found)
        found += applier.overruled()
        if recommit is not None or recommit_all:
            chosen = found[:withdrawn] if recommit_all else [_one_discarded(found, str(recommit))]
            for each in chosen:
                applier.recommit(each)
            _say_done("committed again", chosen, as_json, "recommitted")
        elif prune is not None or prune_all:
            chosen = found if prune_all else [_one_discarded(found, str(prune))]
            for each in chosen:
                applier.prune(each)
            _say_done("forgotten", chosen, as_json, "pruned")
        else:
            _list_discarded(found, as_json)


def _one_discarded(
    found: list[DiscardedTransaction | OverruledValue], text: str
) -> DiscardedTransaction | OverruledValue:
    if text.startswith("o"):
        for each in found:
            if isinstance(each, OverruledValue) and _handle(each) == text:
                return each
        raise NotFoundError(f"there is no overruled value {text!r}; `entidb discarded` lists them")
    transactions = [each for each in found if isinstance(each, DiscardedTransaction)]
    identity = pick_id(text, (each.id for each in transactions), "discarded transaction")
    return next(each for each in transactions if each.id == identity)


def _handle(each: DiscardedTransaction | OverruledValue) -> str:
    """What names it on the command line: no UUID begins with an o."""
    return f"o{each.number}" if isinstance(each, OverruledValue) else str(each.id)


def _say_done(
    done: str,
    chosen: list[DiscardedTransaction | OverruledValue],
    as_json: bool,
    name: str,
) -> None:
    if as_json:
        print_json({name: [_handle(each) for each in chosen]})
        return
    values = sum(isinstance(each, OverruledValue) for each in chosen)
    counts = [plural(len(chosen) - values, "transaction")] if len(chosen) > values else []
    counts += [plural(values, "overruled value")] if values else []
    say(f"{done}: {' and '.join(counts) or 'nothing'}")


def _list_discarded(found: list[DiscardedTransaction | OverruledValue], as_json: bool) -> None:
    for each in found:
        if isinstance(each, OverruledValue):
            if as_json:
                print_json(_overruled_document(each))
            else:
                for line in _overruled_lines(each):
                    say(line)
        elif as_json:
            print_json(_discarded_document(each))
        else:
            for line in _discarded_lines(each):
                say(line)
    if not found:
        note("nothing was withdrawn or overruled")
    elif not as_json:
        note("--recommit ID commits one again, --prune ID forgets it")


def _overruled_lines(each: OverruledValue) -> Iterator[str]:
    first, *rest = each.explain().splitlines()
    whose = f" of {one_line(each.subject)}" if each.subject and each.side == "local" else ""
    when = time_text(each.at_ms)
    yield from told(f"{_handle(each)}{whose}  overruled {when} by a {each.decided_by}")
    yield from told(f"  {first}")
    for line in rest:
        yield fit(safe(line))


def _overruled_document(each: OverruledValue) -> dict[str, Any]:
    return {
        "overruled": _handle(each),
        "code": each.code,
        "collection": each.collection,
        "id": str(each.entity_id),
        "path": list(each.path),
        "side": each.side,
        "decided_by": each.decided_by,
        "overruled_ms": each.at_ms,
        "transaction": str(uuid_from_bytes(each.transaction_id)),
        "subject": each.subject,
        "device_id": each.device_id.hex(),
        "lost": _side(each.payload, each.version or None, each.timestamp),
        "lost_to": {
            "device_id": each.lost_to_device.hex(),
            **_side(each.won_payload, each.lost_to_version or None, each.lost_to_timestamp),
        },
    }


def _discarded_lines(each: DiscardedTransaction) -> Iterator[str]:
    when = time_text(each.at_ms)
    whose = "" if each.subject is None else f" of {one_line(each.subject)}"
    yield from told(f"{id_text(each.id)}{whose}  withdrawn {when} [{code_text(each.code)}]")
    yield from told(f"  why: {one_line(each.message)}")
    values = each.values()
    for name, entity_id, value in values[:_OPERATIONS_SHOWN]:
        yield fit(f"  wrote {safe(name)} {id_text(entity_id)}  {_shown_or(value, 'deleted')}")
    if len(values) > _OPERATIONS_SHOWN:
        yield f"  … and {len(values) - _OPERATIONS_SHOWN:,} more, with --json"
    for name, raw, _, _, _, payload in each.lost_to[:_OPERATIONS_SHOWN]:
        value = None if payload is None else cbor.decode_trusted(payload)
        where = f"{safe(name)} {id_text(uuid_from_bytes(raw))}"
        yield fit(f"  lost to {where}  {_shown_or(value, 'deleted')}")


def _shown_or(value: Any, absent: str) -> str:
    return absent if value is None else shown(value)


def _discarded_document(each: DiscardedTransaction) -> dict[str, Any]:
    return {
        "transaction": str(each.id),
        "sequence": each.sequence,
        "subject": each.subject,
        "time_ms": ms_from_timestamp(each.timestamp),
        "withdrawn_ms": each.at_ms,
        "code": each.code,
        "message": each.message,
        "operations": [_written(*operation) for operation in each.values()],
        "lost_to": [_lost_to(*entry) for entry in each.lost_to],
    }


def _written(collection: str, entity_id: uuid.UUID, value: Any) -> dict[str, Any]:
    head = {"collection": collection, "id": str(entity_id)}
    return {**head, "kind": "delete"} if value is None else {**head, "kind": "put", "value": value}


def _lost_to(
    collection: str, raw: bytes, version: int, device: bytes, timestamp: int, payload: bytes | None
) -> dict[str, Any]:
    return {
        "collection": collection,
        "id": str(uuid_from_bytes(raw)),
        "device_id": device.hex(),
        **_side(payload, version, timestamp),
    }


# ---------------------------------------------------------------- reset


@click.command("reset")
@words("")
@click.option("--keep", type=click.Choice(("server", "device")), required=True, help="server: take "
              "its state. device: also commit again what it no longer has.")  # fmt: skip
@json_option
def reset_command(words: tuple[str, ...], directory: str | None, keep: str, as_json: bool) -> None:
    """Start over with a server that was restored or made anew.

    This is the answer to the error history_changed. The next sync pulls everything. Pending
    transactions stay pending either way.
    """
    path = bind(words, directory).path
    from entidb.sync.others import Others

    with opened(path) as database, Others(database, database.clock).kept_out():
        _applier(database).reset(keep)
        pending = database.read_head().ready
    if as_json:
        print_json({"keep": keep, "pending": pending})
    else:
        say(f"the next sync starts over and keeps the {keep}'s side; {pending} still pending")
