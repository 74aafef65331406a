"""Planted bugs: news that are not told, not heard, or taken for more than they are, and pages that
come with them."""

from __future__ import annotations

from typing import Any
from unittest import mock

from msgspec.structs import replace

from entidb.server import carrying, live
from entidb.server.carrying import PageCarrier
from entidb.server.live import LiveChannels
from entidb.server.live_answers import LiveAnswers
from entidb.server.live_http import PageEvent, Stream
from entidb.sync import pulling
from entidb.sync.apply import applier
from entidb.sync.carried import CarriedPage
from entidb.sync.live import Policy
from entidb.sync.occasions import Occasions
from entidb.sync.pulling import Pulling
from entidb.testing.listener import Listener
from tests.planted.garden import CALM, Garden, bug

#: Devices write seldom, so that seldom anything but news has them sync.
LIVE = CALM | {"live": 1000, "server_writes": 200, "think_ms": 4_000}
#: Everybody polls, as behind what gathers answers.
POLLS = LIVE | {"stream_held": 1000}


@bug("the-newest-hint-is-left-out", "LIVE", knobs=LIVE)
def _newest_left_out(garden: Garden) -> None:
    """What is committed while the hint before it is on its way is not told."""

    def make(original: Any) -> Any:
        def told(self: LiveChannels, db_id: str, head: int) -> None:
            channel = self._channels.get(db_id)
            if channel is not None and channel.timer is None:
                original(self, db_id, head)

        return told

    garden.replace(LiveChannels, "_told", make)


@bug("looked-before-it-waits", "LIVE", knobs=POLLS)
def _looked_first(garden: Garden) -> None:
    """A server looks where the database ends, and only then counts the asker as one who waits."""

    def make(original: Any) -> Any:
        async def answer(self: LiveAnswers, live: LiveChannels, request: Any, grants: Any) -> Any:
            newest = await self._newest(request.db_id)
            with mock.patch.object(self, "_newest", mock.AsyncMock(return_value=newest)):
                return await original(self, live, request, grants)

        return answer

    garden.replace(LiveAnswers, "answer", make)


@bug("a-new-stream-is-not-the-first-word", "LIVE", knobs=LIVE | {"restore_server": 50})
def _not_the_first_word(garden: Garden) -> None:
    """After a silence a device pulls only if the number it hears is beyond its own."""

    def make(original: Any) -> Any:
        def hear(self: Occasions, head: int, first: bool) -> None:
            original(self, head, False)

        return hear

    garden.replace(Occasions, "hear", make)


@bug("news-are-forgotten-after-the-pull", "LIVE", knobs=LIVE | {"latency_ms": 200})
def _forgotten_after(garden: Garden) -> None:
    """What is said while a device syncs is taken for what that sync has brought."""

    def make(original: Any) -> Any:
        def worked(self: Occasions, *, more: bool) -> None:
            self._unheard, self._named = False, 0
            original(self, more=more)

        return worked

    garden.replace(Occasions, "worked", make)


@bug("news-are-never-forgotten", "LIVE", knobs=LIVE | {"hint_foreign": 200})
def _never_forgotten(garden: Garden) -> None:
    """A device goes on pulling until it is where a hint says the server is."""

    def make(original: Any) -> Any:
        def begin(self: Occasions) -> None:
            named = self._named
            original(self)
            self._named = named

        return begin

    garden.replace(Occasions, "begin", make)


@bug("a-hint-is-believed", "LIVE", knobs=LIVE)
def _believed(garden: Garden) -> None:
    """A device takes the number it hears for where it is itself."""

    def make(original: Any) -> Any:
        def hear(self: Occasions, head: int, first: bool) -> None:
            self.__dict__["_believed"] = max(head, self.__dict__.get("_believed", 0))
            original(self, head, first)

        return hear

    def left(original: Any) -> Any:
        def left_s(self: Occasions, now: float, reached: Any) -> Any:
            return original(self, now, lambda: max(reached(), self.__dict__.get("_believed", 0)))

        return left_s

    garden.replace(Occasions, "hear", make)
    garden.replace(Occasions, "left_s", left)


