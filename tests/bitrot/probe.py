"""Looks at copies of a database, each with one flipped bit, from processes that may die of it.

    python -m tests.bitrot.probe DIRECTORY WITHOUT LOOKS BIT BIT …

prints one line of JSON per bit: what reading it gave, what ``verify`` found, and what got out to a
peer, as far as LOOKS names them: ``read,verify,sent``. Each of the three happens in a process of
its own, so that one that is killed by a signal, or never ends, says so and stops nothing. WITHOUT
is ``nothing``, or the guard that is taken away to show that it is needed, ``checksums`` or
``pages``, or the ``look`` at a file before it is opened, as if the bit had flipped afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from entidb import cbor
from entidb.db import Database, Role, dump
from entidb.db.outbox import read_discarded, read_pending
from entidb.errors import EntiDBError
from entidb.protocol import (
    LIMITS,
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    PushResult,
    SyncRequest,
    Verdict,
)
from entidb.storage.checksums import RESIDUE
from entidb.storage.lmdb import doubt, verifying
from entidb.storage.lmdb import snapshot as reading
from entidb.storage.lmdb.pages import closed_file_faults
from entidb.sync import MockTransport
from tests.bitrot.content import DB_ID, GRANT, engine_on, service_on
from tests.bitrot.flips import flip

#: Far beyond what any look at these small files takes: it only ends a look that never ends.
_SECONDS = 60
_MEMORY_BYTES = 2**31
_DEVICE = b"\x07" * 16
#: In this order: what a device sends, it takes out of its outbox.
LOOKS = ("read", "verify", "sent")

Sent = dict[str, list[Any]]
Look = Callable[[Database, Sent], Any]


# ---------------------------------------------------------------- what is looked at


def read_everything(database: Database, sent: Sent) -> str:
    """A digest of all a program can read, by key and by walking."""
    digest = hashlib.sha256()

    def add(*item: Any) -> None:
        digest.update(repr(item).encode())

    for name in database.collections():
        collection = database.collection(name)
        walked = list(collection.items())
        add(name, len(collection), walked)
        add([collection.get(entity_id) for entity_id, _ in walked])
        add(collection.get_many([entity_id for entity_id, _ in walked]))
    for event in database.changes():
        add(event)
    for row in dump(database):
        add(row)
    with database.storage.snapshot() as snapshot:
        add(list(read_pending(snapshot)), read_discarded(snapshot))
        add(snapshot.scan(b"", b"\xff" * 512))
    add(database.read_head(), database.device_id, database.history, database.scope)
    return digest.hexdigest()


def sent_by_server(database: Database, sent: Sent) -> None:
    """Every operation that pulls from several cursors get, by where and when it was written."""
    service = service_on(database)
    assert database.history is not None
    for cursor in (0, 40, 80):
        more, full = True, cursor == 0
        while more:
            request = PullRequest(
                db_id=DB_ID,
                device_id=_DEVICE,
                history=database.history,
                cursor=cursor,
                limit=25,
                bytes_max=1 << 20,
                full=full,
            )
            answer = service.pull(request, GRANT)
            _note(answer, sent)
            assert answer.cursor > cursor or not answer.has_more, "a page that leads nowhere"
            cursor, more = answer.cursor, answer.has_more


def _note(answer: PullResponse, sent: Sent) -> None:
    for commit in answer.commits:
        for op in commit.operations:
            name = answer.collections[op.collection]
            key = f"{name}/{op.entity_id.hex()}/{commit.version}"
            body = None if op.payload is None else op.payload.hex()
            sent[key] = [commit.device_id.hex(), commit.timestamp, body]


def sent_by_device(database: Database, sent: Sent) -> None:
    """Every transaction that a cycle pushes to a server that accepts all of them."""
    with database.view() as view:
        # None if the flip hides the record; then the device greets a server it has never met.
        history = view.sync_state.history or bytes(16)
    versions = iter(range(1_000_000, 2_000_000))

    def answer(request: SyncRequest) -> Any:
        if isinstance(request, HandshakeRequest):
            return HandshakeResponse(
                major=1, minor=0, history=history, head=request.cursor, floor=0, limits=LIMITS,
                features=[], time=0,
            )  # fmt: skip
        if isinstance(request, PullRequest):
            return PullResponse(
                collections=[], commits=[], cursor=request.cursor, has_more=False,
                head=request.cursor, floor=0, time=0,
            )  # fmt: skip
        assert isinstance(request, PushRequest)  # no rounds: they are not announced
        _note_push(request, sent)
        results = [PushResult(Verdict.ACCEPTED, next(versions)) for _ in request.transactions]
        return PushResponse(results=results, collections=[], head=2_000_000, time=0)

    with engine_on(database, MockTransport(answer)) as engine:
        engine.sync()


def _note_push(request: PushRequest, sent: Sent) -> None:
    for transaction in request.transactions:
        sent[transaction.transaction_id.hex()] = [
            [request.collections[op.collection], op.entity_id.hex(), op.base_version,
             None if op.payload is None else op.payload.hex()]
            for op in transaction.operations
        ]  # fmt: skip


# ---------------------------------------------------------------- one process per look


def look(path: Path, what: Look) -> dict[str, Any]:
    """What ``what`` returns for the database at ``path``, or the error of opening or reading it,
    or how its process died."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        _be_a_child(path, what, writable)
    os.close(writable)
    try:
        raw = _read_all(readable, child)
    finally:
        os.close(readable)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"died": signal.Signals(os.WTERMSIG(status)).name}
    found: dict[str, Any] = cbor.decode(raw)
    return found


