"""Several openers of one store: what is promised between them, as tests that every store runs.

An ``Opener`` is driven by the test. ``LocalOpener`` is a second object in this process, where a
backend has that; ``ProcessOpener`` is a process of its own, which can be killed and stopped.

Not here: what a store promises to one opener (``contracts``).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from entidb.errors import CommitStaleError
from entidb.storage import Storage
from entidb.storage.base import Batch, StoreTurn
from entidb.testing.contracts import StorageContract, raises, read_all

#: Seconds within which an opener that waits for a killed one goes on: at once, on a machine that
#: may be busy, and not at the end of the minute that it would wait for one that lives.
DEAD_SECONDS: Final = 10.0
_COUNTER: Final = b"counter"


class Opener(Protocol):
    """Another who has the same store open."""

    def commit(self, batch: Batch, after: int | None = None) -> int: ...

    def read(self) -> dict[bytes, bytes]: ...

    def mark(self) -> int: ...

    def take(self, timeout_s: float) -> bool: ...

    def give_back(self) -> None: ...

    def claim(self, name: str, timeout_s: float) -> bool:
        """Whether it has the right called ``name`` now; it keeps it."""
        ...

    def count_up(self, times: int) -> None:
        """So many turns, each of which reads a number and commits the next one."""
        ...

    def die(self) -> None:
        """End at once, whatever it has."""
        ...

    def close(self) -> None: ...


class LocalOpener:
    """An opener in this process."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._claims: dict[str, StoreTurn] = {}

    def commit(self, batch: Batch, after: int | None = None) -> int:
        return self.storage.commit(batch, after)

    def read(self) -> dict[bytes, bytes]:
        return read_all(self.storage)

    def mark(self) -> int:
        return self.storage.mark()

    def take(self, timeout_s: float) -> bool:
        return self.storage.turn.take(timeout_s)

    def give_back(self) -> None:
        self.storage.turn.give_back()

    def claim(self, name: str, timeout_s: float) -> bool:
        if name not in self._claims:
            self._claims[name] = self.storage.claim(name)
        return self._claims[name].take(timeout_s)

    def count_up(self, times: int) -> None:
        for _ in range(times):
            assert self.storage.turn.take(60)
            try:
                with self.storage.snapshot() as snapshot:
                    number = int(snapshot.get(_COUNTER) or b"0")
                    mark = snapshot.mark
                assert self.storage.commit({_COUNTER: b"%d" % (number + 1)}, mark) == mark + 1
            finally:
                self.storage.turn.give_back()

    def die(self) -> None:
        self._claims.clear()
        self.storage.close()

    close = die


