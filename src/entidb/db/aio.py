"""The database for asyncio: reads are direct, because they take microseconds; whatever waits for a
disk or for another thread's transaction is awaited, and done on one thread for all tasks.

Not here: putting several tasks' writes into one commit (``committer``), what a transaction
has read (``draft``), and synchronising (``entidb.sync.aio``).
"""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, cast, overload

from entidb.db.awaited_feed import AsyncChanges, call_on
from entidb.db.codec import codec_for
from entidb.db.collection import ReadCollection, TransactionCollection, kept
from entidb.db.committer import Committer, Job, Staging
from entidb.db.conditions import Condition, Field
from entidb.db.draft import Draft, ReadSet, SeeingRows
from entidb.db.entity_info import id_bytes
from entidb.db.given import pairs_of
from entidb.db.index_definition import Index
from entidb.db.indexed import Indexed
from entidb.db.live import Found, LiveQuery
from entidb.db.notebook import Explored
from entidb.db.observing import add_observer
from entidb.db.plain import ValueCodec
from entidb.db.query import Query, Where
from entidb.db.reading import OnInvalid, Upgrade
from entidb.db.records import META_HEAD, decode_head
from entidb.db.rows import SnapshotRows
from entidb.db.scope import change_local
from entidb.db.settings import names_of
from entidb.db.snapshot import Snapshot
from entidb.errors import ConfigError, TransactionConflictError
from entidb.events import Thread
from entidb.types import Uncopied, check_name, kind_name, repr_of, uuid_from_bytes

V = TypeVar("V")
T = TypeVar("T")
#: Times that ``AsyncDatabase.run`` tries.
ATTEMPTS = 10