def _read_all(readable: int, child: int) -> bytes:
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([readable], [], [], _SECONDS)
        if not ready:
            os.kill(child, signal.SIGXCPU)
            return b""
        part = os.read(readable, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _be_a_child(path: Path, what: Look, writable: int) -> None:
    """Never returns: whatever happens, this process ends here."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        found = _found(path, what)
        with open(writable, "wb") as report:
            report.write(cbor.encode(found))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _found(path: Path, what: Look) -> dict[str, Any]:
    sent: Sent = {}
    try:
        role = Role.SERVER if path.name == "server" else Role.DEVICE
        with Database.open(path, create=False, role=role, map_bytes=1 << 24) as database:
            return {"value": what(database, sent), "sent": sent}
    except (EntiDBError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}", "sent": sent}
    except Exception as error:
        return {"surprise": "".join(traceback.format_exception(error)), "sent": sent}


def verify(database: Database, sent: Sent) -> list[str]:
    return database.verify()[:3]


def look_at(pristine: Path, bit: int | None, names: Sequence[str] = LOOKS) -> dict[str, Any]:
    """Looks at a copy of the database in ``pristine``, with ``bit`` flipped in it."""
    looks = {"read": read_everything, "verify": verify, "sent": sent_by_device}
    if pristine.name == "server":
        looks["sent"] = sent_by_server
    with tempfile.TemporaryDirectory(prefix="bitrot-") as scratch:
        path = Path(scratch, pristine.name)
        shutil.copytree(pristine, path)
        if bit is not None:
            flip(path / "data.mdb", bit)
        unopened = closed_file_faults(str(path / "data.mdb"))
        found: dict[str, Any] = {name: look(path, looks[name]) for name in LOOKS if name in names}
    return found | {"unopened": unopened}


def take_away(guard: str) -> None:
    if guard == "checksums":
        setattr(reading, "crc32", lambda *parts: RESIDUE)  # noqa: B010
    elif guard == "look":
        setattr(doubt, "closed_file_faults", lambda path, rest=None: [])  # noqa: B010
    elif guard == "pages":
        setattr(verifying, "page_faults", lambda path, header: iter(()))  # noqa: B010
        setattr(doubt, "closed_file_faults", lambda path, rest=None: [])  # noqa: B010


def main(pristine: Path, names: Sequence[str], bits: list[int]) -> None:
    for bit in bits:
        print(json.dumps({"bit": bit, **look_at(pristine, bit, names)}), flush=True)


if __name__ == "__main__":
    take_away(sys.argv[2])
    main(Path(sys.argv[1]), sys.argv[3].split(","), [int(bit) for bit in sys.argv[4:]])