class ProcessOpener:
    """An opener in a process of its own, which opens ``path`` by calling ``opens``, written as
    ``module:name``."""

    def __init__(self, opens: str, path: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "entidb.testing.openers", opens, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._hear()

    @property
    def pid(self) -> int:
        return self._process.pid

    def commit(self, batch: Batch, after: int | None = None) -> int:
        return int(self._ask("commit", dict(batch), after))

    def read(self) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = self._ask("read")
        return found

    def mark(self) -> int:
        return int(self._ask("mark"))

    def take(self, timeout_s: float) -> bool:
        return bool(self._ask("take", timeout_s))

    def give_back(self) -> None:
        self._ask("give_back")

    def claim(self, name: str, timeout_s: float) -> bool:
        return bool(self._ask("claim", name, timeout_s))

    def count_up(self, times: int) -> None:
        self._ask("count_up", times)

    def tell(self, name: str, *arguments: Any) -> None:
        """Ask without waiting; ``hear`` waits."""
        assert self._process.stdin is not None
        pickle.dump((name, arguments), self._process.stdin)
        self._process.stdin.flush()

    def hear(self) -> Any:
        return self._hear()

    def stop(self) -> None:
        """As Ctrl-Z: it stays, with everything it has."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def die(self) -> None:
        self._process.kill()
        self._end()

    def close(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(OSError):
                self._ask("close")
            self._end()

    def _end(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _ask(self, name: str, *arguments: Any) -> Any:
        self.tell(name, *arguments)
        return self._hear()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        worked, answer = pickle.load(self._process.stdout)
        if worked:
            return answer
        raise answer


class SeveralOpeners(StorageContract):
    """The promises of ``entidb.storage.base`` between openers, and those to one of them."""

    def another(self, storage: Storage) -> AbstractContextManager[Opener]:
        """One more opener of ``storage``, for a block."""
        raise NotImplementedError("a contract needs another")

    # ---- mark

    def test_what_one_opener_commits_another_reads(self) -> None:
        with self.fresh({b"a": b"1"}) as storage, self.another(storage) as other:
            assert other.read() == {b"a": b"1"}
            other.commit({b"b": b"2"})
            assert read_all(storage) == {b"a": b"1", b"b": b"2"}
            storage.commit({b"a": None})
            assert other.read() == {b"b": b"2"}

    def test_a_commit_of_whichever_opener_makes_the_mark_one_more(self) -> None:
        with self.fresh({b"a": b"1"}) as storage, self.another(storage) as other:
            mark = storage.mark()
            with storage.snapshot() as before:
                assert before.mark == mark
                assert storage.commit({b"a": b"2"}) == mark + 1 == storage.mark()
                theirs = other.mark()
                assert other.commit({b"a": b"3"}) == theirs + 1
                assert storage.mark() == mark + 2
                assert before.mark == mark
            with storage.snapshot() as after:
                assert after.mark == mark + 2
                assert after.get(b"a") == b"3"

    def test_what_changes_nothing_leaves_the_mark(self) -> None:
        with self.fresh({b"a": b"1"}) as storage, self.another(storage) as other:
            mark = storage.mark()
            assert storage.commit({}) == mark
            other.read()
            with storage.snapshot() as snapshot:
                assert snapshot.mark == mark
            assert storage.turn.take(1)
            storage.turn.give_back()
            assert storage.mark() == mark

    # ---- other rights

    def test_a_right_may_be_used_by_several_threads_at_once(self) -> None:
        """The thread that runs gives it back while another closes."""
        with self.fresh({b"a": b"1"}) as storage, self.another(storage) as other:
            right = storage.claim("engine")
            failures: list[BaseException] = []

            def use() -> None:
                try:
                    for _ in range(300):
                        right.take(1.0)
                        right.give_back()
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=use) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
            assert not right.mine
            assert other.claim("engine", 5.0)

    # ---- wait

    def test_waiting_ends_with_a_commit_of_another(self) -> None:
        with self.fresh({b"a": b"1"}) as storage, self.another(storage) as other:
            mark = storage.mark()
            thread = threading.Timer(0.05, other.commit, [{b"a": b"2"}])
            thread.start()
            assert storage.wait(mark, 60.0)
            thread.join()
            assert read_all(storage) == {b"a": b"2"}
            assert storage.wait(mark, 0.0)

    def test_waiting_ends_when_the_time_is_over(self) -> None:
        with self.fresh({b"a": b"1"}) as storage:
            assert not storage.wait(storage.mark(), 0.01)

    # ---- turn

    def test_one_opener_has_the_turn(self) -> None:
        with self.fresh() as storage, self.another(storage) as other:
            assert storage.turn.take(1) and _has_turn(storage)
            assert storage.turn.take(1)  # he has it
            assert not other.take(0.05)
            storage.turn.give_back()
            storage.turn.give_back()
            assert not _has_turn(storage)
            assert other.take(10)
            assert not storage.turn.take(0.0)
            assert not _has_turn(storage)
            other.give_back()
            assert storage.turn.take(10)

    def test_the_turn_of_an_opener_that_dies_is_over(self) -> None:
        with self.fresh() as storage, self.another(storage) as other:
            assert other.take(10)
            assert not storage.turn.take(0.0)
            other.die()
            began = time.monotonic()
            assert storage.turn.take(60)
            assert time.monotonic() - began < DEAD_SECONDS

    def test_inside_the_turn_the_newest_commit_is_visible_and_stays_it(self) -> None:
        with self.fresh() as storage, self.another(storage) as other:
            for n in range(20):
                other.commit({b"n": b"%d" % n})
                assert storage.turn.take(10)
                with storage.snapshot() as snapshot:
                    assert snapshot.get(b"n") == b"%d" % n
                    assert snapshot.mark == storage.mark()
                storage.turn.give_back()

    def test_a_commit_waits_for_the_turn_of_another(self) -> None:
        with self.fresh({b"a": b"1"}) as storage, self.another(storage) as other:
            assert storage.turn.take(1)
            thread = threading.Thread(target=other.commit, args=[{b"a": b"2"}])
            thread.start()
            thread.join(0.1)
            assert thread.is_alive() and read_all(storage) == {b"a": b"1"}
            storage.turn.give_back()
            thread.join(60)
            assert read_all(storage) == {b"a": b"2"}

    def test_openers_that_read_and_write_in_turns_lose_nothing(self) -> None:
        with self.fresh() as storage, self.another(storage) as one, self.another(storage) as two:
            mark = storage.mark()
            others = [threading.Thread(target=each.count_up, args=[50]) for each in (one, two)]
            for thread in others:
                thread.start()
            LocalOpener(storage).count_up(50)
            for thread in others:
                thread.join(60)
            assert read_all(storage) == {_COUNTER: b"150"}
            assert storage.mark() == mark + 150

    def test_any_other_right_is_had_by_one_opener_and_ends_with_it(self) -> None:
        with self.fresh() as storage, self.another(storage) as other:
            assert other.claim("engine", 1.0)
            mine, second = storage.claim("engine"), storage.claim("second")
            assert not mine.take(0.0) and not mine.mine
            assert second.take(0.0) and storage.turn.take(1.0)
            storage.turn.give_back()
            other.die()
            began = time.monotonic()
            assert mine.take(60) and mine.take(0)
            assert time.monotonic() - began < DEAD_SECONDS
            with self.another(storage) as third:
                assert not third.claim("engine", 0.0)
                mine.give_back()
                mine.give_back()
                assert third.claim("engine", 10.0)
            second.give_back()

    # ---- the fence

    def test_a_commit_decided_on_an_older_state_is_refused(self) -> None:
        with self.fresh({b"a": b"1"}) as storage, self.another(storage) as other:
            mark, theirs = storage.mark(), other.mark()
            storage.commit({b"a": b"2"}, mark)
            with raises(CommitStaleError) as raised:
                storage.commit({b"a": b"3", b"b": b"3"}, mark)
            assert "begin the transaction again" in str(raised.error)
            with raises(CommitStaleError):
                other.commit({b"a": b"4"}, theirs)
            assert read_all(storage) == {b"a": b"2"}
            assert storage.mark() == mark + 1
            storage.commit({b"a": b"5"}, mark + 1)
            other.commit({b"c": b"5"}, other.mark())
            assert read_all(storage) == {b"a": b"5", b"c": b"5"}


def _has_turn(storage: Storage) -> bool:
    return storage.turn.mine


def main(opens: str, path: str) -> None:
    """The other end of ``ProcessOpener``."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, _, name = opens.partition(":")
    opener = LocalOpener(getattr(importlib.import_module(module), name)(path))
    pickle.dump((True, None), answers)
    answers.flush()
    while True:
        try:
            asked, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = True, getattr(opener, asked)(*arguments)
        except Exception as error:
            answer = False, error
        pickle.dump(answer, answers)
        answers.flush()
        if asked == "close":
            return


if __name__ == "__main__":
    main(*sys.argv[1:])


__all__ = ["DEAD_SECONDS", "LocalOpener", "Opener", "ProcessOpener", "SeveralOpeners"]
