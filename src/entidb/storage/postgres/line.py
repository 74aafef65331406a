"""One connection to PostgreSQL, and questions on it in as few round trips as there can be.

A question is a statement that the connection has prepared, and its values, in PostgreSQL's binary
form. Several questions at once are one round trip (the pipeline mode of libpq): they are answered
in their order, up to the first that fails.

Not here: what is asked (``snapshot``, ``store``, ``turn``), and on which connection (``node``).
"""

from __future__ import annotations

import select
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import errors, pq
from psycopg.pq.abc import PGresult

_LONG: Final = struct.Struct(">q").pack
_INT: Final = struct.Struct(">i").pack
#: Of an array of ``bytea`` in one dimension, without NULL: how many there are, and the first's
#: number.
_HEAD: Final = struct.Struct(">iiIii")
_ARRAY_HEAD, _ARRAY_HEAD_BYTES = _HEAD.pack, _HEAD.size
_BYTEA: Final = 17
_GOOD: Final = frozenset((pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK))


class Statement(NamedTuple):
    """A statement with ``$1`` and so on for its values, and its name on a connection."""

    name: bytes
    text: bytes


Value = bytes | None
#: A statement and its values.
Question = tuple[Statement, Sequence[Value]]


def int4(number: int) -> bytes:
    return _INT(number)


def int8(number: int) -> bytes:
    return _LONG(number)


def byteas(items: Sequence[bytes]) -> bytes:
    """A value of the type ``bytea[]``."""
    pack = _INT
    parts = [_ARRAY_HEAD(1, 0, _BYTEA, len(items), 1)]
    for item in items:
        parts += (pack(len(item)), item)
    return b"".join(parts)


def items_in(array: bytes | None) -> list[bytes | None]:
    """The items of a value of the type ``bytea[]``; those that are NULL are None."""
    found: list[bytes | None] = []
    at, end = _ARRAY_HEAD_BYTES, len(array or b"")
    while array is not None and at < end:
        size = int.from_bytes(array[at : at + 4], "big", signed=True)
        at += 4
        found.append(None if size < 0 else array[at : at + size])
        at += max(size, 0)
    return found


def number_in(answer: PGresult, column: int = 0) -> int | None:
    """The number in its first row; None if that is NULL, or there is no row."""
    raw = answer.get_value(0, column) if answer.ntuples else None
    return None if raw is None else int.from_bytes(raw, "big", signed=True)


def pairs_in(answer: PGresult) -> list[tuple[bytes, bytes]]:
    value = answer.get_value
    return [(value(row, 0), value(row, 1)) for row in range(answer.ntuples)]  # type: ignore[misc]


def column_in(answer: PGresult) -> list[Any]:
    value = answer.get_value
    return [value(row, 0) for row in range(answer.ntuples)]


class _Heard:
    """What a server said without being asked."""

    def __init__(self) -> None:
        #: SQLSTATEs.
        self.states: list[str | None] = []
        self.ends = False

    def hear(self, notice: errors.Diagnostic) -> None:
        self.states.append(notice.sqlstate)
        if notice.severity_nonlocalized in ("FATAL", "PANIC"):
            self.ends = True


