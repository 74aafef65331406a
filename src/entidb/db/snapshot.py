"""One unchanging view of a database, for programs."""

from __future__ import annotations

from typing import Any, TypeVar, overload

from entidb.db.codec import codec_for
from entidb.db.collection import ReadCollection
from entidb.db.notebook import Explored
from entidb.db.reading import OnInvalid, Upgrade
from entidb.db.records import (
    META_HEAD,
    decode_head,
)
from entidb.db.rows import LentRows, Rows, SnapshotRows
from entidb.types import (
    Uncopied,
    check_name,
)

V = TypeVar("V")


class Snapshot(Uncopied, Explored):
    """One unchanging view of the whole database. Close it, or use it as a context manager."""

    def __init__(self, rows: SnapshotRows) -> None:
        self._rows = rows
        raw = rows.snapshot.get(META_HEAD)
        #: The newest commit this snapshot contains.
        self.sequence = 0 if raw is None else decode_head(raw).sequence

    @overload
    def collection(
        self, name: str, *, on_invalid: OnInvalid = "raise", upgrade: Upgrade | None = None
    ) -> ReadCollection[Any]: ...

    @overload
    def collection(
        self,
        name: str,
        type: type[V],
        *,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> ReadCollection[V]: ...

    def collection(
        self,
        name: str,
        type: type[Any] | None = None,
        *,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> ReadCollection[Any]:
        """The collection ``name`` as it was; all else as in ``Database.collection``. Raises
        ``InvalidNameError``, ``ValueTypeError``, ``ConfigError``."""
        check_name(name)
        codec = codec_for(type, on_invalid=on_invalid, upgrade=upgrade)
        return ReadCollection(name, codec, self._open)

    @overload
    def __getitem__(self, name: str) -> ReadCollection[Any]: ...

    @overload
    def __getitem__(self, name: ReadCollection[V]) -> ReadCollection[V]: ...

    def __getitem__(self, name: str | ReadCollection[Any]) -> ReadCollection[Any]:
        """``snapshot["notes"]``; or ``snapshot[notes]``, the collection of a database with its
        type."""
        if isinstance(name, ReadCollection):
            return ReadCollection(name.name, name._codec, self._open)
        return self.collection(name)

    def collections(self) -> list[str]:
        """Names of the collections that existed, in order."""
        return sorted(self._rows.catalogue.by_name)

    def close(self) -> None:
        """Idempotent."""
        self._rows.snapshot.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> LentRows[Rows]:
        return LentRows(self._rows)