@bug(
    "an-older-hint-takes-back-a-newer",
    "LIVE",
    knobs=LIVE | {"hint_foreign": 500, "latency_ms": 200},
)
def _taken_back(garden: Garden) -> None:
    """The last number that a device has heard counts, and not the highest."""

    def make(original: Any) -> Any:
        def hear(self: Occasions, head: int, first: bool) -> None:
            self._named = 0
            original(self, head, first)

        return hear

    garden.replace(Occasions, "hear", make)


@bug("a-hint-moves-the-cursor", "LIVE", knobs=LIVE)
def _moves_the_cursor(garden: Garden) -> None:
    """A device notes on its disk what it is told."""

    def make(original: Any) -> Any:
        def news(self: Listener, head: int, first: bool) -> None:
            with self._device.database.write("local") as writer:
                writer.set_sync_state(writer.sync_state)
            original(self, head, first)

        return news

    garden.replace(Listener, "_news", make)


#: News are all that has a device sync: it hardly writes, and no page spares it the pull.
FOR_NEWS = LIVE | {"pages": 0, "think_ms": 60_000, "events": 2000}


@bug(
    "a-failed-pull-is-forgotten",
    "LIVE",
    knobs=FOR_NEWS | {"lost": 60, "server_writes": 10, "attempts": 1},
)
def _failed_pull(garden: Garden) -> None:
    """A sync that was begun for news, and failed, is not tried again."""

    def make(original: Any) -> Any:
        def failed(self: Occasions, now: float, **more: Any) -> None:
            self._begun_for = (False, False, 0)
            original(self, now, **more)
            self._missed = False

        return failed

    garden.replace(Occasions, "failed", make)


@bug("a-stream-outlives-its-token", "LIVE", knobs=LIVE | {"expired_token": 100})
def _outlives(garden: Garden) -> None:
    """A stream does not end with the token that it was opened with."""

    def make(original: Any) -> Any:
        def init(self: Stream, request: Any, grants: Any, *rest: Any) -> None:
            original(self, request, replace(grants, until_s=None), *rest)

        return init

    garden.replace(Stream, "__init__", make)


@bug("a-stream-outlives-a-lock", "LOCKED", knobs=LIVE | {"revoke": 400})
def _outlives_lock(garden: Garden) -> None:
    """Who is locked out keeps the stream that is open."""
    garden.replace(LiveAnswers, "_look", lambda original: lambda self, live: None)


@bug("who-waits-keeps-it-open", "LIVE", "LIVENESS", knobs=LIVE | {"server_commit_unknown": 60})
def _keeps_open(garden: Garden) -> None:
    """One who waits for news counts as a user of the database (R17)."""

    def make(original: Any) -> Any:
        async def newest(self: LiveAnswers, db_id: str) -> Any:
            with mock.patch.object(self._server.stores, "release"):
                return await original(self, db_id)

        return newest

    garden.replace(LiveAnswers, "_newest", make)


@bug("an-end-is-no-end", "LIVE", knobs=LIVE | {"stream_cut": 100})
def _no_end(garden: Garden) -> None:
    """A stream that was cut is not opened again."""

    def make(original: Any) -> Any:
        def failed(self: Policy, now: float, *rest: Any) -> None:
            original(self, now, *rest)
            self._not_before = now + 86_400

        return failed

    garden.replace(Policy, "failed", make)


#: Most hints bring a page.
PAGES = LIVE | {"pages": 1, "server_writes": 300}


@bug("a-page-applied-from-elsewhere", "PREFIX", "ORDER", knobs=PAGES | {"hint_lost": 200})
def _from_elsewhere(garden: Garden) -> None:
    """A device takes a page wherever it stands itself."""

    def make(original: Any) -> Any:
        def answers(self: CarriedPage, request: Any) -> bool:
            there = {"cursor": self.begins, "have": []}
            return bool(original(self, replace(request, **there))) and self.head > request.cursor

        return answers

    garden.replace(CarriedPage, "answers", make)


