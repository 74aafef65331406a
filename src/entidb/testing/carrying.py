"""Pages that come with hints in a simulated run: what leaves a server with them is looked at, and
some of them are told again, at another time than they were made for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from msgspec.structs import replace

from entidb.protocol import PullResponse, decode
from entidb.server.auth import Grants
from entidb.sync.carried import CarriedPage, page_in
from entidb.sync.live import Event
from entidb.testing.checkers import ServerWatch
from entidb.testing.lines import NewsLine
from entidb.testing.pages import check_page
from entidb.testing.world import World

#: Pages of one device and one history that are remembered, to be told again.
_OLD_MAX: Final = 60


class PagedTenant(Protocol):
    """The database of a line."""

    watch: ServerWatch


class CarriedWatch:
    """Of one server. ``tenant`` is the database of a name, ``canaries`` looks for bytes of
    others, ``locked`` says whether a device is locked out of a database."""

    def __init__(
        self,
        world: World,
        tenant: Callable[[str], PagedTenant],
        canaries: Callable[[str, bytes], None],
        locked: Callable[[bytes, str], bool],
    ) -> None:
        self._world = world
        self._tenant = tenant
        self._canaries = canaries
        self._locked = locked
        self._old: dict[tuple[bytes, bytes], deque[tuple[list[str] | None, Event]]] = {}

    def leaves(self, line: NewsLine, event: Event, grants: Grants) -> None:
        """A page leaves the server: it is what a pull of this device would bring from there, and
        nobody gets it who would get no answer."""
        world, caller, asks = self._world, line.caller, line.asks
        assert asks is not None, "pages leave where they were asked for"
        said = page_in(asks, event.data)
        assert said is not None and said[1] is not None, "what a server says can be read"
        page: CarriedPage = said[1]
        world.fired("pages")
        locked = world.nodes == 1 and self._locked(caller.device_id, caller.db_id)

        def check() -> None:
            world.checks.that(
                not locked,
                "LOCKED",
                f"{caller.name} is told a page, and is locked out",
            )
            self._canaries(caller.db_id, page.body)
            history = self._tenant(caller.db_id).watch.history
            if page.history == history.identity:
                response = decode(PullResponse, page.body)
                request = replace(asks, cursor=page.begins, have=[])
                granted = grants.on(caller.db_id).collections
                check_page(world.checks, history, request, response, granted)
                world.checks.that(
                    response.granted == (None if granted is None else sorted(granted)),
                    "ORDER",
                    f"{caller.name} is told a page under another grant than its own",
                )

        world.after(0, check)
        place = caller.device_id, page.history
        old = self._old.setdefault(place, deque(maxlen=_OLD_MAX))
        old.append((asks.collections, event))

    def older(self, line: NewsLine, head: int) -> list[Event]:
        """Pages that were told to this device before, also of a history that has ended, by streams
        that asked for the same collections: those that begin at ``head``, or any where none
        does."""
        asks = line.asks
        if asks is None:
            return []
        told = [old for (device, _), old in self._old.items() if device == line.caller.device_id]
        there = [event for old in told for names, event in old if names == asks.collections]
        return [event for event in there if int(event.data.split(" ")[1]) == head] or there


__all__ = ["CarriedWatch"]
