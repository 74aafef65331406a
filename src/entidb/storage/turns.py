"""Whose turn it is to write: a lock that an interrupt cannot leave locked.

Ctrl-C raises between any two steps of a program, also between taking a lock and noting it, and at
the first step of the ``__exit__`` that was to give it back. So a turn is an object in a line, and
the first in line has it. Taking a turn is one ``append`` and giving it back one ``remove``, each
done or not done, and the second can be repeated. What the end of a ``with`` block missed is found
by the next in line: Python drops what it would have called, and with it the turn is void.

Not here: what the turns are for.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, field

from entidb.errors import StorageError

#: Seconds between two looks at whether the first in line still has a thread that ends its turn.
_LOOK_SECONDS: Final = 0.05


class Turn(Struct, eq=False):
    """One place in a line."""

    thread: int = field(default_factory=get_ident)
    #: Refers to what will end this turn. None: the code that took it will, and is running.
    kept: weakref.ref[Any] | None = None
    #: Set when what it was taken for happens, in the thread that has it.
    committing: bool = False
    bell: threading.Lock | None = None
    #: Done by whoever ends the turn before, if that is possible: then this one is ``served``, and
    #: out of the line. It is rung at the latest when what it stood in line for is over.
    errand: Callable[[], None] | None = None
    served: bool = False

    @property
    def void(self) -> bool:
        """Whether no thread is left that would end it."""
        return self.kept is not None and self.kept() is None


class Turns:
    """The line, first come first served."""

    __slots__ = ("line",)

    def __init__(self) -> None:
        #: For others to read: who has the turn, and behind it who waits.
        self.line: list[Turn] = []

    def take(self, turn: Turn, timeout_s: float | None = None) -> bool:
        """Wait in line until it is ``turn``'s turn, without a bound when ``timeout_s`` is None;
        whether it is, or was ``served``. Call ``give_back`` whatever this raises.

        Raises ``StorageError`` when this thread itself is the one that would have to go on first:
        a signal handler that comes in the middle of a commit."""
        line = self.line
        line.append(turn)
        # It may be served by now, and then nobody need be in line any more.
        return turn in line[:1] or self._wait(turn, timeout_s)

    def give_back(self, turn: Turn) -> None:
        """Does nothing for a turn that is over."""
        line = self.line
        if turn not in line:
            return
        try:
            line.remove(turn)
        except ValueError:
            return
        if line:
            for first in line[:1]:
                if first.bell is not None:
                    ring(first.bell)

    def mine(self) -> Turn | None:
        """The turn that this thread has or waits for; a void one is ended first."""
        if not self.line:
            return None
        me = get_ident()
        for turn in self.line[:]:
            if turn.thread == me:
                if not turn.void:
                    return turn
                self.give_back(turn)
        return None

    def hold(self, timeout_s: float | None = None) -> Hold:
        """``with turns.hold():`` has the turn while its block runs; with ``timeout_s`` the block
        is told whether it has."""
        return Hold(self, timeout_s)

    @property
    def taken(self) -> bool:
        """Whether there is anyone in line, if only with a void turn. Cheap, for readers."""
        return bool(self.line)

    def first(self) -> list[Turn]:
        """The turn that is held now, or nothing."""
        return self.line[:1]

    def idle(self) -> bool:
        """Whether the turn is free."""
        return all(turn.void for turn in self.line[:1])

    def _wait(self, turn: Turn, timeout_s: float | None) -> bool:
        if (bell := turn.bell) is None:
            turn.bell = bell = threading.Lock()
            bell.acquire()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not turn.served:
            (first,) = self.line[:1] or (turn,)
            if first is turn:
                return True
            if first.void:
                self.give_back(first)
                continue
            if first.thread == turn.thread:
                raise StorageError(
                    "this thread is in the middle of a commit; do not write or close in a signal "
                    "handler, set a flag there"
                )
            left = _LOOK_SECONDS
            if deadline is not None and (left := min(left, deadline - time.monotonic())) <= 0:
                self.give_back(turn)
                return False
            bell.acquire(timeout=left)
        return True


def ring(bell: threading.Lock) -> None:
    """Wake the thread that waits for ``bell``, or the next one that will."""
    try:
        bell.release()
    except RuntimeError:
        return  # It rings already.


class EndOfBlock:
    """``__exit__`` of what has a turn: calls ``_leave``, through an object that only the ``with``
    statement keeps. However the block is left, that object is gone then."""

    def __get__(self, holder: Any, kind: Any = None) -> Callable[..., None]:
        if holder is None:
            leave: Callable[..., None] = kind._leave
            return leave
        leave = partial(kind._leave, holder)
        holder._leaving = weakref.ref(leave)
        return leave


def enter_block(turn: Turn, leaving: weakref.ref[Any] | None) -> None:
    """In ``__enter__``: from now on the turn is void when the block is left."""
    # A program may have looked at ``__exit__`` without a block.
    if leaving is not None and leaving() is not None:
        turn.kept = leaving


class Hold:
    """A turn for one block."""

    __slots__ = ("__weakref__", "_leaving", "_timeout_s", "_turn", "_turns")

    def __init__(self, turns: Turns, timeout_s: float | None) -> None:
        self._leaving: weakref.ref[Any] | None = None
        self._turns = turns
        self._timeout_s = timeout_s
        self._turn = Turn()

    def __enter__(self) -> bool:
        enter_block(self._turn, self._leaving)
        try:
            return self._turns.take(self._turn, self._timeout_s)
        except BaseException:
            self._turns.give_back(self._turn)
            raise

    def _leave(self, *exc: object) -> None:
        try:
            self._turns.give_back(self._turn)
        except BaseException:
            self._turns.give_back(self._turn)
            raise

    if TYPE_CHECKING:

        def __exit__(self, *exc: object) -> None: ...

    else:
        __exit__ = EndOfBlock()
