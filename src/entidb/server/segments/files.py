"""Where the files of images are: a folder for each database, or memory.

    <id>.image          which segments an image has; made when all of them are there
    <sha256>.segment    a segment, of one image or of several
    *.part              one that is being made; rubbish if nobody makes one

Files appear whole and are never changed, and who may read the directory above may read them: a
proxy, say. Nothing here decides which of them count (``keeping``).
Where the nodes of a server may have different directories, ``entidb-segments.id`` beside these
folders says which one it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Final, Protocol

from msgspec import Struct, ValidationError, convert, to_builtins

from entidb import cbor
from entidb.errors import CborDecodeError
from entidb.protocol import SegmentInfo
from entidb.server.config import directory_name
from entidb.storage.directories import make_directory, share_as, sync_path

_IMAGE: Final = ".image"
_SEGMENT: Final = ".segment"
_PART: Final = ".part"
_ID: Final = "entidb-segments.id"
#: Whether the system can be asked for what it has in memory.
_READS_NOW: Final = hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")
#: Images whose lists are kept in memory, for each database.
_KNOWN_MAX: Final = 4


class KeptImage(Struct, frozen=True, kw_only=True):
    """An image of ``history`` as of ``head``: its segments, those of a collection in the order of
    their ids, with an index into ``collections``. All of ``collections`` were looked at."""

    id: bytes
    history: bytes
    head: int
    collections: list[str]
    segments: list[SegmentInfo]

    @property
    def entities(self) -> int:
        return sum([segment.rows for segment in self.segments])

    @property
    def packing(self) -> str:
        """What its segments are packed with."""
        return self.segments[0].packing if self.segments else ""

    def segment(self, sha256: bytes) -> SegmentInfo | None:
        return next((each for each in self.segments if each.sha256 == sha256), None)


class SegmentFile(Protocol):
    """An open segment; close it. ``read`` may wait for a disk."""

    @property
    def size(self) -> int: ...

    def read(self, at: int, count: int) -> bytes: ...

    def read_now(self, at: int, count: int) -> bytes | bytearray | None:
        """As ``read``, without waiting; None if that cannot be."""
        ...

    def close(self) -> None: ...


class KeptFiles(Protocol):
    """The files of one database. Thread-safe; raises ``OSError``."""

    def image(self, identity: bytes) -> KeptImage | None:
        """The image of that id; None if it is not there, or cannot be read."""
        ...

    def listed(self) -> list[tuple[KeptImage, int]]:
        """All images that are there, and when each was made, in milliseconds since 1970; 0: only
        its database says."""
        ...

    def has(self, segment: SegmentInfo) -> bool: ...

    def open(self, sha256: bytes) -> SegmentFile | None: ...

    def put(self, sha256: bytes, data: bytes) -> None:
        """Keep a segment, durably; one that is there stays as it is."""
        ...

    def publish(self, image: KeptImage) -> None: ...

    def sweep(self, images: Collection[bytes]) -> None:
        """Remove everything that belongs to none of the images with these ids."""
        ...

    def free_bytes(self) -> int | None:
        """How much room there is; None: nobody knows."""
        ...


# ---------------------------------------------------------------- in memory


class MemoryFile:
    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, at: int, count: int) -> bytes:
        return self._data[at : at + count]

    read_now = read

    def close(self) -> None:
        """There is nothing to close."""


class MemoryFiles:
    def __init__(self) -> None:
        self._images: dict[bytes, KeptImage] = {}
        self._segments: dict[bytes, bytes] = {}

    def image(self, identity: bytes) -> KeptImage | None:
        return self._images.get(identity)

    def listed(self) -> list[tuple[KeptImage, int]]:
        return [(image, 0) for image in list(self._images.values())]

    def has(self, segment: SegmentInfo) -> bool:
        return segment.sha256 in self._segments

    def open(self, sha256: bytes) -> MemoryFile | None:
        data = self._segments.get(sha256)
        return None if data is None else MemoryFile(data)

    def put(self, sha256: bytes, data: bytes) -> None:
        self._segments[sha256] = data

    def publish(self, image: KeptImage) -> None:
        self._images[image.id] = image

    def sweep(self, images: Collection[bytes]) -> None:
        self._images = {key: image for key, image in self._images.items() if key in images}
        kept = {each.sha256 for image in self._images.values() for each in image.segments}
        self._segments = {key: data for key, data in self._segments.items() if key in kept}

    def free_bytes(self) -> None:
        return None


# ---------------------------------------------------------------- on a disk


class DiskFile:
    """Closed at the latest with its last reference."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, at: int, count: int) -> bytes:
        with self._lock:
            self._file.seek(at)
            return self._file.read(count) or b""

    def read_now(self, at: int, count: int) -> bytearray | None:
        if not _READS_NOW:
            return None
        data = bytearray(count)
        try:
            came = os.preadv(self._file.fileno(), [data], at, os.RWF_NOWAIT)
        except OSError:  # not in the system's memory, or a file system that cannot say so
            return None
        return data if came == count else None

    def close(self) -> None:
        self._file.close()


