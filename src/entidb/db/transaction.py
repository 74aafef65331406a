"""A transaction as programs hold it: its writes, and how it ends.

Not here: what the writes become (``local``), and whose turn it is (``core``).
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from entidb.db.codec import codec_for
from entidb.db.collection import Collection, TransactionCollection
from entidb.db.local import Writes
from entidb.db.notebook import Explored
from entidb.db.plain import ValueCodec
from entidb.db.reading import OnInvalid, Upgrade
from entidb.db.rows import LentRows, OverlayRows, Rows
from entidb.errors import TransactionError
from entidb.storage.turns import EndOfBlock, Turn, enter_block
from entidb.types import check_name

V = TypeVar("V")


class _State(Enum):
    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


#: Looking a member up in its enum at every write would cost as much as the write.
_OPEN: Final = _State.OPEN


class Transaction(Explored):
    """Writes that become durable, and visible, together or not at all.

    Made by ``Database.transaction()``; as a context manager it commits when the block ends and
    aborts when it raises. Reads inside it see its own writes on one snapshot. It holds the
    database's writer lock, so keep it short. ``id`` names it on its whole way (R3); ``sequence``
    is the commit sequence once committed, 0 when there was nothing to write.
    """

    plumbing = frozenset(("transaction_id", "with_codec", "writes"))

    def __init__(
        self,
        transaction_id: bytes,
        rows: Rows,
        turn: Turn,
        commit: Callable[[Transaction], int],
        release: Callable[[Transaction], None],
        new_id: Callable[[], bytes],
    ) -> None:
        self.transaction_id = transaction_id
        self.writes: Writes = {}
        self.sequence = 0
        self._rows = OverlayRows(rows, self.writes)
        self._turn = turn
        self._leaving: weakref.ref[Any] | None = None
        self._commit = commit
        self._release = release
        self._new_id = new_id
        self._state = _State.OPEN

    @property
    def id(self) -> uuid.UUID:
        """What names it on its whole way (R3)."""
        return uuid.UUID(bytes=self.transaction_id)

    @overload
    def collection(
        self, name: str, *, on_invalid: OnInvalid = "raise", upgrade: Upgrade | None = None
    ) -> TransactionCollection[Any]: ...

    @overload
    def collection(
        self,
        name: str,
        type: type[V],
        *,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> TransactionCollection[V]: ...

    def collection(
        self,
        name: str,
        type: type[Any] | None = None,
        *,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> TransactionCollection[Any]:
        """The collection ``name`` inside this transaction; all else as in ``Database.collection``.
        ``tx[notes]`` takes it over from ``notes``. Raises ``InvalidNameError``,
        ``ValueTypeError``, ``ConfigError``."""
        codec = codec_for(type, exact=exact, on_invalid=on_invalid, upgrade=upgrade)
        return self.with_codec(name, codec)

    def with_codec(self, name: str, codec: ValueCodec[V]) -> TransactionCollection[V]:
        """As ``collection``, for what has a codec already."""
        self._check_open()
        check_name(name)
        return TransactionCollection(
            name, codec, self._open_rows, self._stored, self._stage, self._new_id
        )

    @overload
    def __getitem__(self, name: str) -> TransactionCollection[Any]: ...

    @overload
    def __getitem__(self, name: Collection[V]) -> TransactionCollection[V]: ...

    def __getitem__(self, name: str | Collection[Any]) -> TransactionCollection[Any]:
        """``tx["notes"]``; or ``tx[notes]``, the collection of a database with its type."""
        if isinstance(name, Collection):
            return self.with_codec(name.name, name._codec)
        return self.collection(name)

    def commit(self) -> int:
        """Make everything durable and return the commit sequence.

        Raises ``TransactionTooLargeError`` and storage errors; nothing is changed then, and the
        transaction is over."""
        self._check_open()
        try:
            self._state = _State.ABORTED
            self.sequence = self._commit(self)
            self._state = _State.COMMITTED
            self._release(self)
        except BaseException:
            # Not ``finally``: an interrupt on the way into it would skip it.
            self._release(self)
            raise
        return self.sequence

    def abort(self) -> None:
        """Forget all writes. Does nothing on a transaction that is over."""
        if self._state is not _State.OPEN:
            return
        try:
            self._state = _State.ABORTED
            self._release(self)
        except BaseException:
            self._release(self)
            raise

    def __enter__(self) -> Transaction:
        enter_block(self._turn, self._leaving)
        return self

    if TYPE_CHECKING:

        def __exit__(self, kind: object, *rest: object) -> None: ...

    else:
        __exit__ = EndOfBlock()

    def _leave(self, kind: object, *rest: object) -> None:
        if self._state is not _State.OPEN:
            return
        if kind is None:
            self.commit()
        else:
            self.abort()

    def _stage(self, name: str, entity_id: bytes, payload: bytes | None) -> None:
        if self._state is not _OPEN:
            self._check_open()
        mine = self.writes.get(name)
        if mine is None:
            mine = self.writes[name] = {}
        mine[entity_id] = payload

    def _stored(self, name: str, entity_id: bytes) -> bytes | None:
        if self._state is not _OPEN:
            self._check_open()
        return self._rows.get(name, entity_id)

    def _open_rows(self) -> LentRows[Rows]:
        if self._state is not _OPEN:
            self._check_open()
        return LentRows(self._rows)

    def _check_open(self) -> None:
        if self._state is not _State.OPEN:
            raise TransactionError(
                f"this transaction is over ({self._state.value}); begin another with "
                "`with db.transaction() as tx:`"
            )
