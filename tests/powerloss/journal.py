"""What a disk may hold after the power went: read from the log that ``record_io.c`` wrote.

The model is the least that POSIX and disks promise. What was synced is there. Of what was written
since, any part may be, sector by sector and in any order; so the write under way, too. A new name
or a rename is there for certain only after its directory was synced; until then each is or is not.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SECTOR_BYTES: Final = 512
_RECORD: Final = struct.Struct("=IIQQII")
WRITE, SYNC, TRUNCATE, RENAME, SYNC_DIRECTORY = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Event:
    """``path`` is where the file was called when it happened, below the root; ``data`` of a
    rename is the new name."""

    kind: int
    durable: bool
    file_number: int
    offset: int
    path: str
    data: bytes


def read_events(log: Path, root: Path) -> list[Event]:
    raw, at, events = log.read_bytes(), 0, []
    while at < len(raw):
        kind, durable, number, offset, path_bytes, data_bytes = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        path = raw[at : at + path_bytes].decode()
        at += path_bytes
        data = raw[at : at + data_bytes]
        at += data_bytes
        if kind == RENAME:
            data = os.path.relpath(data.decode(), root).encode()
        path = os.path.relpath(path, root)
        events.append(Event(kind, bool(durable), number, offset, path, data))
    return events


class _File:
    """Contents that are on disk, and writes that may be."""

    def __init__(self) -> None:
        self.synced = bytearray()
        self.waiting: list[Event] = []

    def image(self, source: random.Random) -> bytes:
        content = bytearray(self.synced)
        share = source.choice((0.0, 0.5, 0.9, 1.0))
        for event in self.waiting:
            _apply_some(content, event, source, share)
        return bytes(content)

    def sync(self) -> None:
        for event in self.waiting:
            _apply(self.synced, event)
        self.waiting.clear()


class Disk:
    """The state after each event; ``crash`` is one of the many it may be found in."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        #: Names as the program sees them, and as they are certain to be found.
        self._names: dict[str, int] = {}
        self._synced_names: dict[str, int] = {}
        #: Changes of names that may be lost: (directory, name, number or None if it went).
        self._waiting: list[tuple[str, str, int | None]] = []

    def happen(self, event: Event) -> None:
        if event.kind == RENAME:
            self._rename(event.path, event.data.decode())
        elif event.kind == SYNC_DIRECTORY:
            self._sync_directory(event.path)
        else:
            self._change_file(event)

    def _change_file(self, event: Event) -> None:
        file = self._files.setdefault(event.file_number, _File())
        if self._names.get(event.path) != event.file_number:
            self._name(event.path, event.file_number)
        if event.kind == SYNC:
            file.sync()
        elif event.durable:
            # This write is on disk when it returns, whatever else is waiting.
            _apply(file.synced, event)
            file.waiting = [*file.waiting, event] if file.waiting else []
        else:
            file.waiting.append(event)

    def _name(self, path: str, number: int | None) -> None:
        if number is None:
            self._names.pop(path, None)
        else:
            self._names[path] = number
        self._waiting.append((os.path.dirname(path) or ".", path, number))

    def _rename(self, old: str, new: str) -> None:
        for path, number in list(self._names.items()):
            if path == old or path.startswith(old + os.sep):
                # What is inside a directory is where the directory is: only its own name waits.
                moved = new + path[len(old) :]
                self._name(path, None)
                self._names[moved] = number
                self._waiting.append((os.path.dirname(new) or ".", moved, number))

    def _sync_directory(self, path: str) -> None:
        for directory, name, number in self._waiting:
            if directory == path:
                _rename_in(self._synced_names, name, number)
        self._waiting = [change for change in self._waiting if change[0] != path]

    def crash(self, under_way: Event | None, source: random.Random) -> dict[str, bytes]:
        """Files by path, as they may be found when the power goes during ``under_way``."""
        names = dict(self._synced_names)
        for _, name, number in self._waiting:
            if source.random() < 0.5:
                _rename_in(names, name, number)
        found = {name: self._files[number].image(source) for name, number in names.items()}
        if under_way is not None and under_way.kind == WRITE and under_way.path in found:
            content = bytearray(found[under_way.path])
            _apply_some(content, under_way, source, 0.5)
            found[under_way.path] = bytes(content)
        return found


def _rename_in(names: dict[str, int], name: str, number: int | None) -> None:
    if number is None:
        names.pop(name, None)
    else:
        names[name] = number


def _apply(content: bytearray, event: Event) -> None:
    if event.kind == TRUNCATE:
        _resize(content, event.offset)
        return
    end = event.offset + len(event.data)
    if len(content) < end:
        _resize(content, end)
    content[event.offset : end] = event.data


def _apply_some(content: bytearray, event: Event, source: random.Random, share: float) -> None:
    """Each sector of a write reaches the disk or does not."""
    if event.kind == TRUNCATE:
        if source.random() < share:
            _apply(content, event)
        return
    for start, data in _sectors(event):
        if source.random() < share:
            _apply(content, Event(WRITE, False, event.file_number, start, event.path, data))


def _sectors(event: Event) -> Iterator[tuple[int, bytes]]:
    at, end = event.offset, event.offset + len(event.data)
    while at < end:
        stop = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
        yield at, event.data[at - event.offset : stop - event.offset]
        at = stop


def _resize(content: bytearray, length: int) -> None:
    if length < len(content):
        del content[length:]
    else:
        content.extend(bytes(length - len(content)))
