"""Lines, aligned columns, sizes and times; the same on a terminal and in a pipe.

Colours only on a terminal, and not with ``NO_COLOR`` (no-color.org) or ``TERM=dumb``. What comes
from a database or a server is escaped before it is shown, because a value must not be able to
write to somebody's terminal. JSON is in ``values``.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from rich.progress import Progress

#: Control characters and those that turn the direction of text around: both can forge a line.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
_SIZES: Final = ("KiB", "MiB", "GiB", "TiB")


# ---------------------------------------------------------------- text


def safe(text: str) -> str:
    """``text`` with everything that could steer a terminal written as an escape."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """``text`` as one line that is safe to show."""
    return safe(" ".join(text.split()))


def plural(count: int, noun: str, many: str | None = None) -> str:
    """``1 change``, ``2,000 changes``."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def size_text(count: int) -> str:
    """``count`` bytes for a person."""
    if count < 1024:
        return plural(count, "byte")
    value = float(count)
    for unit in _SIZES:
        value /= 1024
        if value < 1024 or unit == _SIZES[-1]:
            break
    return f"{value:.1f} {unit}"


def time_text(milliseconds: int) -> str:
    """A moment in this machine's time zone, with the offset from UTC."""
    try:
        moment = datetime.fromtimestamp(milliseconds / 1000).astimezone()
    except (OverflowError, OSError, ValueError):
        # 48 bits of milliseconds reach past the year 9999, where Python's calendar ends.
        return f"{milliseconds} ms after 1970"
    return moment.isoformat(timespec="seconds")


def timestamp_text(timestamp: int) -> str:
    """As ``time_text``, for a hybrid logical clock."""
    from entidb.types import ms_from_timestamp

    return time_text(ms_from_timestamp(timestamp))


# ---------------------------------------------------------------- terminals


def is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def styled(text: str, *, err: bool = False, **style: Any) -> str:
    """``text`` in a colour, where that is wanted."""
    stream = sys.stderr if err else sys.stdout
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not is_terminal(stream) else click.style(text, **style)


def fit(text: str) -> str:
    """``text`` cut to the terminal's width; in a pipe it stays as it is."""
    if not is_terminal(sys.stdout):
        return text
    from rich.cells import cell_len, set_cell_size

    width = shutil.get_terminal_size().columns
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def say(text: str = "") -> None:
    """One line, or several, of ordinary output."""
    click.echo(text)


def note(text: str) -> None:
    """A line beside the output proper, on standard error."""
    click.echo(styled(text, err=True, dim=True), err=True)


def warn_of_exposure(path: str | os.PathLike[str], what: str) -> None:
    """Say it if everybody on this machine can read a credential."""
    from entidb.credentials import exposure

    warning = exposure(path, what)
    if warning is not None:
        note(f"warning: {one_line(warning)}")


def table(rows: Iterable[Sequence[str]], heads: Sequence[str] = ()) -> Iterator[str]:
    """Lines of aligned columns under bold ``heads``. Widths count cells, so that Chinese and
    emoji do not push the rest around. All rows are held at once: not for long lists."""
    from rich.cells import cell_len

    lines = [[safe(cell) for cell in row] for row in rows]
    everything = [list(heads), *lines] if heads else lines
    widths = [max(map(cell_len, column)) for column in zip(*everything, strict=True)]
    for number, line in enumerate(everything):
        padded = (cell + " " * (w - cell_len(cell)) for cell, w in zip(line, widths, strict=True))
        text = "  ".join(padded).rstrip()
        yield styled(text, bold=True) if heads and not number else text


def facts(pairs: Iterable[tuple[str, object]]) -> Iterator[str]:
    """Lines of names and what they are, aligned."""
    return table([(name, str(value)) for name, value in pairs])


@contextmanager
def progress(description: str, total: int | None, *, unit: str = "rows") -> Iterator[Bar]:
    """A bar on standard error if that is a terminal, else nothing. ``unit`` is what is counted:
    ``rows`` or ``bytes``."""
    if not is_terminal(sys.stderr):
        yield Bar(None, 0)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    count = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), count, Remaining())
    shown = Progress(*columns, console=console, transient=True)
    try:
        yield Bar(shown, shown.add_task(description, total=total))
    finally:
        shown.stop()


class Bar:
    """Where a progress bar is told how far things are. It appears when it is told first, so that
    what is over at once does not flicker."""

    def __init__(self, shown: Progress | None, task: Any) -> None:
        self._shown = shown
        self._task = task

    def reach(self, done: int, total: int | None = None, description: str | None = None) -> None:
        """``done`` of ``total`` (None: as before)."""
        if self._shown is None:
            return
        named: dict[str, Any] = {} if description is None else {"description": description}
        if total is not None:
            named["total"] = total
        self._shown.start()
        self._shown.update(self._task, completed=done, **named)
