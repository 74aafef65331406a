"""The channel of news of a simulated server: who waits at each node, and the lines on which devices
are told.

What a node does is real, from the address that is asked for to the events that leave: it runs on a
loop in virtual time. A line carries bytes one way, in order; what can happen to them on the way is
decided here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, TypeVar, cast

from entidb import cbor, protocol
from entidb.db.records import META_HEAD, decode_head
from entidb.errors import EntiDBError, SyncError, TransportError, error_from_code
from entidb.protocol import ErrorResponse, PullRequest
from entidb.server.carrying import CARRIED_OPERATIONS_MAX, PageCarrier
from entidb.server.front import Front
from entidb.server.live import LiveChannels
from entidb.server.live_answers import LiveAnswers, LiveServer, Streamed
from entidb.server.live_http import EVENTS_TYPE, LiveRequest
from entidb.server.stores import Store
from entidb.sync.carried import question
from entidb.sync.live import Event
from entidb.testing.carrying import CarriedWatch
from entidb.testing.lines import NewsLine
from entidb.testing.loop import WorldLoop
from entidb.testing.nodes import SimulatedNode, SimulatedNodes
from entidb.testing.world import World

T = TypeVar("T")
#: Streams that one server takes: more than a run has devices, so that copies of one find it full
#: in some runs.
_MOST: Final = 100
_MOST_EACH: Final = 50
#: How many pages are read without a thread.
_NEAR: Final = 0.5
#: Milliseconds that a thread of the server may take to look at a database.
_LOOK_MS: Final = (0, 1, 5, 20)
#: Milliseconds after which a server notices that nobody is at the other end.
_GONE_MS: Final = 60_000
#: A device that was locked out has no stream any more after so many.
_LOCKED_MS: Final = 2_500


class NodeChannels:
    """Of one process of a node."""

    def __init__(self, world: World, nodes: SimulatedNodes, node: SimulatedNode, front: Front):
        self._nodes, self._node, self._life = nodes, node, node.life
        self.loop = WorldLoop(world, self._later)
        self.live = LiveChannels(self.loop.loop, _MOST, _MOST_EACH)
        self.lines: dict[NewsLine, None] = {}
        server = SimpleNamespace(
            front=front,
            clock=world.server_clock,
            # Nodes listen when the simulator has them listen.
            stores=SimpleNamespace(listen=lambda store: None, release=front.stores.release),
        )
        self.answers = LiveAnswers(
            cast(LiveServer, server),
            lambda db_id: self._on_a_thread(lambda: front.stores.use(db_id, create=False)),
            lambda call, store: self._on_a_thread(lambda: call(store)),
            self._carrier(world, front) if world.knobs.pages else None,
        )
        self._rng = world.stream(f"threads of {node.name} {node.life}")

    def _carrier(self, world: World, front: Front) -> PageCarrier:
        pages = world.knobs.pages
        some = CARRIED_OPERATIONS_MAX if pages == 1 else pages - 1
        return PageCarrier(
            front,
            world.server_clock,
            self._read,
            lambda request, cursor: None,
            operations_max=some,
            whole=pages == 1,
        )

    async def _read(self, store: Store, request: PullRequest, read: Callable[[], bytes]) -> bytes:
        """As on the event loop, or as on a thread."""
        if self._rng.random() < _NEAR:
            with self._nodes.on(self._node):
                return read()
        return await self._on_a_thread(read)

    def _later(self, delay_ms: int, work: Callable[[], None]) -> None:
        if self._node.life == self._life:
            self._nodes.later(self._node, delay_ms, work)

    async def _on_a_thread(self, call: Callable[[], T]) -> T:
        """What ``call`` returns, a moment later: others may commit before it and after it."""
        nodes, node = self._nodes, self._node
        future: asyncio.Future[T] = self.loop.create_future()

        def work() -> None:
            with nodes.within(node, f"{node.name} crashes while it looks where a database ends"):
                try:
                    with nodes.on(node, pausable=True):
                        made = call()
                except EntiDBError as error:
                    back(partial(future.set_exception, error))
                else:
                    back(partial(future.set_result, made))

        def back(settle: Callable[[], None]) -> None:
            self._later(self._rng.choice(_LOOK_MS), lambda: None if future.done() else settle())

        self._later(self._rng.choice(_LOOK_MS), work)
        return await future


class SimulatedChannels:
    """Of all nodes of a server, one process after the other."""

    def __init__(
        self,
        world: World,
        nodes: Callable[[], SimulatedNodes],
        locked: Callable[[bytes, str], int],
        pages: CarriedWatch,
    ) -> None:
        """``locked`` says for how many milliseconds a device has been locked out of a database."""
        self._pages = pages
        self._world = world
        self._nodes = nodes
        self._locked = locked
        self._rng: random.Random = world.stream("news")
        self._of: dict[str, NodeChannels] = {}
        #: Called with the name of a database for which somebody begins to wait.
        self.on_begin: Callable[[str], None] | None = None

    # ------------------------------------------------------------ processes

    def begin(self, node: SimulatedNode, front: Front) -> NodeChannels:
        """Another process of ``node``; the lines to the one before it are cut."""
        before = self._of.get(node.name)
        made = self._of[node.name] = NodeChannels(self._world, self._nodes(), node, front)
        if before is not None:
            for line in list(before.lines):
                self._end(line, TransportError("the connection was reset"))
            before.loop.end()
        return made

    def end(self) -> None:
        """The run is over."""
        for channels in self._of.values():
            channels.loop.end()

    def cut_all(self) -> None:
        for channels in self._of.values():
            for line in list(channels.lines):
                self._end(line, TransportError("the connection was cut"))

    def close(self) -> None:
        """Send all away."""
        for channels in self._of.values():
            channels.loop.call_soon(channels.live.close)

    def look(self, node: SimulatedNode, db_id: str, records: Mapping[bytes, bytes]) -> None:
        """``node`` looks whether others have committed to a database that is not open there."""
        raw = records.get(META_HEAD)
        if raw is not None:
            self._of[node.name].live.told(db_id, decode_head(raw).sequence)

    # ------------------------------------------------------------ a request

    def call(self, line: NewsLine, token: str) -> None:
        """A device asks; the outcome is told to its end of the line."""
        world, name = self._world, line.caller.name
        if self._is_parted(name, "up"):
            line.whole = False
            return
        world.after(1 + int(self._rng.random() * line.latency), lambda: self._arrives(line, token))

    def hang_up(self, line: NewsLine) -> None:
        """The device's end is closed."""
        known = line.whole or line.over
        line.whole = False
        delay = line.latency if known else _GONE_MS
        self._world.after(1 + delay, lambda: self._is_gone(line))

    def is_whole(self, line: NewsLine) -> bool:
        """Whether the next commit is told on this line."""
        node = line.node
        if node is None or not line.whole or line.held or line.owed or not self._nodes().runs(node):
            return False
        return line in self._of[node.name].lines

    def _arrives(self, line: NewsLine, token: str) -> None:
        nodes = self._nodes()
        node = nodes.pick()
        if node is None:
            self._end(line, TransportError("no node is up"))
            return
        line.node = node
        channels = self._of[node.name]
        channels.lines[line] = None
        nodes.later(node, 0, lambda: self._take(node, channels, line, token))

    def _take(
        self, node: SimulatedNode, channels: NodeChannels, line: NewsLine, token: str
    ) -> None:
        if line not in channels.lines:
            return
        caller = line.caller
        query = f"db_id={caller.db_id}&device_id={caller.device_id.hex()}"
        if line.cursor is not None:
            query += f"&cursor={line.cursor}"
        if line.asks is not None:
            query += f"&pages={question(line.asks)}"
        accept = EVENTS_TYPE if line.stream else protocol.CONTENT_TYPE
        try:
            line.grants = node.front.authenticate(token)
            request = LiveRequest(query.encode(), {"accept": accept})
        except SyncError as error:
            self._refuse(channels, node, line, error)
            return
        if self.on_begin is not None:
            self.on_begin(caller.db_id)
        line.gone = channels.loop.create_future()
        channels.loop.create_task(self._serve(channels, node, line, request))

    async def _serve(
        self, channels: NodeChannels, node: SimulatedNode, line: NewsLine, request: LiveRequest
    ) -> None:
        assert line.grants is not None
        try:
            answer = await channels.answers.answer(channels.live, request, line.grants)
        except EntiDBError as error:
            self._refuse(channels, node, line, error)
            return
        if not isinstance(answer, Streamed):
            self._down(line, lambda: self._said(line, cbor.decode(answer.body)["head"]))
            channels.lines.pop(line, None)
            return

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._down(line, lambda: line.caller.began(line))
            else:
                self._leaves(line, message["body"].decode())

        async def receive() -> MutableMapping[str, Any]:
            assert line.gone is not None
            await line.gone
            return {"type": "http.disconnect"}

        await answer.run(channels.live, send, receive, [])
        channels.lines.pop(line, None)
        self._down(line, lambda: self._end(line, EOFError("the stream ended")))

    def _refuse(
        self, channels: NodeChannels, node: SimulatedNode, line: NewsLine, error: Exception
    ) -> None:
        channels.lines.pop(line, None)
        said = protocol.decode(ErrorResponse, protocol.encode(node.front.explain(error, "news")))
        told = error_from_code(
            said.code, said.message, retry_after=said.retry_after, details=said.details
        )
        self._down(line, lambda: self._end(line, told))

    def _is_gone(self, line: NewsLine) -> None:
        if line.gone is not None and not line.gone.done():
            line.gone.set_result(None)

    # ------------------------------------------------------------ on the way

    def _leaves(self, line: NewsLine, text: str) -> None:
        """Events leave the server."""
        for event in _events(text):
            if event is not None and event.name in ("head", "page"):
                self._check(line)
                if event.name == "page":
                    self._pages.leaves(line, event, line.grants)
                line.owed = _head_of(event)
                for said, late_ms in self._befalls(line, event):
                    self._tell(line, said, late_ms, pays=said is event)
            else:
                self._tell(line, event, 0)

    def _check(self, line: NewsLine) -> None:
        world, grants, caller = self._world, line.grants, line.caller
        assert grants is not None
        if world.nodes > 1:
            return  # a node that was paused does late what was due meanwhile
        ended = grants.until_s is not None and grants.until_s * 1000 < world.server_clock.now_ms()
        locked_ms = self._locked(caller.device_id, caller.db_id)

        def check() -> None:
            world.checks.that(
                not ended, "LIVE", f"{caller.name} is told news, and its token has ended"
            )
            world.checks.that(
                locked_ms < _LOCKED_MS,
                "LOCKED",
                f"{caller.name} is told news, and is locked out for {locked_ms} ms",
            )

        world.after(0, check)

    def _befalls(self, line: NewsLine, event: Event) -> list[tuple[Event, int]]:
        """What comes of one hint: events, and milliseconds that each is late."""
        knobs = self._world.knobs
        if self._chance("stream_cut", knobs.stream_cut):
            self._end(line, TransportError("the connection was cut"))
            return []
        if self._chance("hint_lost", knobs.hint_lost):
            return []
        made = [(event, 0)]
        if self._chance("hint_late", knobs.hint_late):
            made = [(event, 500 + self._rng.randrange(10_000))]
        if self._chance("hint_doubled", knobs.hint_doubled):
            made.append((event, self._rng.randrange(3_000)))
        if self._chance("hint_foreign", knobs.hint_foreign):
            other = self._rng.choice((0, 1, _head_of(event) // 2, 10**9))
            made.insert(self._rng.choice((0, 1)), (Event("head", str(other)), 0))
            older = self._pages.older(line, _head_of(event))
            if older:
                # Mostly at another time than what it stood beside.
                late_ms = self._rng.choice((0, 10, 100))
                made.append((self._rng.choice(older), late_ms))
        return made

    def _chance(self, fault: str, rate: int) -> bool:
        if not rate or self._world.quiet or self._rng.random() * 1000 >= rate:
            return False
        self._world.fired(fault)
        return True

    def _tell(
        self, line: NewsLine, event: Event | None, late_ms: int, *, pays: bool = False
    ) -> None:
        def told() -> None:
            if pays and event is not None and _head_of(event) >= line.owed:
                line.owed = 0
            if line.whole and not line.held:
                line.caller.came(line, event)

        if late_ms:
            self._world.after(late_ms, told)
        else:
            self._down(line, told)

    def _said(self, line: NewsLine, head: int) -> None:
        if line.whole:
            line.caller.came(line, head)

    def _end(self, line: NewsLine, error: SyncError | EOFError) -> None:
        if line.node is not None:
            self._of[line.node.name].lines.pop(line, None)
        if line.whole:
            line.whole, line.over = False, True
            self._world.after(1, lambda: self._ended(line, error))

    def _ended(self, line: NewsLine, error: SyncError | EOFError) -> None:
        self._is_gone(line)
        line.caller.failed(line, error)

    def _down(self, line: NewsLine, arrive: Callable[[], None]) -> None:
        """Bytes on their way to the device, behind those before them."""
        world = self._world
        if self._is_parted(line.caller.name, "down"):
            # Nobody is told that this line does not work any more.
            line.whole = False
            return
        at = max(line.arrives_at, world.now + 1 + int(self._rng.random() * line.latency))
        line.arrives_at = at
        world.after(at - world.now, arrive)

    def _is_parted(self, name: str, direction: str) -> bool:
        network = self._world.network
        until = network.blocked.get((name, direction), 0)
        return network.armed and until > self._world.now


def _head_of(event: Event) -> int:
    """The commit that a hint names, with a page or without."""
    return int(event.data if event.name == "head" else event.data.split(" ")[2])


def _events(text: str) -> list[Event | None]:
    """What a device reads out of the bytes of one write."""
    made: list[Event | None] = []
    for block in filter(None, text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in fields:
            retry = fields.get("retry")
            retry_ms = None if retry is None else int(retry)
            made.append(Event(fields.get("event", "message"), fields["data"], retry_ms))
        else:
            made.append(None)
    return made


__all__ = ["NodeChannels", "SimulatedChannels"]
