"""The way between one device and the server of a simulated run, which refuses pushes as a whole
(R5): a proxy with a limit for bodies, a firewall, and a token that may only read for a while.

It comes and goes while things go wrong. When the faults stop, the proxy and the firewall let
everything through, but a token that may only read stays so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from entidb.errors import PermissionDeniedError, ProtocolError, SyncError
from entidb.testing.knobs import Knobs
from entidb.testing.workload import FILTERED

#: Bytes of a body that the proxy may let through.
BODIES: Final = (200, 400, 700, 1500, 4000)
_PUSH: Final = "/v1/push"


class Gateway:
    """The way of one device; ``fired`` is called for every refusal."""

    def __init__(self, rng: random.Random, knobs: Knobs, fired: Callable[[str], None]) -> None:
        self.read_only = False
        self._rng = rng
        self._knobs = knobs
        self._fired = fired
        self._body_max: int | None = None
        self._filters = False

    def change(self) -> bool:
        """Let time pass; whether the device needs another token."""
        rng, knobs, was = self._rng, self._knobs, self.read_only
        if rng.random() * 1000 < knobs.body_limit:
            self._body_max = rng.choice((None, *BODIES))
        if knobs.firewall and rng.random() < 0.3:
            self._filters = not self._filters
        if rng.random() * 1000 < knobs.read_only:
            self._fired("read_only")
            self.read_only = not self.read_only
        return was is not self.read_only

    def open(self) -> None:
        self._body_max, self._filters = None, False

    def refusal(self, path: str, body: bytes) -> SyncError | None:
        """What the device gets instead of an answer of the server."""
        error: SyncError | None = None
        if path == _PUSH and self._body_max is not None and len(body) > self._body_max:
            self._fired("body_limit")
            error = ProtocolError("the proxy lets no such body through", code="too_large")
        elif path == _PUSH and self._filters and FILTERED.encode() in body:
            self._fired("firewall")
            error = PermissionDeniedError("the firewall dislikes it")
        if error is not None:
            error.refused_by = "path"
        return error


__all__ = ["Gateway"]