class FolderFiles:
    """Made when the first file is."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._known: dict[bytes, KeptImage] = {}

    def image(self, identity: bytes) -> KeptImage | None:
        # It never changes once it is there.
        known = self._known.get(identity)
        path = self._folder / (identity.hex() + _IMAGE)
        if known is not None and path.exists():
            return known
        found = _read_image(path)
        if found is None or found.id != identity:
            return None
        if len(self._known) >= _KNOWN_MAX:
            self._known.clear()
        self._known[identity] = found
        return found

    def listed(self) -> list[tuple[KeptImage, int]]:
        found: list[tuple[KeptImage, int]] = []
        for path in sorted(self._folder.glob(f"*{_IMAGE}")):
            # One may go while somebody looks.
            with contextlib.suppress(FileNotFoundError, ValueError):
                image = self.image(bytes.fromhex(path.stem))
                if image is not None:
                    found.append((image, path.stat().st_mtime_ns // 1_000_000))
        return found

    def has(self, segment: SegmentInfo) -> bool:
        try:
            return self._at(segment.sha256).stat().st_size == segment.bytes
        except FileNotFoundError:
            return False

    def open(self, sha256: bytes) -> DiskFile | None:
        try:
            return DiskFile(self._at(sha256))
        except FileNotFoundError:
            return None

    def put(self, sha256: bytes, data: bytes) -> None:
        path = self._at(sha256)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == len(data):
                return
        self._write(path, data)

    def publish(self, image: KeptImage) -> None:
        data = cbor.encode_message(to_builtins(image, builtin_types=(bytes,)))
        self._write(self._folder / (image.id.hex() + _IMAGE), data)
        sync_path(str(self._folder))

    def _write(self, path: Path, data: bytes) -> None:
        if not self._folder.is_dir():
            make_directory(str(self._folder.absolute()))
            share_as(self._folder, self._folder.parent)
        part = path.with_name(f"{path.name}{_PART}")
        with open(part, "wb") as file:
            file.write(data)
            share_as(file.fileno(), self._folder)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def sweep(self, images: Collection[bytes]) -> None:
        if not self._folder.is_dir():
            return
        kept: set[str] = set()
        for identity in images:
            image = self.image(identity)
            if image is not None:
                kept.add(identity.hex() + _IMAGE)
                kept.update(each.sha256.hex() + _SEGMENT for each in image.segments)
        for entry in list(os.scandir(self._folder)):
            if entry.name not in kept and entry.name.endswith((_IMAGE, _SEGMENT, _PART)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
        if not kept:
            # What else stands there is nobody's business here.
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def free_bytes(self) -> int | None:
        there = next(each for each in (self._folder, *self._folder.parents) if each.exists())
        return shutil.disk_usage(there).free

    def _at(self, sha256: bytes) -> Path:
        return self._folder / (sha256.hex() + _SEGMENT)


def segment_name(db_id: str, sha256: bytes) -> str:
    """Where a segment is, below the folders of all databases."""
    return f"{directory_name(db_id)}/{sha256.hex()}{_SEGMENT}"


def directory_id(root: Path, made: bytes) -> bytes:
    """What names the directory ``root``, for all who use it: ``made`` if they are the first. Raises
    ``OSError``."""
    path = root / _ID
    if not path.exists():
        make_directory(str(root.absolute()))
        part = path.with_name(f"{_ID}.{made.hex()}{_PART}")
        part.write_text(made.hex())
        share_as(str(part), root)
        sync_path(str(part))
        # Of several nodes that come at once one is the first.
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
        part.unlink()
        sync_path(str(root))
    text = path.read_text("ascii", "replace").strip()
    if re.fullmatch("[0-9a-f]{32}", text) is None:
        raise OSError(
            f"{path} does not say which directory this is: remove it if images are to be made here"
        )
    return bytes.fromhex(text)


def _read_image(path: Path) -> KeptImage | None:
    try:
        raw = cbor.decode(path.read_bytes())
        return convert(raw, KeptImage, builtin_types=(bytes,), strict=True)
    except (FileNotFoundError, CborDecodeError, ValidationError):
        return None


__all__ = [
    "FolderFiles",
    "KeptFiles",
    "KeptImage",
    "MemoryFiles",
    "SegmentFile",
    "directory_id",
    "segment_name",
]
