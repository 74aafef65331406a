"""A simulated device that runs in the background: it syncs when something was committed, when the
server has something new, when it is woken, and on its interval, and not when the simulator says so.

When a sync is due (``Occasions``) and how news are listened for (``ChannelCourse``) are the real
ones; the threads of both are events of the world here. Beside them LIVE is checked: a hint changes
nothing by itself and starts one sync at most, and a device that is told of everything is not behind
for long.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from entidb.db import Database
from entidb.errors import (
    LOCKED_OUT,
    EntiDBError,
    SyncCancelledError,
    SyncError,
    SyncTimeoutError,
)
from entidb.sync import SyncConfig, SyncCycleResult
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.background import BURST_S
from entidb.sync.live import (
    FIRST_EVENT_S,
    SILENCE_S,
    Ask,
    ChannelCourse,
    Course,
    Event,
    HeldUpError,
    LiveState,
    Next,
    OpenStream,
    Wait,
)
from entidb.sync.occasions import Occasions, may_pass
from entidb.testing.between import BetweenEngine
from entidb.testing.faults import FaultyStorage
from entidb.testing.lines import NewsLine, NewsWay
from entidb.testing.watch import DeviceWatch
from entidb.testing.world import World, WorldClock

FEATURE: Final = "live"
#: Seconds of the interval of a device.
INTERVALS_S: Final = (5.0, 30.0, 600.0)
#: Milliseconds after which a device that is told of everything has pulled: a hint is at most
#: 50 behind the one before it, nodes hear of each other now and then, and a way may be slow.
BOUND_MS: Final = 3_000
NODES_BOUND_MS: Final = 10_000
#: Milliseconds after which a sync that failed is tried again, where it was for something: the
#: longest wait of a device, and a little more.
_AGAIN_MS: Final = 6_000
#: Seconds that a device waits for the answer to a question that the server answers within 25.
_ASK_S: Final = 40.0


class Hearer(Protocol):
    """The device that it runs."""

    name: str
    world: World
    clock: WorldClock
    config: SyncConfig
    database: Database
    engine: BetweenEngine
    storage: FaultyStorage
    watch: DeviceWatch
    token: str
    needs_choice: bool
    last: SyncCycleResult | None
    last_error: EntiDBError | None

    @property
    def device_id(self) -> bytes: ...

    @property
    def in_cycle(self) -> bool: ...

    @property
    def stepping(self) -> bool:
        """Whether the cycle itself does something now, and nobody else."""
        ...

    def renew_token(self) -> None: ...

    def begin_cycle(self) -> None: ...


class Listener:
    """Of one process of a device, from ``start`` to ``stop``."""

    def __init__(self, device: Hearer, channels: NewsWay, db_id: str, rng: random.Random) -> None:
        self.name = device.name
        self.db_id = db_id
        self.state = LiveState.OFFLINE
        self._device = device
        self._world = device.world
        self._channels = channels
        self._rng = rng
        self._occasions = Occasions(device.config.retry, rng.random)
        self._stopped = False
        #: Timers that were set before are no longer meant.
        self._timer = 0
        self._idle_since = self._world.now
        #: News since the newest sync began; when one is due by itself; and whether the newest one
        #: failed, so that it is repeated.
        self._hints = 0
        self._until_ms = 0
        self._repeats = False
        # The channel.
        self._course: Course | None = None
        self._step = 0
        self._waits_for: OpenStream | Next | Ask | Wait | None = None
        self._line: NewsLine | None = None
        self._inbox: deque[Event | None] = deque()
        self._named = False
        self._live_since = self._world.now
        self._locked_out = False

    @property
    def device_id(self) -> bytes:
        return self._device.device_id

    def start(self, within_ms: int) -> None:
        """The process has begun."""
        self._device.database.on_commit = self._committed
        self._world.after(self._rng.randrange(1 + within_ms), self._first)

    def stop(self) -> None:
        """The process is gone, or its engine runs in the background no more."""
        if self._stopped:
            return
        self._stopped = True
        self._device.database.on_commit = None
        self._hang_up()
        if self._course is not None:
            self._course.close()

    # ------------------------------------------------------------ when to sync

    def wake(self) -> None:
        """A person asks for it."""
        self._occasions.call()
        self._arm()

    def _first(self) -> None:
        if not self._stopped and not self._device.in_cycle:
            self._begin()

    def _begin(self) -> None:
        self._hints = 0
        self._occasions.begin()
        self._device.begin_cycle()

    def _committed(self, sequence: int) -> None:
        if not self._device.stepping:
            self._occasions.commit()
            self._arm()

    def ended(self, result: SyncCycleResult | None, error: EntiDBError | None) -> None:
        """A sync is over."""
        device, now = self._device, self._world.now / 1000
        self._idle_since = self._world.now
        self._repeats = False
        if result is not None:
            done = not (result.incomplete or result.kept_back)
            more = result.changed and done and device.database.read_head().ready > 0
            self._occasions.worked(more=more)
        elif not isinstance(error, SyncCancelledError):
            assert error is not None
            after = getattr(error, "retry_after", None)
            self._occasions.failed(now, passes=may_pass(error), retry_after=after)
            self._repeats = True
        self._listen()
        pause_s = device.engine.pause_s()
        self._until_ms = self._world.now + int(pause_s * 1000)
        self._occasions.wait(now, pause_s)
        if device.needs_choice:
            # The person who has chosen asks for it.
            self._world.after(1 + self._rng.randrange(5_000), self.wake)
        self._arm()

    def _reached(self) -> int:
        # Not a step of a cycle: nobody comes in between.
        return DatabaseApplier.look(self._device.engine.applier).state.reached

    def _arm(self) -> None:
        """Wait for the next sync."""
        if self._stopped or self._device.in_cycle:
            return
        left, burst = self._occasions.left_s(self._world.now / 1000, self._reached)
        self._timer += 1
        timer = self._timer
        delay_ms = math.ceil(round(left * 1000, 3)) if left > 0 else 0
        if burst and self._world.now + delay_ms - self._idle_since < BURST_S * 1000:
            delay_ms += int(BURST_S * 1000)

        def due() -> None:
            if timer == self._timer and not self._stopped and not self._device.in_cycle:
                by_itself = self._repeats or self._occasions.called or burst
                if not by_itself and self._world.now < self._until_ms:
                    self._check_hints()
                self._begin()

        self._world.after(delay_ms, due)

    def _check_hints(self) -> None:
        """LIVE: no hint starts more than one sync."""
        self._world.checks.that(
            self._hints > 0, "LIVE", f"{self.name} syncs for news that nobody has told it"
        )

    # ------------------------------------------------------------ the channel

    def _listen(self) -> None:
        if self._course is None and FEATURE in self._device.engine.connection.features:
            course = ChannelCourse(
                self._device.clock.monotonic,
                self._rng.random,
                news=self._news,
                changed=self._changed,
                asks=self._device.engine.asks_pages,
                page=self._device.engine.page_came,
            )
            self._course = course.run()
            self._world.fired("live")
            self._go_on()

    def _news(self, head: int, first: bool) -> None:
        self._hints += 1
        self._occasions.hear(head, first)
        self._arm()

    def _changed(self, state: LiveState) -> None:
        self.state = state
        self._live_since = self._world.now
        self._world.trace("news", self.name, state.value)

    def _go_on(
        self, outcome: Event | int | None = None, failed: BaseException | None = None
    ) -> None:
        if self._stopped:
            return
        device, course = self._device, self._course
        assert course is not None
        before = device.storage.commits, device.watch.cursor
        step = course.send(outcome) if failed is None else course.throw(failed)
        self._world.checks.that(
            (device.storage.commits, device.watch.cursor) == before,
            "LIVE",
            f"what {self.name} was told has changed something by itself",
        )
        self._do(step)

    def _do(self, step: OpenStream | Next | Ask | Wait) -> None:
        self._step += 1
        self._waits_for = step
        if isinstance(step, Next):
            if self._inbox:
                self._later(0, lambda: self._go_on(self._inbox.popleft()))
            else:
                self._silent_after(SILENCE_S if self._named else FIRST_EVENT_S)
            return
        self._hang_up()
        if isinstance(step, Wait):
            # However little is left, it is over then.
            self._later(max(1, math.ceil(round(step.seconds * 1000, 3))), self._go_on)
            return
        if step.refresh:
            self._device.renew_token()
        stream = isinstance(step, OpenStream)
        cursor = step.known if isinstance(step, Ask) else None
        latency = self._world.knobs.latency_ms
        asks = step.asks if isinstance(step, OpenStream) else None
        self._line = line = NewsLine(self, stream=stream, cursor=cursor, latency=latency, asks=asks)
        knobs = self._world.knobs
        if stream and not self._world.quiet and self._rng.random() * 1000 < knobs.stream_held:
            self._world.fired("stream_held")
            line.held = True
        self._channels.call(line, self._device.token)
        self._silent_after(FIRST_EVENT_S if stream else _ASK_S)

    def _later(self, delay_ms: int, action: Callable[[], None]) -> None:
        """Do it, if the course still waits for this step then."""
        step = self._step

        def do() -> None:
            if step == self._step and not self._stopped:
                action()

        self._world.after(delay_ms, do)

    def _silent_after(self, seconds: float) -> None:
        held = self._line is not None and self._line.held
        error = HeldUpError() if held else SyncTimeoutError("nothing comes")
        self._later(int(seconds * 1000), lambda: self._go_on(failed=error))

    def _hang_up(self) -> None:
        line, self._line = self._line, None
        self._inbox.clear()
        self._named = False
        if line is not None:
            self._channels.hang_up(line)

    # ------------------------------------------------------------ its end of a line

    def began(self, line: NewsLine) -> None:
        if line is self._line and isinstance(self._waits_for, OpenStream) and not line.held:
            self._go_on()

    def came(self, line: NewsLine, event: Event | int | None) -> None:
        if line is not self._line or self._stopped:
            return
        if not line.stream:
            self._go_on(event)
            return
        assert not isinstance(event, int)
        self._named |= event is not None
        if isinstance(self._waits_for, Next) and not self._inbox:
            self._go_on(event)
        else:
            self._inbox.append(event)

    def failed(self, line: NewsLine, error: SyncError | EOFError) -> None:
        if line is self._line and not self._stopped:
            self._line = None
            self._locked_out = getattr(error, "code", "") in LOCKED_OUT
            self._go_on(failed=error)

    # ------------------------------------------------------------ LIVE

    @property
    def may_hear(self) -> bool:
        """Whether it has a server that offers news, which has not locked it out."""
        return self._course is not None and not self._locked_out

    @property
    def settled_since(self) -> int | None:
        """Since when nothing but news is needed to bring it up to date, in the world's time; None:
        it is not so."""
        device, line = self._device, self._line
        if self._stopped or device.in_cycle or device.needs_choice:
            return None
        idle_since, error = self._idle_since, device.last_error
        if error is not None:
            if not error.retryable or isinstance(error, SyncCancelledError):
                return None
            # It tries again by itself, after a while, and not before the server wants it.
            idle_since += _AGAIN_MS + round(1000 * (getattr(error, "retry_after", None) or 0.0))
        elif device.last is None or device.last.incomplete or device.last.kept_back:
            return None
        if self.state is LiveState.OFFLINE:
            return None
        if line is not None and not self._channels.is_whole(line):
            return None
        if line is None and self.state is LiveState.LIVE:
            return None
        return max(idle_since, self._live_since)


__all__ = ["BOUND_MS", "FEATURE", "INTERVALS_S", "NODES_BOUND_MS", "Hearer", "Listener"]