@bug(
    "a-page-of-another-history",
    "PREFIX",
    "ORDER",
    knobs=PAGES
    | {"restore_server": 8, "hint_foreign": 900, "scope": 0, "scope_in_cycle": 0, "events": 1000},
)
def _another_history(garden: Garden) -> None:
    """A device does not look at the history that a page is of, nor at its term."""
    garden.replace(pulling, "seen_in", lambda original: lambda state, answer: state.seen)
    garden.replace(applier, "seen_in", lambda original: lambda state, answer: state.seen)

    def make(original: Any) -> Any:
        def answers(self: CarriedPage, request: Any) -> bool:
            return bool(original(replace(self, history=request.history), request))

        return answers

    garden.replace(CarriedPage, "answers", make)


@bug("the-first-page-taken-for-all", "PREFIX", "CONVERGE", knobs=PAGES | {"pages": 2})
def _first_for_all(garden: Garden) -> None:
    """A page that is the first of several is taken for all of them."""

    def make(original: Any) -> Any:
        def opened(self: CarriedPage) -> Any:
            page = original(self)
            return page and replace(page, has_more=False, cursor=page.head)

        return opened

    garden.replace(CarriedPage, "opened", make)


@bug("a-page-of-a-wider-grant", "ORDER", knobs=PAGES | {"grants": 300})
def _wider_grant(garden: Garden) -> None:
    """A server has one page for everybody who asks for the same, whatever they may see."""

    def make(original: Any) -> Any:
        def wanted(self: PageCarrier, text: Any, db_id: str, device_id: Any, grants: Any) -> Any:
            found = original(self, text, db_id, device_id, grants)
            if found is not None:
                for other in list(self._wanted.values()):
                    if other.pull == found.pull:
                        return other
            return found

        return wanted

    garden.replace(PageCarrier, "wanted", make)


@bug("a-page-for-who-is-locked-out", "LOCKED", knobs=PAGES | {"revoke": 400})
def _for_locked_out(garden: Garden) -> None:
    """Who is locked out is told pages until the stream ends."""
    garden.replace(PageCarrier, "_may", lambda original: lambda self, to: True)


@bug("a-page-begins-too-late", "ORDER", knobs=PAGES)
def _too_late(garden: Garden) -> None:
    """A page leaves out the first commit after the hint before it."""

    def make(original: Any) -> Any:
        async def made(self: PageCarrier, key: Any, *rest: Any) -> Any:
            wanted, begins = key
            return await original(self, (wanted, begins + 1), *rest)

        return made

    def said(original: Any) -> Any:
        def text(history: bytes, begins: int, head: int, body: bytes) -> bytes:
            return bytes(original(history, begins - 1, head, body))

        return text

    garden.replace(PageCarrier, "_made", make)
    garden.replace(carrying, "event_text", said)


@bug("a-page-is-only-counted", "PREFIX", "ORDER", knobs=PAGES)
def _unread(garden: Garden) -> None:
    """A page moves the cursor of a device, and what it holds is left out."""

    def make(original: Any) -> Any:
        def carried(self: Pulling, look: Any) -> Any:
            came = original(self, look)
            if came is None:
                return None
            request, page = came
            return request, replace(page, commits=[])

        return carried

    garden.replace(Pulling, "carried", make)


@bug("told-later-is-told-never", "LIVE", knobs=PAGES)
def _told_never(garden: Garden) -> None:
    """A server takes each page for what its reader has written, and does not come back to it."""

    def make(original: Any) -> Any:
        async def page(self: PageCarrier, to: Any, begins: int, head: int) -> Any:
            page = await original(self, to, begins, head)
            return None if page is None else PageEvent(b"", page.head, page.writers)

        return page

    async def told(waiter: Any) -> bool:
        return True

    garden.replace(PageCarrier, "page", make)
    garden.replace(live, "_hint_own", lambda original: told)
