"""TinyDB with the same entities, for those who compare: documents in memory, written to one JSON
file when that is asked for.

It is no dependency of anything else: where it is not installed, there are no figures of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entidb import cbor

NAME = "TinyDB"


class TinyTable:
    """The entities as documents, with their ids as text in them."""

    def __init__(self, path: Path, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        tinydb: Any = importlib.import_module("tinydb")
        middlewares: Any = importlib.import_module("tinydb.middlewares")
        storages: Any = importlib.import_module("tinydb.storages")
        # Without its cache each question would read the whole file.
        cached = middlewares.CachingMiddleware(storages.JSONStorage)
        self._database = tinydb.TinyDB(path, storage=cached)
        self._query: Any = tinydb.Query()
        self._database.insert_multiple(
            {"id": key.hex(), **cbor.decode(payload)} for key, payload in pairs
        )

    def equal(self, name: str, value: Any) -> list[Any]:
        self._database.clear_cache()
        found: list[Any] = self._database.search(self._query[name] == value)
        return found

    def between(self, name: str, low: Any, high: Any) -> list[Any]:
        self._database.clear_cache()
        field = self._query[name]
        found: list[Any] = self._database.search((field >= low) & (field <= high))
        return found

    def close(self) -> None:
        self._database.close()


def tiny_table(path: Path, pairs: Sequence[tuple[bytes, bytes]]) -> TinyTable | None:
    """None where TinyDB is not installed, which is said once."""
    try:
        return TinyTable(path, pairs)
    except ImportError:
        print(f"queries: {NAME} is not installed, so there are no figures of it", file=sys.stderr)
        return None
