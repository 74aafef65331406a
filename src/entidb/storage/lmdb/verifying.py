"""What is wrong with a store that is open: its pages first, then its records.

Not here: a closed one (``doubt``), the walks themselves (``pages``, ``snapshot``), and who may
commit meanwhile (``store``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from entidb.errors import StorageError
from entidb.storage.lmdb.failures import foreign_errors
from entidb.storage.lmdb.gate import Gate
from entidb.storage.lmdb.headers import Header
from entidb.storage.lmdb.pages import page_faults, read_header
from entidb.storage.lmdb.snapshot import LmdbSnapshot, record_faults

#: Snapshots whose header was written over by another process before it could be read.
_HEADER_LOOKS: Final = 100


def snapshot_with_header(
    begin: Callable[[], LmdbSnapshot], data: str, path: str, shared: bool
) -> tuple[LmdbSnapshot, Header | None]:
    """A snapshot and what the file ``data`` says of it; where the store is ``shared``, another
    process may be writing over that."""
    for _ in range(_HEADER_LOOKS):
        snapshot = begin()
        number = snapshot.transaction_number()
        with foreign_errors(f"verifying {path}"):
            header = read_header(data, number)
            if header is not None and read_header(data, number) == header:
                return snapshot, header
        if not shared:
            break
        snapshot.close()
    return begin(), None


def faults_of(
    snapshot: LmdbSnapshot, header: Header | None, data: str, gate: Gate
) -> Iterator[str]:
    """A line for each fault of what ``snapshot`` sees. From the first one of a page the store is
    in doubt."""
    if header is None:
        yield "the header of the newest commit cannot be found"
        return
    damaged = False
    for fault in page_faults(data, header):
        damaged = gate.doubtful = True
        yield fault
    if damaged:
        return
    try:
        yield from record_faults(snapshot)
    except StorageError as error:
        gate.doubtful = True
        yield f"the walk ended early: {error}"
