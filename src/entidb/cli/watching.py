"""``sync --watch``: an engine that runs in the background, and what it does as lines, and on a
terminal as a last line that changes.

Where several processes may have a database open, this one keeps it open: what other commands commit
is pushed at once, and what others write arrives as the server tells of it. Elsewhere it opens the
database for each cycle, so that other commands can use it in between.
"""

from __future__ import annotations

import errno
import os
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NoReturn, Protocol

import click

from entidb.cli.exits import Exit
from entidb.cli.output import code_text, fit, is_terminal, note, one_line, plural, safe, time_text
from entidb.cli.words import opened
from entidb.db import Database
from entidb.errors import EntiDBError, StorageError
from entidb.events import SafeEvent
from entidb.sync import SyncCycleResult, SyncEngine, SyncProgress, SyncState, SyncStatus
from entidb.sync.occasions import may_pass
from entidb.types import SystemClock

#: Seconds between two looks at what the terminal shows.
_LOOK_S: Final = 0.5
_PHASES: Final = {SyncState.PULLING: "pulling", SyncState.PUSHING: "pushing"}
#: Why nothing is heard where the database is open for each cycle only.
_ALONE: Final = "while the database is closed (one process at a time may have it here)"


Report = Callable[[SyncCycleResult, SyncStatus, str], None]


class WatchedSync(Protocol):
    """What is synchronised: the database in the directory ``path``, with the server at ``url``."""

    path: str
    url: str
    #: Where the token is read from, again when the server refuses it.
    token_file: str | None

    def run(self, database: Database) -> tuple[SyncCycleResult, SyncStatus]:
        """One cycle. Raises what ``SyncEngine.sync`` raises, and ``KeyboardInterrupt``."""
        ...

    def engine(self, database: Database) -> SyncEngine:
        """One for ``database``; close it. Raises what making it raises."""
        ...

    def warn(self) -> None:
        """Print the warnings, after the first report."""
        ...


def watch(job: WatchedSync, interval: float, report: Report, *, line: bool) -> int:
    """Sync until Ctrl-C or SIGTERM. SIGTERM is how a service manager ends it, and no failure.
    ``line``: a person reads along, so a terminal has a last line that changes."""
    watching = Watching(job, interval, report, LiveLine(_on_the_terminal() if line else None))
    try:
        watching.run()
    except SystemExit as ended:
        if ended.code != Exit.TERMINATED:
            raise
        return Exit.OK
    finally:
        with watching.beside_the_line():
            note(
                f"{plural(watching.cycles, 'cycle')}: {plural(watching.pulled, 'change')} pulled, "
                f"{plural(watching.pushed, 'transaction')} pushed"
            )


class Watching:
    """One watch, and what it has said. ``cycles``, ``pulled`` and ``pushed`` count."""

    def __init__(self, job: WatchedSync, interval: float, report: Report, line: LiveLine) -> None:
        self.cycles = self.pulled = self.pushed = 0
        self._job = job
        self._interval = interval
        self._report = report
        self._clock = SystemClock()
        self._line = line
        self._said = ""

    def run(self) -> NoReturn:
        """Report a trouble that may pass and go on; an error that cannot pass by itself ends a
        watch as it would end a single sync."""
        never = SafeEvent()
        while True:
            self._line.clear()
            try:
                with opened(self._job.path) as database:
                    if stays_open(database):
                        self._stay(database)
                    else:
                        result, status = self._job.run(database)
                        self._worked(result, status)
                        self._line.show(status, self._interval, _ALONE)
            except EntiDBError as error:
                self._failed(error)
            self._clock.wait(never, self._interval)

    def _stay(self, database: Database) -> NoReturn:
        """Run an engine in the background. Raises what needs the database to be opened again, and
        what ends the watch."""
        events: queue.SimpleQueue[tuple[SyncCycleResult, SyncStatus] | EntiDBError] = (
            queue.SimpleQueue()
        )
        with self._job.engine(database) as engine:

            def enters(old: SyncState, new: SyncState) -> None:
                error = engine.newest_error
                if new is SyncState.ERROR and error is not None:
                    events.put(error)

            engine.on_state(enters)
            engine.on_result(lambda result: events.put((result, engine.status())))
            engine.on_progress(self._line.reach)
            engine.start()
            while True:
                try:
                    event = events.get(timeout=_LOOK_S)
                except queue.Empty:
                    self._line.show(engine.status(), engine.config.interval_s)
                    continue
                if isinstance(event, StorageError):
                    raise event
                if isinstance(event, EntiDBError):
                    self._failed(event)
                else:
                    self._worked(*event)
                self._line.show(engine.status(), engine.config.interval_s)

    def _worked(self, result: SyncCycleResult, status: SyncStatus) -> None:
        self._said = ""
        self.cycles += 1
        self.pulled += result.pulled
        self.pushed += result.pushed
        if self.cycles > 1 and not result.changed:
            return
        now = self._clock.now_ms()
        if result.changed:
            self._line.changed_ms = now
        with self.beside_the_line():
            note(time_text(now))
            self._report(result, status, self._job.url)
        if self.cycles == 1:
            self._job.warn()

    def _failed(self, error: EntiDBError) -> None:
        """A server that is away for the night is worth one line. Raises what does not pass."""
        if not self._passes(error):
            raise error
        line = f"waiting [{code_text(error.code)}]: {one_line(str(error))}"
        if error.code == "unauthorized":
            line += f"; put a fresh token into {self._job.token_file}"
        said = line.replace(getattr(error, "request_id", None) or "", "")  # another one each time
        if said != self._said:
            with self.beside_the_line():
                note(line)
        self._said = said

    def _passes(self, error: EntiDBError) -> bool:
        """Whether the next turn can go well with the same settings."""
        if error.code == "unauthorized":
            # A token that was good once has ended, and whoever renews the file is late.
            return self.cycles > 0 and self._job.token_file is not None
        # An administrator freezes a database for a while.
        return may_pass(error) or error.code == "frozen"

    @contextmanager
    def beside_the_line(self) -> Iterator[None]:
        """For what is said above the line that changes. Output into a file on a full disk is lost;
        the watch goes on."""
        try:
            self._line.clear()
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise


def stays_open(database: Database) -> bool:
    """Whether other processes can use ``database`` meanwhile."""
    return database.storage.shared


# ---------------------------------------------------------------- the line that changes


class LiveLine:
    """The last line of a terminal: how news gets here, when there was some, and what is open.
    ``write`` None: there is none."""

    def __init__(self, write: Callable[[str], None] | None) -> None:
        #: When something changed last.
        self.changed_ms: int | None = None
        self._write = write
        self._shown = ""
        self._step: SyncProgress | None = None

    def reach(self, step: SyncProgress) -> None:
        """How far a cycle is. From any thread."""
        self._step = step

    def show(self, status: SyncStatus, interval_s: float, why: str = "") -> None:
        """``why`` says why there are no news, where it is known."""
        if self._write is None:
            return
        text = fit(safe(describe(status, self._step, self.changed_ms, interval_s, why)))
        if text != self._shown:
            # First of all, because Ctrl-C can come between the two.
            self._shown = text
            self._write(f"\r\x1b[2K{text}")

    def clear(self) -> None:
        if self._write is not None and self._shown:
            self._write("\r\x1b[2K")
        self._shown = ""


def _on_the_terminal() -> Callable[[str], None] | None:
    if not is_terminal(sys.stdout) or os.environ.get("TERM") == "dumb":
        return None
    return lambda text: click.echo(text, nl=False)


def describe(
    status: SyncStatus,
    step: SyncProgress | None,
    changed_ms: int | None,
    interval_s: float,
    why: str = "",
) -> str:
    """What the line says."""
    parts = [_way(status, interval_s, why)]
    if step is not None and status.state in _PHASES and step.state is status.state:
        total = "" if step.operations_total is None else f" of {step.operations_total:,}"
        parts.append(f"{_PHASES[status.state]} {step.operations:,}{total}")
    if status.heard_ms is not None:
        parts.append(f"last hint {_hour(status.heard_ms)}")
    if changed_ms is not None:
        parts.append(f"last change {_hour(changed_ms)}")
    parts.append(f"{status.pending:,} pending")
    parts.append(plural(status.conflicts, "conflict"))
    return ", ".join(parts)


def _way(status: SyncStatus, interval_s: float, why: str) -> str:
    if status.state is SyncState.STANDBY:
        return "another process syncs"
    following = ""
    if status.next_retry_s is not None:
        following = f", next try in {status.next_retry_s:.0f} s"
    if status.state is SyncState.RETRY_WAIT:
        return f"no answer{following}"
    if status.last_error_code is not None and status.live == "offline":
        return f"waiting [{code_text(status.last_error_code)}]{following}"
    if status.last_success_ms is None:
        return "connecting"
    if status.live == "offline":
        return f"no news {why or 'from the server'}, a cycle every {interval_s:g} s"
    since = "" if status.live_since_ms is None else f" since {_hour(status.live_since_ms)}"
    failed = ""
    if status.last_error_code is not None and following:
        # News come, and what is pending does not get through.
        failed = f", waiting [{code_text(status.last_error_code)}]{following}"
    return f"{status.live}{since}{failed}"


def _hour(milliseconds: int) -> str:
    """The time of day."""
    _, t, rest = time_text(milliseconds).partition("T")
    return rest[:8] if t else rest


__all__ = ["LiveLine", "Watching", "describe", "watch"]
