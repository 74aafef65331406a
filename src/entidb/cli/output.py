"""Lines, aligned columns, sizes and times; the same on a terminal and in a pipe.

Colours only on a terminal, and not with ``NO_COLOR`` (no-color.org) or ``TERM=dumb``. What comes
from a database or a server is escaped before it is shown, because a value must not be able to steer
the terminal that shows it. JSON is in ``values``.
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
    import uuid

    from rich.progress import Progress

#: Control characters and those that turn the direction of text around: both can forge a line.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
#: Characters of an error's message and of its code that reach a terminal.
MESSAGE_MAX: Final = 1000
#: And of a name or another word in one that is longer than that; more than most paths have.
_WORD_MAX: Final = 120
#: Characters that are looked at; what says more is cut.
_READ_MAX: Final = 64 * 1024
#: What a message quotes, and what has no space in it.
_LONG: Final = re.compile(
    rf"(?<!\w)'[^']{{{_WORD_MAX},}}'|\"[^\"]{{{_WORD_MAX},}}\"|\S{{{_WORD_MAX},}}"
)
CODE_MAX: Final = 64
#: Columns below which ids are shortened.
NARROW: Final = 80
_SIZES: Final = ("KiB", "MiB", "GiB", "TiB")


# ---------------------------------------------------------------- text


def safe(text: str) -> str:
    """``text`` with everything that could steer a terminal written as an escape."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str, characters_max: int = MESSAGE_MAX) -> str:
    """``text``, as a server or a file may have written it, as one line that is safe to show: no
    longer than ``characters_max``. In a longer one what is quoted is shortened first, so that what
    is said of it is still there."""
    # Cut first: what is thrown away need not be split and escaped.
    line = safe(" ".join(text[:_READ_MAX].split()))
    if len(line) > characters_max:
        line = _LONG.sub(lambda found: _shortened(found[0]), line)
    cut = len(line) > characters_max or len(text) > _READ_MAX
    return line[: characters_max - 1] + "…" if cut else line


def _shortened(word: str) -> str:
    """Its beginning and its end."""
    return f"{word[: _WORD_MAX - 40]}…{word[-39:]}"


def code_text(code: str) -> str:
    """An error's code as it is shown; servers may send anything for one."""
    return one_line(code, CODE_MAX)


def id_text(entity_id: uuid.UUID) -> str:
    """An id for a person: whole, or on a narrow terminal its end, which is enough to name it. Ids
    begin with the time when they were made, so their beginnings are much the same."""
    if columns() >= NARROW:
        return str(entity_id)
    return f"…{entity_id.hex[-12:]}"


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


def columns() -> int:
    """How many there are; in a pipe more than anything needs."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else _NO_END


_NO_END: Final = 1 << 30


class Styled(str):
    """Text with escape sequences of our own."""

    __slots__ = ()


def styled(text: str, *, err: bool = False, **style: Any) -> str:
    """``text`` in a colour, where that is wanted."""
    stream = sys.stderr if err else sys.stdout
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or not is_terminal(stream):
        return text
    return Styled(click.style(_safe_lines(text), **style))


def fit(text: str, width: int | None = None) -> str:
    """``text`` cut to ``width``, or to the terminal's; in a pipe it stays as it is."""
    width = columns() if width is None else width
    if width == _NO_END:
        return text
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def say(text: str = "") -> None:
    """One line, or several, of ordinary output. Nothing but our own colours steers a terminal."""
    click.echo(text if isinstance(text, Styled) else _safe_lines(text))


def note(text: str) -> None:
    """A line beside the output proper, on standard error."""
    click.echo(styled(_safe_lines(text), err=True, dim=True), err=True)


def _safe_lines(text: str) -> str:
    return "\n".join(map(safe, text.split("\n")))


def warn_of_exposure(path: str | os.PathLike[str], what: str) -> None:
    """Warn if every user of this machine can read a credential."""
    from entidb.credentials import exposure

    warning = exposure(path, what)
    if warning is not None:
        note(f"warning: {one_line(warning)}")


def table(rows: Iterable[Sequence[str]], heads: Sequence[str] = ()) -> Iterator[str]:
    """Lines of aligned columns under bold ``heads``. Widths count cells, so that Chinese and
    emoji do not push the rest around; what is too wide for the terminal is cut where most is.
    All rows are held at once: not for long lists."""
    from rich.cells import cell_len

    lines = [[safe(cell) for cell in row] for row in rows]
    everything = [list(heads), *lines] if heads else lines
    widths = _fitting([max(map(cell_len, column)) for column in zip(*everything, strict=True)])
    for number, line in enumerate(everything):
        cells = (fit(cell, w) if cell_len(cell) > w else cell for cell, w in _paired(line, widths))
        padded = (cell + " " * (w - cell_len(cell)) for cell, w in _paired(cells, widths))
        text = "  ".join(padded).rstrip()
        yield styled(text, bold=True) if heads and not number else text


def _paired(cells: Iterable[str], widths: list[int]) -> Iterator[tuple[str, int]]:
    return zip(cells, widths, strict=True)


def _fitting(widths: list[int]) -> list[int]:
    """``widths`` made smaller, the largest first, until a line fits."""
    widths, room = list(widths), columns()
    while sum(widths) + 2 * (len(widths) - 1) > room and max(widths) > _COLUMN_MIN:
        at = widths.index(max(widths))
        others = sum(widths) - widths[at] + 2 * (len(widths) - 1)
        second = max([_COLUMN_MIN, *(w for n, w in enumerate(widths) if n != at)])
        widths[at] = max(room - others, min(second, widths[at] - 1), _COLUMN_MIN)
    return widths


_COLUMN_MIN: Final = 6


def facts(pairs: Iterable[tuple[str, object]]) -> Iterator[str]:
    """Lines of names and what they are, aligned. What is too wide for the terminal gets lines of
    its own below its name, because nothing of it may be cut off."""
    from rich.cells import cell_len

    lines = [(safe(name), safe(str(value))) for name, value in pairs]
    names = max((cell_len(name) for name, _ in lines), default=0)
    room = columns() - names - 2
    for name, value in lines:
        if cell_len(value) <= room or not value:
            yield f"{name}{' ' * (names - cell_len(name))}  {value}".rstrip()
            continue
        yield name
        yield from (f"    {part}" for part in _wrapped(value, columns() - 4))


def told(text: str) -> Iterator[str]:
    """Lines of ``text`` that nothing may be cut off of: what is too wide for the terminal goes on
    below, further in. In a pipe they stay as they are."""
    from rich.cells import cell_len

    for line in map(safe, text.splitlines()):
        if cell_len(line) <= columns():
            yield line
            continue
        inside = " " * (len(line) - len(line.lstrip()) + 4)
        yield from _wrapped(line, columns(), inside)


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    import textwrap

    return textwrap.wrap(
        text, max(width, len(indent) + 10), break_on_hyphens=False, subsequent_indent=indent
    )


class WholeGroup(click.Group):
    """A group whose help says all of what each command does."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        found = ((name, self.get_command(ctx, name)) for name in names)
        rows = [(name, each.get_short_help_str(_NO_END)) for name, each in found if each]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


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
    """A progress bar, which learns through ``reach`` how far things are. It appears with the first
    call, so that work which ends at once shows no flicker."""

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
