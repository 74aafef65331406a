"""Pages that come with hints: the answer to a pull that this device did not have to ask for.

When a stream of news is opened the device says what its pulls ask for. A page that comes on it is
the answer to that pull from one commit on, and is taken for one only where the next pull would ask
for just that; anything else is a hint, and a pull follows.

Not here: what is done with a page (``pulling``), and when (``cycle``).
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
from collections import deque
from typing import Final

from msgspec import Struct

from entidb.errors import SyncError
from entidb.protocol import PullRequest, PullResponse, SyncResponse, decode_response, encode
from entidb.types import SEQUENCE_MAX

_log = logging.getLogger("entidb.sync")

FEATURE: Final = "pages"
#: Characters of the question in an address. A scope of many names takes more, and comes without
#: pages: addresses of eight thousand do not pass everywhere.
ASKED_MAX: Final = 4_000
#: Characters of an event. Servers carry pages of 16 KiB.
_EVENT_MAX: Final = 60_000
_EVENT: Final = re.compile("([0-9a-f]{32}) ([0-9]{1,20}) ([0-9]{1,20}) ([A-Za-z0-9+/]+={0,2})")


class CarriedPage(Struct, frozen=True):
    """A page of ``history`` that leads from ``begins`` to ``head``, still encoded, or is the first
    of several that do; ``asked`` is what was said when its stream was opened."""

    asked: PullRequest
    history: bytes
    begins: int
    head: int
    body: bytes

    def answers(self, request: PullRequest) -> bool:
        """Whether it is the answer to ``request``: from where the device stands, of the same
        history and the same collections."""
        asked = self.asked
        reached, newest = request.cursor, request.cursor
        if request.have:
            newest = request.have[-1][1]
            if request.have[0][0] <= reached + 1:
                reached = request.have[0][1]
        return (
            reached == newest == self.begins
            and request.history == self.history
            and request.collections == asked.collections
            and request.schema == asked.schema
            and not request.full
        )

    def opened(self) -> PullResponse | None:
        """The page; None where it cannot be read."""
        try:
            page: SyncResponse = decode_response(self.asked, self.body)
        except SyncError as error:
            _log.debug("a page that came with news cannot be read: %s", error)
            return None
        assert isinstance(page, PullResponse), "the answer to a pull is a page"
        return page if page.head == self.head else None


class Carried:
    """The newest page that came and was not looked at: of those of several hints only the newest
    can be the next. ``put`` and ``take`` may be called from any thread."""

    def __init__(self) -> None:
        self.waiting: deque[CarriedPage] = deque(maxlen=1)

    def put(self, page: CarriedPage | None) -> None:
        """``page`` has come; None: there is something newer than what has come until now, and no
        page of it."""
        if page is None:
            self.waiting.clear()
        else:
            self.waiting.append(page)

    def take(self) -> CarriedPage | None:
        try:
            return self.waiting.pop()
        except IndexError:
            return None


def question(asked: PullRequest) -> str | None:
    """What is said in an address to get pages; None where it is too long for one."""
    text = base64.urlsafe_b64encode(encode(asked)).rstrip(b"=").decode()
    return text if len(text) <= ASKED_MAX else None


def page_in(asked: PullRequest | None, text: str) -> tuple[int, CarriedPage | None] | None:
    """What an event says: the newest commit, and the page that leads there, if it was asked for
    and can be read. None where it says nothing."""
    found = _EVENT.fullmatch(text) if len(text) <= _EVENT_MAX else None
    if found is None:
        return None
    history, begins, head = bytes.fromhex(found[1]), int(found[2]), int(found[3])
    if not begins < head <= SEQUENCE_MAX:
        return None
    if asked is None:
        return head, None
    try:
        body = base64.b64decode(found[4], validate=True)
    except binascii.Error:
        return head, None
    return head, CarriedPage(asked, history, begins, head, body)


__all__ = ["FEATURE", "Carried", "CarriedPage", "page_in", "question"]