class AsyncDatabase(Uncopied, Explored):
    """``db.aio``: a database in an asyncio program.

    Writes are awaited, and durable when they return. No write waits on the event loop, not even
    while a thread holds a transaction open. Tasks that commit at once share a storage commit.

    *Cancelling* a write leaves it committed or not, and says which: the ``CancelledError`` has
    ``sequence``, the number of the commit, 0 where nothing was committed, and a note in words.
    """

    def __init__(self, core: Indexed, close: Callable[[], None]) -> None:
        self._core = core
        self._close = close
        self._committer = Committer(core)

    # ------------------------------------------------------------ reading

    @overload
    def collection(
        self, name: str, *, on_invalid: OnInvalid = "raise", upgrade: Upgrade | None = None
    ) -> AsyncCollection[Any]: ...

    @overload
    def collection(
        self,
        name: str,
        type: type[V],
        *,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> AsyncCollection[V]: ...

    def collection(
        self,
        name: str,
        type: type[Any] | None = None,
        *,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> AsyncCollection[Any]:
        """The collection ``name``; the arguments are those of ``Database.collection``, but for
        ``local``: see ``declare_local``."""
        check_name(name)
        codec = codec_for(type, exact=exact, on_invalid=on_invalid, upgrade=upgrade)
        return AsyncCollection(name, codec, self)

    def __getitem__(self, name: str) -> AsyncCollection[Any]:
        """``db["notes"]`` is ``db.collection("notes")``."""
        return self.collection(name)

    def collections(self) -> list[str]:
        """Names of the collections that exist, in order."""
        with self._core._open_rows() as rows:
            return sorted(rows.catalogue.by_name)

    def snapshot(self) -> Snapshot:
        """One unchanging view to read several things from."""
        snapshot = self._core.storage.snapshot()
        try:
            return Snapshot(SnapshotRows(snapshot, self._core.read_catalogue(snapshot)))
        except BaseException:
            snapshot.close()
            raise

    def changes(self, after: int = 0, *, collections: Iterable[str] | None = None) -> AsyncChanges:
        """What changed after commit ``after``, and then what changes, without an end:
        ``async for event in db.changes(after=cursor)``. See ``ChangeFeed``; ``cursor`` of what this
        returns says where to go on another day."""
        chosen = None if collections is None else names_of(collections)
        return AsyncChanges(self._core, after, chosen)

    @property
    def sequence(self) -> int:
        """The newest commit sequence."""
        return self._core.read_head().sequence

    # ------------------------------------------------------------ writing

    def transaction(self) -> AsyncTransaction:
        """``async with db.transaction() as tx: tx[notes][id] = …``, committed when the block ends.

        It holds no lock: others write meanwhile. What it reads is one snapshot with its own writes
        on top. If another transaction has changed something of what it read, its commit raises
        ``TransactionConflictError`` and nothing is written; ``run`` begins again by itself.
        """
        return AsyncTransaction(self)

    @overload
    async def run(
        self, function: Callable[[AsyncTransaction], Awaitable[T]], *, attempts: int = ATTEMPTS
    ) -> T: ...

    @overload
    async def run(
        self, function: Callable[[AsyncTransaction], T], *, attempts: int = ATTEMPTS
    ) -> T: ...

    async def run(
        self, function: Callable[[AsyncTransaction], Any], *, attempts: int = ATTEMPTS
    ) -> Any:
        """What ``function`` returns, called with a transaction that is committed then; called again
        while others change what it reads, at most ``attempts`` times.

        Raises ``TransactionConflictError`` after that, and what the function raises, with nothing
        written. ``ConfigError`` for what is no number of attempts, or no function."""
        if not callable(function):
            raise ConfigError(f"run takes a function of a transaction, not {kind_name(function)}")
        given: object = attempts
        if type(given) is not int or given < 1:
            raise ConfigError(f"attempts is a number from 1, not {repr_of(given, 60)}")
        for left in reversed(range(attempts)):
            try:
                async with self.transaction() as tx:
                    made = function(tx)
                    result = await made if inspect.isawaitable(made) else made
                return result
            except TransactionConflictError:
                if not left:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def declare_local(self, name: str, local: bool = True) -> None:
        """As ``Database.declare_local``."""
        check_name(name)

        def declare() -> None:
            with self._core._open_rows() as rows:
                info = rows.catalogue.by_name.get(name)
            if (info is None and not local) or (info is not None and info.local == local):
                return
            with self._core.write("local") as writer:
                change_local(writer, name, local)

        await in_thread(declare, "entidb-aio-declare")

    async def declare_indexes(self, name: str, indexes: Sequence[Index]) -> None:
        """Make ``indexes`` all that a collection has, as ``Database.collection(indexes=…)`` does.
        They are built in the background. Raises ``ConfigError``, and what a commit does."""
        check_name(name)
        await in_thread(lambda: self._core._declare_indexes(name, indexes), "entidb-aio-indexes")

    async def wait_for_indexes(self, timeout_s: float | None = None) -> bool:
        """As ``Database.wait_for_indexes``."""
        wait = partial(self._core.wait_for_indexes, timeout_s)
        return await in_thread(wait, "entidb-aio-indexes")

    async def _commit(
        self, work: Callable[[Staging], T], transaction_id: bytes | None = None
    ) -> Job[T]:
        """Have ``work`` committed; its job, which is over. Raises what the commit does."""
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        job = Job(work, lambda: call_on(loop, over.set), transaction_id)
        self._committer.submit(job)
        cancelled: asyncio.CancelledError | None = None
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
                if self._committer.withdraw(job):
                    break
                # It is being committed at this moment; what became of it is known soon.
        if cancelled is not None:
            raise _told(cancelled, job)
        if job.error is not None:
            raise job.error
        return job

    # ------------------------------------------------------------ the end

    async def close(self) -> None:
        """Finish what is being committed, and close the database. Idempotent."""

        def close() -> None:
            self._committer.close()
            self._close()

        await in_thread(close, "entidb-aio-close")

    async def __aenter__(self) -> AsyncDatabase:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncDatabase {self._core.where!r} {self._core.role.value}>"


def _told(error: asyncio.CancelledError, job: Job[Any]) -> asyncio.CancelledError:
    """``error``, saying what became of ``job``."""
    error.sequence = job.sequence  # type: ignore[attr-defined]
    if job.sequence:
        error.add_note(f"the write that was cancelled was committed, as {job.sequence}")
    elif job.sequence is None:
        error.add_note(f"whether the write that was cancelled is durable is open: {job.error}")
    else:
        error.add_note("the write that was cancelled was not committed")
    return error


async def in_thread(function: Callable[[], T], name: str) -> T:
    """What ``function`` returns, called on a thread of its own, whose end is waited for also when
    the task is cancelled. Not one of the loop's pool, which others may have filled."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        call_on(loop, over.set)

    Thread(target=run, name=name, daemon=True).start()
    cancelled: asyncio.CancelledError | None = None
    while not over.is_set():
        try:
            await over.wait()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    if errors:
        raise errors[0]
    return results[0]


# ---------------------------------------------------------------- transactions


class AsyncTransaction(Draft):
    """Writes that become durable, and visible, together or not at all; made by
    ``AsyncDatabase.transaction``. Its collections are read and written without ``await``, because
    that only happens in memory. ``sequence`` is that of the commit, 0 until then, also when it was
    cancelled; 0 if there was nothing to write."""

    def __init__(self, database: AsyncDatabase) -> None:
        core = database._core
        self._database = database
        self._snapshot = snapshot = core.storage.snapshot()
        try:
            rows = SnapshotRows(snapshot, core.read_catalogue(snapshot))
            raw = snapshot.get(META_HEAD)
        except BaseException:
            snapshot.close()
            raise
        self._seen = ReadSet(0 if raw is None else decode_head(raw).sequence)
        super().__init__(SeeingRows(rows, self._seen), core._ids.new_bytes)
        self.transaction_id = core._ids.new_bytes()
        self.sequence = 0

    @property
    def id(self) -> uuid.UUID:
        """What names it on its whole way (R3)."""
        return uuid_from_bytes(self.transaction_id)

    async def commit(self) -> int:
        """Make everything durable and return the commit sequence. Raises
        ``TransactionConflictError``, ``TransactionTooLargeError`` and storage errors; nothing is
        written then, and the transaction is over."""
        self._check_open()
        self._end("committed")
        if not any(self.writes.values()):
            return 0
        try:
            job = await self._database._commit(self._work, self.transaction_id)
        except asyncio.CancelledError as error:
            self.sequence = getattr(error, "sequence", 0) or 0
            raise
        except BaseException:
            self._over = "aborted"
            raise
        self.sequence = job.sequence or 0
        return self.sequence

    def abort(self) -> None:
        """Forget all writes. Does nothing on a transaction that is over."""
        if self._over is None:
            self._end("aborted")

    def _work(self, staging: Staging) -> None:
        self._seen.check(staging.committed, staging.before)
        staging.writes.update({name: dict(ids) for name, ids in self.writes.items()})

    def _end(self, how: str) -> None:
        self._over = how
        self._snapshot.close()

    async def __aenter__(self) -> AsyncTransaction:
        return self

    async def __aexit__(self, kind: object, *rest: object) -> None:
        if self._over is not None:
            return
        if kind is None:
            await self.commit()
        else:
            self.abort()


# ---------------------------------------------------------------- collections


class AsyncWhere(Where[V]):
    """As ``Where``."""

    __slots__ = ()

    def __call__(self, /, *conditions: Condition, **equal: Any) -> AsyncQuery[V]:
        """As ``Where``'s."""
        return cast("AsyncQuery[V]", super().__call__(*conditions, **equal))

    def from_dict(self, given: Mapping[str, Any]) -> AsyncQuery[V]:
        """As ``Where``'s."""
        return cast("AsyncQuery[V]", super().from_dict(given))


class AsyncQuery(Query[V]):
    """A query whose ``delete`` is awaited."""

    __slots__ = ()

    @property
    def where(self) -> AsyncWhere[V]:
        """As ``Query.where``."""
        return AsyncWhere(self)

    async def delete(self) -> int:  # type: ignore[override]
        """Delete them, in one transaction; how many there were."""
        assert self._delete is not None, "a collection of a database can be written to"
        return await cast("Awaitable[int]", self._delete(self))

    async def alive(self) -> AsyncIterator[Found[V]]:
        """As ``live``, for ``async for rows in query.alive()``: the query is run on a thread of its
        own, so that a long one does not stop the loop. Ends when the task is cancelled, and with
        ``DatabaseClosedError`` when the database is closed."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        observe = self._source._observe
        assert observe is not None, "made by a collection of a database"
        wake = partial(call_on, loop, news.set)
        listening = LiveQuery(self, self._source.name, observe, wake)
        try:
            while True:
                news.clear()
                found = await in_thread(listening.look, "entidb-aio-live")
                if found is not None:
                    yield found
                await news.wait()
        finally:
            listening.end()


class AsyncCollection(ReadCollection[V], Generic[V]):
    """A collection of an ``AsyncDatabase``: every read is a snapshot of its own, every write is
    awaited, and its own durable commit."""

    def __init__(self, name: str, codec: ValueCodec[V], database: AsyncDatabase) -> None:
        super().__init__(name, codec, database._core._open_rows)
        self._database = database
        self._observe = partial(add_observer, database._core, "live")

    async def add(self, value: V) -> uuid.UUID:
        """Store ``value`` under a new UUIDv7 and return it."""
        payload = self._codec.encode(value)
        made = self._database._core._ids.new_bytes()
        await self._database._commit(lambda staging: staging._stage(self.name, made, payload))
        return uuid_from_bytes(made)

    async def put(self, entity_id: uuid.UUID, value: V) -> None:
        """Store ``value`` under ``entity_id``: what ``notes[id] = value`` is elsewhere."""
        raw = id_bytes(entity_id)
        payload, keep = self._codec.encode(value), self._codec.keep

        def work(staging: Staging) -> None:
            stored = None if keep is None else staging._stored(self.name, raw)
            made = payload
            if keep is not None and stored is not None:
                made = kept(keep, self.name, raw, payload, stored)
            staging._stage(self.name, raw, made)

        await self._database._commit(work)

    async def patch(
        self, entity_id: uuid.UUID, changes: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> None:
        """As ``Collection.patch``."""
        await self._do(lambda one: one.patch(entity_id, changes, **fields))

    async def delete(self, entity_id: uuid.UUID) -> None:
        """Delete an entity. Raises ``KeyError`` if there is none."""
        await self._do(lambda one: one.__delitem__(entity_id))

    async def discard(self, entity_id: uuid.UUID) -> bool:
        """Delete if there; returns whether it was."""
        return await self._do(lambda one: one.discard(entity_id))

    async def get_or_add(self, entity_id: uuid.UUID, value: V) -> V:
        """As ``Collection.get_or_add``."""
        return await self._do(lambda one: one.get_or_add(entity_id, value))

    async def upsert(
        self, entity_id: uuid.UUID, changes: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> bool:
        """As ``Collection.upsert``."""
        return await self._do(lambda one: one.upsert(entity_id, changes, **fields))

    async def put_many(self, values: Mapping[uuid.UUID, V] | Iterable[tuple[uuid.UUID, V]]) -> None:
        """Store all of ``values`` in one transaction."""
        pairs = values if isinstance(values, Mapping) else list(pairs_of("put_many", values))
        await self._do(lambda one: one.put_many(pairs))

    async def pop(self, entity_id: uuid.UUID, *default: Any) -> Any:
        """As ``dict.pop``, in one transaction."""
        return await self._do(lambda one: one.pop(entity_id, *default))

    async def clear(self) -> None:
        """Delete every entity of the collection in one transaction."""
        await self._do(lambda one: one.clear())

    @property
    def where(self) -> AsyncWhere[V]:
        """As ``Collection.where``; ``delete`` of what it finds is awaited."""
        return AsyncWhere(self._query())

    def order_by(self, *fields: str | Field) -> AsyncQuery[V]:
        """As ``Collection.order_by``."""
        return self._query().order_by(*fields)

    def _query(self) -> AsyncQuery[V]:
        return AsyncQuery(self, delete=cast("Any", self._delete_found))

    async def _delete_found(self, query: Query[V]) -> int:
        return await self._do(lambda one: one._delete_found(query))

    async def _do(self, action: Callable[[TransactionCollection[V]], T]) -> T:
        def work(staging: Staging) -> T:
            return action(staging.with_codec(self.name, self._codec))

        return (await self._database._commit(work)).result()


__all__ = ["AsyncChanges", "AsyncCollection", "AsyncDatabase", "AsyncQuery", "AsyncTransaction"]
