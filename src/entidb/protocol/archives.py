"""A manifest and its segments in one file: a tar (POSIX.1-1988, ustar), not compressed, so that any
``tar`` lists and unpacks it.

    manifest.cbor           the ``Manifest``, first
    segments/<sha256>       each segment, in the order of the manifest

Nothing is unpacked onto a disk here, and no name in the file becomes one.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from typing import IO, Final

from entidb.errors import SyncCodecError
from entidb.protocol.decoding import decode
from entidb.protocol.encoding import encode
from entidb.protocol.limits import LIMITS
from entidb.protocol.messages import Manifest, SegmentInfo
from entidb.protocol.segments import HEADER_BYTES_MAX

MANIFEST_NAME: Final = "manifest.cbor"
_FOLDER: Final = "segments/"
#: Bytes of a segment at most: one entity alone may be as large as a message.
_SEGMENT_MAX: Final = LIMITS.message_bytes_max + HEADER_BYTES_MAX
#: What ``tarfile`` raises for files that are none; it reads a header about a header by recursion.
_NO_TAR: Final = (tarfile.TarError, ValueError, OverflowError, RecursionError)


def write_archive(
    file: IO[bytes], manifest: Manifest, read: Callable[[SegmentInfo], bytes]
) -> None:
    """Write to ``file``; ``read`` gives each segment, one at a time. The same image makes the same
    file again. Raises ``OSError``."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, MANIFEST_NAME, encode(manifest))
        for segment in manifest.segments:
            _add(tar, _FOLDER + segment.sha256.hex(), read(segment))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    tar.addfile(about, io.BytesIO(data))


class Archive:
    """An archive that is read from ``file``, which can seek and stays the caller's to close.
    Raises ``SyncCodecError`` for what is none, ``OSError``."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            self._tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
            first = self._tar.next()
        except _NO_TAR as error:
            raise SyncCodecError(f"this is no snapshot: {error}") from error
        if first is None or first.name != MANIFEST_NAME:
            raise SyncCodecError(f"this is no snapshot: {MANIFEST_NAME} is not its first file")
        if first.size > LIMITS.message_bytes_max:
            raise SyncCodecError("the manifest of this snapshot is larger than any message")
        self.manifest: Final = decode(Manifest, self._bytes_of(first))
        self._at: dict[str, tarfile.TarInfo] = {}

    def segment(self, segment: SegmentInfo) -> bytes:
        """A segment of the manifest, whose SHA-256 was proved."""
        wanted = _FOLDER + segment.sha256.hex()
        found = self._at.get(wanted) or self._find(wanted)
        if found is None or found.size != segment.bytes or found.size > _SEGMENT_MAX:
            raise SyncCodecError(f"segment {segment.sha256.hex()} is missing in this snapshot")
        data = self._bytes_of(found)
        if hashlib.sha256(data).digest() != segment.sha256:
            raise SyncCodecError(f"segment {segment.sha256.hex()} of this snapshot is damaged")
        return data

    def _find(self, name: str) -> tarfile.TarInfo | None:
        """Read on to ``name``, and remember what was passed."""
        try:
            # No more than there may be, however many somebody has put into the file.
            while len(self._at) < len(self.manifest.segments):
                found = self._tar.next()
                if found is None:
                    return None
                self._at[found.name] = found
                if found.name == name:
                    return found
        except _NO_TAR as error:
            raise SyncCodecError(f"this snapshot is damaged: {error}") from error
        return None

    def _bytes_of(self, about: tarfile.TarInfo) -> bytes:
        try:
            opened = self._tar.extractfile(about) if about.isreg() else None
            data = b"" if opened is None else opened.read()
        except _NO_TAR as error:
            raise SyncCodecError(f"this snapshot is damaged: {error}") from error
        if opened is None or len(data) != about.size:
            raise SyncCodecError(f"this snapshot is cut off in {about.name!r:.100}")
        return data


__all__ = ["MANIFEST_NAME", "Archive", "write_archive"]
