"""Who uses which node: all stores of one process at one address share one, which is made with the
first of them and closed with the last.
"""

from __future__ import annotations

import os
import threading
import time

from entidb.errors import StorageUnreachableError
from entidb.storage.postgres.line import Line
from entidb.storage.postgres.node import Node
from entidb.storage.postgres.schema import Tables

#: Which node: the address, its connections, the process.
_Key = tuple[str, int, int]


class Lease:
    """The use of a node by one store, and what that has of it: the connection of its turn, and its
    rights. ``close`` gives everything back; idempotent."""

    def __init__(self, node: Node, key: _Key) -> None:
        self.node = node
        self.turn: Line | None = None
        self.rights: dict[tuple[int, int], object] = {}
        self._key = key
        self._closed = False

    def close(self) -> None:
        with _NODES_LOCK:
            if self._closed or os.getpid() != self._key[2]:
                return
            self._closed = True
            node, count = _NODES.pop(self._key)
            if count > 1:
                _NODES[self._key] = node, count - 1
        connection, self.turn = self.turn, None
        if connection is not None:
            connection.close()  # and with it the turn
            node.take_back(node.committing, connection)
        for key, owner in list(self.rights.items()):
            node.rights.give_back(key, owner)
        if count == 1:
            node.close()

    def close_later(self) -> None:
        """For the collector, which may run anywhere, also inside the pool."""
        if not self._closed:
            threading.Thread(target=self.close, name="entidb-close").start()


#: Nodes of this process, and how many stores use each. Held again by the collector.
_NODES: dict[_Key, tuple[Node, int]] = {}
_NODES_LOCK = threading.RLock()


class _Opening:
    """Who wants the same node waits for the one that connects, and nobody else does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        #: When it could not be reached the last time, and what that said.
        self.failed: tuple[float, str] | None = None


_OPENING: dict[_Key, _Opening] = {}


def lease(address: str, connections_max: int, use: Tables = Tables.MAKE) -> Lease:
    """Of the node of this process at ``address``. Raises as ``Node``."""
    key = (address, connections_max, os.getpid())
    began = time.monotonic()
    with _NODES_LOCK:
        opening = _OPENING.setdefault(key, _Opening())
    with opening.lock:
        with _NODES_LOCK:
            node, count = _NODES.get(key, (None, 0))
            if node is not None:
                _NODES[key] = node, count + 1
        if node is None:
            failed = opening.failed
            if failed is not None and failed[0] > began:
                # It was tried while this thread waited, for as long as that takes.
                raise StorageUnreachableError(failed[1])
            try:
                node = Node(address, connections_max, use)
            except StorageUnreachableError as error:
                opening.failed = time.monotonic(), str(error)
                raise
            with _NODES_LOCK:
                _NODES[key] = node, 1
        made = Lease(node, key)
        try:
            node.see_to(use)
        except BaseException:
            made.close()
            raise
        return made


__all__ = ["Lease", "lease"]
