"""The store on disk: LMDB, with its traps closed. Nothing outside this package knows LMDB.

A store is a directory with ``data.mdb`` (the records), ``lock.mdb`` (LMDB's table of readers) and
``entidb.lock``. ``store`` is what the layers above hold; below it are reading (``snapshot``), the
file (``open_file``) and the gate that keeps the two apart (``gate``). What is looked at before a
file is opened: ``place`` (that no other process has it), ``doubt``, ``closed_file``, ``headers``
and ``pages``.
"""

from __future__ import annotations

from entidb.storage.lmdb.store import LmdbStorage

__all__ = ["LmdbStorage"]
