"""The lines on which devices of a simulated run are told news: their two ends, and what lies
between them as far as a device knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from entidb.errors import SyncError
from entidb.protocol import PullRequest
from entidb.sync.live import Event


class LineEnd(Protocol):
    """The device that a line leads to."""

    name: str
    db_id: str

    @property
    def device_id(self) -> bytes: ...

    def began(self, line: NewsLine) -> None:
        """The answer begins."""
        ...

    def came(self, line: NewsLine, event: Event | int | None) -> None:
        """An event, the answer to a question, or a sign of life (None)."""
        ...

    def failed(self, line: NewsLine, error: SyncError | EOFError) -> None:
        """The line has ended."""
        ...


class NewsLine:
    """One request for news, and what comes of it. ``cursor`` None: everything is new."""

    def __init__(
        self,
        caller: LineEnd,
        *,
        stream: bool,
        cursor: int | None,
        latency: int,
        asks: PullRequest | None = None,
    ) -> None:
        self.caller = caller
        self.stream = stream
        self.cursor = cursor
        self.latency = latency
        #: What its pages answer, if it is to bring some.
        self.asks = asks
        #: What is said at one end reaches the other.
        self.whole = True
        #: Both ends know that it has ended.
        self.over = False
        #: Something on the way gathers the answer.
        self.held = False
        #: The server's: which node answers, what the token grants, and what is awaited.
        self.node: Any = None
        self.grants: Any = None
        self.gone: Any = None
        #: The newest commit that was to be told, and was not yet.
        self.owed = 0
        #: When the newest of what is under way arrives.
        self.arrives_at = 0


class NewsWay(Protocol):
    """From devices to the nodes of a server."""

    on_begin: Callable[[str], None] | None

    def call(self, line: NewsLine, token: str) -> None:
        """A device asks; the outcome is told to its end of the line."""
        ...

    def hang_up(self, line: NewsLine) -> None:
        """The device's end is closed."""
        ...

    def is_whole(self, line: NewsLine) -> bool:
        """Whether the next commit is told on this line."""
        ...

    def cut_all(self) -> None: ...

    def close(self) -> None:
        """Send all away."""
        ...


__all__ = ["LineEnd", "NewsLine", "NewsWay"]
