"""The files of segments on their way to a device: begun, whole, and used up (R35).

They lie beside the database, so that a segment that was begun goes on where it ended, also in
another process. A database in memory has them in memory. Nothing in them is believed: who uses a
segment checks its hash first. Raises ``OSError``, as all that it does.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from msgspec import Struct

from entidb.db.replica import ImageSegment
from entidb.storage.directories import FETCHED, give_owner, make_folder
from entidb.types import SEQUENCE_MAX


class SegmentFiles:
    """Those in the directory of the database at ``path``; None: in memory. Thread-safe."""

    def __init__(self, path: str | None) -> None:
        where = path is not None and os.path.isdir(path)
        self._folder: Final = os.path.join(path, FETCHED) if path is not None and where else None
        self._memory: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        #: Bytes that came since this was made.
        self.received = 0

    def size(self, segment: ImageSegment) -> int:
        """How many bytes of it are there."""
        if self._folder is None:
            return len(self._memory.get(segment.sha256, b""))
        try:
            return os.stat(self._path(segment)).st_size
        except FileNotFoundError:
            return 0

    def append(self, segment: ImageSegment, offset: int, data: bytes) -> None:
        """Put ``data`` behind the first ``offset`` bytes; nothing if it does not end there, which
        is so when somebody else has gone on."""
        with self._lock:
            if self.size(segment) != offset:
                return
            self.received += len(data)
            if self._folder is None:
                self._memory[segment.sha256] = self._memory.get(segment.sha256, b"") + data
                return
            above = os.path.dirname(self._folder)
            with suppress(FileExistsError):
                make_folder(self._folder, above)
            with open(self._path(segment), "ab") as file:
                if not offset:  # root may sync a service's database once
                    give_owner(file.fileno(), os.stat(above))
                file.write(data)

    def read(self, segment: ImageSegment) -> bytes:
        """What is there of it, and no more than it may have."""
        if self._folder is None:
            return self._memory.get(segment.sha256, b"")
        with open(self._path(segment), "rb") as file:
            return file.read(segment.size + 1)

    def parts(self) -> dict[bytes, bytes]:
        """What is in memory, by the hash that it should have in the end."""
        return dict(self._memory)

    def replace(self, sha256: bytes, data: bytes) -> None:
        """In memory, for tests: something else lies there."""
        self._memory[sha256] = data

    def drop(self, segment: ImageSegment) -> None:
        """Forget what is there of it."""
        self._memory.pop(segment.sha256, None)
        if self._folder is not None:
            _unlink(self._path(segment))

    def keep_only(self, segments: list[ImageSegment]) -> None:
        """Forget all others."""
        names = {segment.sha256.hex() for segment in segments}
        self._memory = {sha: part for sha, part in self._memory.items() if sha.hex() in names}
        if self._folder is None or not os.path.isdir(self._folder):
            return
        if not names:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        for name in os.listdir(self._folder):
            if name not in names:
                _unlink(os.path.join(self._folder, name))

    def _path(self, segment: ImageSegment) -> str:
        assert self._folder is not None
        return os.path.join(self._folder, segment.sha256.hex())


class Fetch(Struct, frozen=True):
    """Have the first of ``segments`` in ``files``, whole; the others come next, and may be begun,
    also where the first is there already. No request asks for more than ``bytes_max``: what is on
    its way when this process is killed comes again.
    Answered with None when it is there.

    ``opens``, if there is one, may be called with the second on any thread once that is whole, to
    prove it while the first is stored; whether or not it is, all goes on the same."""

    db_id: str
    segments: list[ImageSegment]
    files: SegmentFiles
    bytes_max: int = SEQUENCE_MAX
    opens: Callable[[ImageSegment], None] | None = None


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


__all__ = ["Fetch", "SegmentFiles"]