class Line(psycopg.Connection[tuple[Any, ...]]):
    """See the module. Thread-safe. A question that is interrupted, by Ctrl-C for one, closes it:
    no statement is ever cancelled."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._made: set[bytes] = set()
        self._owes = False
        #: What the pool that it is of knows of it; gone with it.
        self.kept: object = None
        self._heard = _Heard()
        self.add_notice_handler(self._heard.hear)

    def ask(self, statement: Statement, *values: Value) -> PGresult:
        """Raises what psycopg raises."""
        return self.ask_all(((statement, values),))[0]

    def ask_all(self, questions: Iterable[Question]) -> list[PGresult]:
        """Their answers, in one round trip; the server begins while the last ones are still being
        made. Raises what psycopg raises."""
        is_over = False
        try:
            with self.lock:
                answers = self._ask_or_close(questions)
            is_over = True
        finally:
            if not is_over:
                self.close()  # nor does anybody know whether the lock was given back
        for answer in answers:
            if answer.status not in _GOOD:
                raise errors.error_from_result(answer)
        return answers

    def _ask_or_close(self, questions: Iterable[Question]) -> list[PGresult]:
        # Not within the block that has the lock: an interrupt at the first line of a ``try`` passes
        # by the end of the block that it stands in (CPython 3.11).
        answers: list[PGresult] | None = None
        try:
            answers = self._asked(questions)
        finally:
            if answers is None:
                self.close()  # nobody knows what it would answer next
        return answers

    def leave(self, command: bytes) -> None:
        """Have a command done without waiting for it: ``settle`` does, before anything else is
        asked. Raises what psycopg raises."""
        self.pgconn.send_query(command)
        self._owes = True
        self.pgconn.flush()

    def settle(self) -> None:
        if self._owes:
            self._until_ready()
            while (answer := self.pgconn.get_result()) is not None:
                if answer.status not in _GOOD:
                    raise errors.error_from_result(answer)
            self._owes = False

    def is_free(self) -> bool:
        """Whether it is in no transaction, or is about to be in none."""
        return not self.closed and (
            self._owes or self.pgconn.transaction_status == pq.TransactionStatus.IDLE
        )

    def ask_to_the_end(self, statement: Statement, *values: Value) -> tuple[PGresult, list[Any]]:
        """As ``ask``, in one call of libpq that no signal handler of Python interrupts; answers
        that are errors are not raised. Also the SQLSTATEs of what the server said beside it."""
        with self.lock:
            self._heard.states.clear()
            if statement.name not in self._made:
                made = self.pgconn.prepare(statement.name, statement.text)
                if made.status not in _GOOD:
                    return made, []
                self._made.add(statement.name)
            # psycopg's stub knows of no NULL here; libpq does.
            given: Any = values
            answer = self.pgconn.exec_prepared(statement.name, given, [1] * len(values), 1)
            return answer, list(self._heard.states)

    def __del__(self, *_: Any) -> None:
        """One that was dropped is closed without a word: an interrupt may drop it."""

    def check(self) -> None:
        """Raises ``psycopg.OperationalError`` if it is known to have ended, without asking."""
        with self.lock:
            line = self.pgconn
            if line.status == pq.ConnStatus.OK and _is_ready(line.socket, False, 0):
                line.consume_input()
                line.is_busy()  # reads what has come
            if line.status != pq.ConnStatus.OK or self._heard.ends:
                self.close()
                raise psycopg.OperationalError("the connection has ended")

    def _asked(self, questions: Iterable[Question]) -> list[PGresult]:
        line, new = self.pgconn, dict[int, bytes]()
        count = 0
        line.enter_pipeline_mode()
        for statement, values in questions:
            if statement.name not in self._made and statement.name not in new.values():
                line.send_prepare(statement.name, statement.text)
                new[count] = statement.name
                count += 1
            line.send_query_prepared(statement.name, values, [1] * len(values), 1)
            count += 1
            line.flush()
        line.pipeline_sync()
        answers = self._answers(count)
        if line.status == pq.ConnStatus.OK:
            line.exit_pipeline_mode()
        for place, name in new.items():
            if place < len(answers) and answers[place].status in _GOOD:
                self._made.add(name)
        # Of statements that were prepared nobody asks, unless it failed.
        return [
            answer
            for place, answer in enumerate(answers)
            if place not in new or answer.status not in _GOOD
        ]

    def _answers(self, count: int) -> list[PGresult]:
        line = self.pgconn
        answers: list[PGresult] = []
        while True:
            self._until_ready()
            answer = line.get_result()
            if answer is None:
                if line.status != pq.ConnStatus.OK:
                    raise _ended(answers)
            elif answer.status == pq.ExecStatus.PIPELINE_SYNC:
                assert len(answers) == count
                return answers
            elif line.status != pq.ConnStatus.OK:
                raise errors.error_from_result(answer)
            else:
                answers.append(answer)

    def _until_ready(self) -> None:
        """Until the next answer is there."""
        line = self.pgconn
        while True:
            unsent = bool(line.flush())
            if not line.is_busy():
                return
            _is_ready(line.socket, unsent, None)
            line.consume_input()


def _ended(answers: list[PGresult]) -> psycopg.Error:
    """What it said last, if that was why."""
    if answers and answers[-1].status not in _GOOD:
        return errors.error_from_result(answers[-1])
    return psycopg.OperationalError("the connection has ended")


if sys.platform == "win32":

    def _is_ready(socket: int, writing: bool, timeout_s: float | None) -> bool:
        return any(select.select([socket], [socket] if writing else [], [], timeout_s))

else:

    def _is_ready(socket: int, writing: bool, timeout_s: float | None) -> bool:
        """Whether there is something to read, or room to write; waits until then, at most so
        long."""
        poll = select.poll()
        poll.register(socket, select.POLLIN | (select.POLLOUT if writing else 0))
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


__all__ = [
    "Line",
    "Question",
    "Statement",
    "Value",
    "byteas",
    "column_in",
    "int4",
    "int8",
    "items_in",
    "number_in",
    "pairs_in",
]
