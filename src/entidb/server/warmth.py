"""Whether small pages of a database are read without waiting for the disk.

Handing a page to the reader's thread and its answer back takes longer than reading ten entities
that are in memory. Reading ten that are not can take as long as the disk likes, and on the event
loop everybody would wait for it. The system counts for each thread how often it had to wait for a
page of a file; so a database whose last small pages were all in memory is read at once, and the
first time that it was not, the reader's thread reads again for a while.

On Linux; elsewhere nothing is known, and the reader's thread reads.
"""

from __future__ import annotations

import sys
from typing import Final

from entidb.protocol import PullRequest

#: Operations of a page that is small, and bytes of an answer that is.
SMALL_OPERATIONS: Final = 32
SMALL_BYTES: Final = 64 * 1024
#: Small pages that were read without waiting until the next one is read at once.
WARM_PAGES: Final = 64


if sys.platform == "linux":
    import resource

    def waits() -> int | None:
        """How often this thread has waited for a page of a file; None where nobody counts."""
        return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt

else:

    def waits() -> int | None:
        """How often this thread has waited for a page of a file; None where nobody counts."""
        return None


def is_small(request: PullRequest) -> bool:
    return request.limit <= SMALL_OPERATIONS and not request.full


class Warmth:
    """Of one open database; told of small pages by whoever has read them. ``counted`` says that
    all that reading can wait for is a page of a file, which is so of no store on a network."""

    __slots__ = ("_counted", "_pages")

    def __init__(self, *, counted: bool) -> None:
        self._counted = counted
        self._pages = 0

    @property
    def is_warm(self) -> bool:
        return self._pages >= WARM_PAGES

    def read(self, waited_before: int | None, size: int) -> None:
        """A page of ``size`` bytes was read by this thread, which had waited as often before."""
        if (
            not self._counted
            or waited_before is None
            or waits() != waited_before
            or size > SMALL_BYTES
        ):
            self._pages = 0
        else:
            self._pages += 1
