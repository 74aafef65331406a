"""What a cache may believe: the moment at which something was read, and whether it has passed.

Code that remembers what it has read from a database remembers the moment with it, and asks it
before each use. Nothing else says what is still true: not who has committed, nor how often.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from entidb.errors import LocalError, StorageError
from entidb.storage import Storage


class Marked(Protocol):
    """The mark of the store is another one after each commit, by any thread, in whichever process;
    and ``failures`` after each attempt that failed."""

    @property
    def failures(self) -> int: ...

    @property
    def storage(self) -> Storage: ...


class Moment(Struct):
    """What was read at this moment is true while ``is_current``. It is that of a snapshot; what
    the store itself says of now may be ahead of every snapshot.

    That of a ``Writer`` passes its own commit, if it works: what is read in the writer and left
    alone by the commit is true after it as well. What the commit changes, the code that remembers
    it has to know."""

    source: Marked
    #: Moved by ``Core`` alone.
    mark: int

    def is_current(self) -> bool:
        """Whether nothing was committed since, nor tried to be (R17). A few microseconds; raises
        nothing: of a database that is closed nothing is known."""
        try:
            source = self.source
            return source.failures + source.storage.mark() == self.mark
        except (LocalError, StorageError):
            return False


__all__ = ["Moment"]
