"""What the demo prints: chapters, plain lines, what a sync did, and the closing table.

Texts only; nothing here starts, asks or checks anything. Values from the tables are printed as
they are and never read as markup.
"""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

#: Columns where the output is not a terminal, which then has no width to ask for.
_WIDTH_OF_A_FILE: Final = 100
_LABELS_SHOWN_MAX: Final = 6

Answer = dict[str, Any]

#: What happened to an entity that two devices changed, in a person's words.
_OUTCOMES: Final = {
    "merge": "merged field by field",
    "keep_local": "this device's value stays: it is the later one",
    "accept_remote": "the server's value stays",
    "skip": "only a person decides: held, and everything else goes on",
}


class DemoStory:
    """The demo's output, in order."""

    def __init__(self, console: Console | None = None) -> None:
        made = console or Console(highlight=False)
        if not made.is_terminal:
            made.width = _WIDTH_OF_A_FILE
        self.console = made
        self._chapter = 0

    def chapter(self, title: str) -> None:
        self._chapter += 1
        self.console.print(f"\n[bold]{self._chapter}. {escape(title)}[/bold]")

    def line(self, text: str, style: str = "") -> None:
        self.console.print(f"   {escape(text)}", style=style, soft_wrap=True)

    def detail(self, text: str) -> None:
        self.console.print(f"      {escape(text)}", style="dim", soft_wrap=True)

    def sync(self, name: str, answer: Answer) -> None:
        """What one cycle did, and why."""
        self.line(f"{name} syncs: {_counts(answer)}")
        for conflict in [*answer["conflicts"], *answer["unresolved"]]:
            self._conflict(conflict)
        for withdrawn in answer["withdrawn"]:
            self.withdrawn(withdrawn)
        if answer["done"]:
            self.detail(
                f"already so on the server, nothing left to push: {len(answer['done'])} "
                "(both sides did the same)"
            )

    def _conflict(self, conflict: Answer) -> None:
        outcome = _OUTCOMES[conflict["action"]]
        self.detail(f"conflict on {conflict['entity']} ({conflict['kind']}): {outcome}")
        if not conflict["fields"]:
            return
        table = Table("field", "before", "here", "server", "result", box=None, pad_edge=False)
        for row in conflict["fields"]:
            shown = row if conflict["action"] != "skip" else [*row[:4], "(open)"]
            table.add_row(*(_value(cell) for cell in shown))
        self._indented(table, 9)

    def withdrawn(self, entry: Answer) -> None:
        """A transaction that was taken back, and what it lost to."""
        written = ", ".join(_shortened(entry["puts"]))
        if entry["deletes"]:
            deletions = f"{entry['deletes']} deletion{'s' if entry['deletes'] > 1 else ''}"
            written = f"{written} and {deletions}" if written else deletions
        self.detail(f"withdrawn ({entry['code']}): {entry['message']}")
        self.detail(f"   contained: {written}; lost to: {', '.join(sorted(set(entry['lost_to'])))}")

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in columns:
            table.add_column(column, justify="right" if column in _NUMBERS else "left")
        for row in rows:
            table.add_row(*(_value(cell) for cell in row))
        self.console.print()
        self.console.print(table)

    def _indented(self, table: Table, columns: int) -> None:
        self.console.print(Padding(table, (0, 0, 0, columns)))


_NUMBERS: Final = ("entities", "commit", "waiting", "withdrawn", "faults")


def _counts(answer: Answer) -> str:
    pulled, pushed = answer["pulled"], answer["pushed"]
    if not (pulled or pushed):
        return f"nothing to do ({_plural(answer['requests'], 'request')})"
    parts = []
    if pushed:
        parts.append(
            f"pushed {_plural(pushed, 'transaction')} of {_plural(answer['operations'], 'write')}"
        )
    if pulled:
        parts.append(f"pulled {_plural(pulled, 'write')}")
    size = answer["bytes_pulled"] + answer["bytes_pushed"]
    return (
        f"{', '.join(parts)} ({_plural(answer['requests'], 'request')}, {size:,} bytes of values)"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _shortened(labels: list[str]) -> list[str]:
    more = len(labels) - _LABELS_SHOWN_MAX
    return [*labels[:_LABELS_SHOWN_MAX], f"{more} more"] if more > 0 else labels


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return escape(", ".join(map(str, value)) or "(none)")
    return escape(f"{value:,}" if isinstance(value, int) else str(value))
