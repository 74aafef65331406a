"""Contract suites: the promises of each seam as tests, run by every implementation of it.

Use one by inheriting: ``class TestMine(StorageContract)`` with ``make_storage``; pytest collects
the tests. The suites use plain asserts, so importing them needs no pytest. A backend that lacks an
ability says so with a flag, never by overriding a test with nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

from entidb.errors import DatabaseClosedError, StorageError
from entidb.storage import Storage
from entidb.storage.base import KEY_BYTES_MAX
from entidb.storage.picking import picking

#: Seconds after which a thread of a contract counts as stuck.
STUCK_SECONDS = 60


class _Raised:
    error: BaseException | None = None


@contextlib.contextmanager
def raises(
    kind: type[BaseException] | tuple[type[BaseException], ...],
) -> Iterator[_Raised]:
    """The block must raise ``kind``; what it raised is in ``.error`` afterwards."""
    raised = _Raised()
    try:
        yield raised
    except kind as error:
        raised.error = error
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    raise AssertionError(f"{' or '.join(each.__name__ for each in kinds)} was not raised")


def read_all(storage: Storage) -> dict[bytes, bytes]:
    with storage.snapshot() as snapshot:
        return dict(snapshot.scan(b"", b"\xff" * (KEY_BYTES_MAX + 1)))


class StorageContract:
    """The promises of ``entidb.storage.base``."""

    #: False: no ``backup``, and nothing is left to open after ``close``.
    supports_files = True

    def make_storage(self) -> Storage:
        """A new, empty store; ``fresh`` closes it."""
        raise NotImplementedError("a contract needs make_storage")

    def reopen(self, storage: Storage) -> Storage:
        """Close ``storage`` and open the same files again."""
        raise NotImplementedError("supports_files needs reopen")

    def open_path(self, path: str) -> Storage:
        """Open the store at ``path``, such as a backup."""
        raise NotImplementedError("supports_files needs open_path")

    @contextlib.contextmanager
    def fresh(self, records: dict[bytes, bytes] | None = None) -> Iterator[Storage]:
        storage = self.make_storage()
        try:
            storage.commit(records or {})
            yield storage
        finally:
            storage.close()

    # ---- reading back

    def test_what_was_committed_is_read_back(self) -> None:
        with self.fresh({b"a": b"1", b"b": b""}) as storage, storage.snapshot() as snapshot:
            assert snapshot.get(b"a") == b"1"
            assert snapshot.get(b"b") == b""

    def test_a_missing_key_reads_as_none(self) -> None:
        with self.fresh({b"b": b"1"}) as storage, storage.snapshot() as snapshot:
            assert [snapshot.get(key) for key in (b"a", b"", b"bb", b"k" * 512)] == [None] * 4

    def test_writing_again_replaces_the_value(self) -> None:
        with self.fresh({b"a": b"long enough to shrink"}) as storage:
            storage.commit({b"a": b"2"})
            assert read_all(storage) == {b"a": b"2"}

    def test_a_deleted_key_is_gone(self) -> None:
        with self.fresh({b"a": b"1", b"b": b"2"}) as storage:
            storage.commit({b"a": None})
            assert read_all(storage) == {b"b": b"2"}

    def test_deleting_what_is_not_there_does_nothing(self) -> None:
        with self.fresh({b"a": b"1"}) as storage:
            storage.commit({b"b": None, b"c": b"3"})
            assert read_all(storage) == {b"a": b"1", b"c": b"3"}

    def test_an_empty_batch_does_nothing(self) -> None:
        with self.fresh({b"a": b"1"}) as storage:
            storage.commit({})
            assert read_all(storage) == {b"a": b"1"}

    def test_values_of_megabytes_and_keys_of_511_bytes_fit(self) -> None:
        records = {b"k" * KEY_BYTES_MAX: os.urandom(3_000_000), b"\x00": bytes(4096)}
        with self.fresh(records) as storage:
            assert read_all(storage) == records

    def test_many_records_in_one_commit_keep_their_order(self) -> None:
        records = {(n * 7919 % 5003).to_bytes(4, "big"): b"%d" % n for n in range(5003)}
        with self.fresh(records) as storage, storage.snapshot() as snapshot:
            assert snapshot.scan(b"", b"\xff") == sorted(records.items())

    # ---- many at once

    def test_get_many_answers_position_by_position(self) -> None:
        with self.fresh({b"a": b"1", b"c": b"3"}) as storage, storage.snapshot() as snapshot:
            keys = [b"c", b"x", b"a", b"c", b"b", b"a"]
            assert snapshot.get_many(keys) == [b"3", None, b"1", b"3", None, b"1"]

    def test_get_many_of_present_duplicates_repeats_them(self) -> None:
        with self.fresh({b"a": b"1", b"c": b"3"}) as storage, storage.snapshot() as snapshot:
            assert snapshot.get_many([b"a", b"a", b"c"]) == [b"1", b"1", b"3"]

    def test_get_many_of_nothing_is_nothing(self) -> None:
        with self.fresh({b"a": b"1"}) as storage, storage.snapshot() as snapshot:
            assert snapshot.get_many([]) == []

    def test_get_many_takes_keys_that_cannot_exist(self) -> None:
        with self.fresh({b"a": b"1"}) as storage, storage.snapshot() as snapshot:
            assert snapshot.get_many([b"a", b"", b"k" * 600, b"a"]) == [b"1", None, None, b"1"]

    def test_get_many_of_neighbours_and_of_others(self) -> None:
        records = {n.to_bytes(4, "big"): b"%d" % n for n in range(0, 400, 2)}
        there, every = sorted(records), [n.to_bytes(4, "big") for n in range(410)]
        with self.fresh(records) as storage, storage.snapshot() as snapshot:
            for keys in (
                there,
                there[::-1],
                there[100:],
                there[:50] + there[51:],
                there[:50] + there[49:],
                every,
                every[1:],
                [*there, b"\xff", there[0]],
            ):
                assert snapshot.get_many(keys) == [records.get(key) for key in keys]

    # ---- ranges

    def test_a_scan_includes_start_and_excludes_stop(self) -> None:
        records = {bytes([n]): b"%d" % n for n in range(1, 9)}
        with self.fresh(records) as storage, storage.snapshot() as snapshot:
            assert snapshot.scan_keys(b"\x02", b"\x05") == [b"\x02", b"\x03", b"\x04"]
            assert snapshot.scan(b"\x02", b"\x04") == [(b"\x02", b"2"), (b"\x03", b"3")]

    def test_proved_keys_are_the_same_with_and_without_values(self) -> None:
        for values in ((b"", b"", b""), (b"", b"1", b""), (b"1", b"2", b"3")):
            records = dict(zip((b"a", b"b", b"c"), values, strict=True))
            with self.fresh(records) as storage, storage.snapshot() as snapshot:
                assert snapshot.scan_keys(b"a", b"z", proved=True) == [b"a", b"b", b"c"]
                assert snapshot.scan_keys(b"b", b"z", limit=1, proved=True) == [b"b"]
                assert snapshot.scan_keys(b"d", b"z", proved=True) == []

    def test_of_a_range_those_are_given_that_are_picked(self) -> None:
        records = {bytes([n]): b"%d" % n for n in range(1, 9)}
        with self.fresh(records) as storage, storage.snapshot() as snapshot:
            pick = picking(snapshot)
            seen: list[bytes] = []

            def odd(values: Sequence[bytes]) -> list[int]:
                seen.extend(values)
                return [at for at, value in enumerate(values) if value[0] % 2]

            some = [(b"\x03", b"3"), (b"\x05", b"5")]
            assert pick(b"\x02", b"\x09", 4, odd) == (some, b"\x05")
            assert [value[:1] for value in seen] == [b"2", b"3", b"4", b"5"]
            assert pick(b"\x06", b"\x09", 4, odd) == ([(b"\x07", b"7")], None)
            assert pick(b"\x08", b"\x09", 1, odd) == ([], b"\x08")
            assert pick(b"\x09", b"\x0a", 4, odd) == ([], None)
            assert pick(b"\x05", b"\x05", 4, odd) == ([], None)

    def test_a_scan_backwards_starts_below_stop(self) -> None:
        records = {bytes([n]): b"%d" % n for n in range(1, 9)}
        with self.fresh(records) as storage, storage.snapshot() as snapshot:
            assert snapshot.scan_keys(b"\x02", b"\x05", reverse=True) == [b"\4", b"\3", b"\2"]
            assert snapshot.scan(b"", b"\xff", reverse=True, limit=1) == [(b"\x08", b"8")]

    def test_scan_bounds_need_not_exist(self) -> None:
        with self.fresh({b"b": b"1", b"d": b"2"}) as storage, storage.snapshot() as snapshot:
            for reverse in (False, True):
                assert snapshot.scan_keys(b"a", b"c", reverse=reverse) == [b"b"]
                assert snapshot.scan_keys(b"e", b"z", reverse=reverse) == []
                assert snapshot.scan_keys(b"", b"a", reverse=reverse) == []

    def test_an_empty_or_backward_range_is_empty(self) -> None:
        with self.fresh({b"b": b"1"}) as storage, storage.snapshot() as snapshot:
            assert snapshot.scan(b"b", b"b") == []
            assert snapshot.scan(b"c", b"a", reverse=True) == []

    def test_a_limit_bounds_a_scan_at_any_size(self) -> None:
        records = {n.to_bytes(2, "big"): b"" for n in range(6000)}
        keys = sorted(records)
        with self.fresh(records) as storage, storage.snapshot() as snapshot:
            for limit in (0, 1, 31, 32, 33, 160, 161, 5999, 6000, 9000):
                assert snapshot.scan_keys(b"", b"\xff", limit=limit) == keys[:limit]
                back = snapshot.scan_keys(b"", b"\xff", limit=limit, reverse=True)
                assert back == keys[::-1][:limit]

    def test_scan_bounds_longer_than_any_key_work(self) -> None:
        longest = b"k" * KEY_BYTES_MAX
        with self.fresh({longest: b"1", b"l": b"2"}) as storage, storage.snapshot() as snapshot:
            for reverse in (False, True):
                assert snapshot.scan_keys(longest + b"x", b"z", reverse=reverse) == [b"l"]
                assert snapshot.scan_keys(b"a", longest + b"x", reverse=reverse) == [longest]

    def test_an_empty_store_scans_as_empty(self) -> None:
        with self.fresh() as storage, storage.snapshot() as snapshot:
            assert snapshot.scan(b"", b"\xff") == snapshot.scan(b"", b"\xff", reverse=True) == []

    # ---- atomic and isolated

    def test_a_snapshot_never_changes(self) -> None:
        with self.fresh({b"a": b"1", b"b": b"1"}) as storage, storage.snapshot() as before:
            storage.commit({b"a": b"2", b"b": None, b"c": b"3"})
            assert before.scan(b"", b"\xff") == [(b"a", b"1"), (b"b", b"1")]
            assert before.get_many([b"a", b"b", b"c"]) == [b"1", b"1", None]
            assert read_all(storage) == {b"a": b"2", b"c": b"3"}

    def test_each_snapshot_keeps_its_own_state(self) -> None:
        with self.fresh() as storage, contextlib.ExitStack() as stack:
            taken = []
            for n in range(10):
                storage.commit({b"n": b"%d" % n})
                taken.append(stack.enter_context(storage.snapshot()))
            assert [snapshot.get(b"n") for snapshot in taken] == [b"%d" % n for n in range(10)]

    def test_a_batch_that_is_refused_changes_nothing(self) -> None:
        for bad in (b"", b"k" * (KEY_BYTES_MAX + 1)):
            with self.fresh({b"a": b"1"}) as storage:
                with raises(StorageError) as raised:
                    storage.commit({b"a": b"2", b"b": b"2", bad: b"x", b"z": b"2"})
                assert "1 to 511 bytes" in str(raised.error)
                assert read_all(storage) == {b"a": b"1"}

    def test_the_store_goes_on_after_a_refused_batch(self) -> None:
        with self.fresh() as storage:
            with raises(StorageError):
                storage.commit({b"": b"x"})
            storage.commit({b"a": b"1"})
            assert read_all(storage) == {b"a": b"1"}

    def test_readers_beside_a_writer_see_whole_commits_in_order(self) -> None:
        keys = [b"%03d" % n for n in range(50)]
        with self.fresh(dict.fromkeys(keys, b"0")) as storage:
            faults = _read_beside(
                storage, keys, lambda n: storage.commit(dict.fromkeys(keys, b"%d" % n))
            )
            assert faults == []

    def test_readers_beside_refused_batches_hold_nobody_up(self) -> None:
        keys = [b"%03d" % n for n in range(50)]
        with self.fresh(dict.fromkeys(keys, b"0")) as storage:

            def write(n: int) -> None:
                with raises(StorageError):
                    storage.commit({b"000": b"x", b"k" * 600: b"y"})
                storage.commit(dict.fromkeys(keys, b"%d" % n))

            assert _read_beside(storage, keys, write) == []

    def test_a_snapshot_may_be_closed_by_another_thread(self) -> None:
        with self.fresh({b"a": b"1"}) as storage:
            snapshot = storage.snapshot()
            thread = threading.Thread(target=snapshot.close)
            thread.start()
            thread.join(STUCK_SECONDS)
            assert storage.info().readers == 0

    def test_a_forgotten_snapshot_is_closed_by_the_collector(self) -> None:
        with self.fresh({b"a": b"1"}) as storage:
            assert storage.snapshot().get(b"a") == b"1"
            assert storage.info().readers == 0

    # ---- the end

    def test_a_closed_store_refuses_everything(self) -> None:
        with self.fresh({b"a": b"1"}) as storage:
            storage.close()
            storage.close()
            for use in (storage.snapshot, storage.info, storage.compact):
                with raises(DatabaseClosedError):
                    use()
            for batch in ({}, {b"a": b"2"}):
                with raises(DatabaseClosedError):
                    storage.commit(batch)

    def test_a_snapshot_of_a_closed_store_refuses_to_read(self) -> None:
        with self.fresh({b"a": b"1"}) as storage:
            snapshot = storage.snapshot()
            storage.close()
            with raises(DatabaseClosedError):
                snapshot.get(b"a")
            with raises(DatabaseClosedError):
                snapshot.scan(b"", b"\xff")
            snapshot.close()

    def test_a_closed_snapshot_refuses_to_read(self) -> None:
        with self.fresh({b"a": b"1"}) as storage:
            snapshot = storage.snapshot()
            snapshot.close()
            snapshot.close()
            with raises(DatabaseClosedError):
                snapshot.get_many([b"a"])
            with raises(DatabaseClosedError):
                snapshot.get(b"a")

    # ---- care

    def test_a_sound_store_verifies_and_counts_its_records(self) -> None:
        with self.fresh({b"%d" % n: b"x" * n for n in range(300)}) as storage:
            storage.commit({b"7": None})
            assert list(storage.verify()) == []
            assert storage.info().records == 299

    def test_compacting_keeps_every_record(self) -> None:
        records = {b"%05d" % n: b"x" * 100 for n in range(3000)}
        with self.fresh(records) as storage:
            storage.commit(dict.fromkeys(sorted(records)[10:]))
            storage.compact()
            assert read_all(storage) == dict(sorted(records.items())[:10])
            storage.commit({b"after": b"1"})
            assert list(storage.verify()) == []

    def test_a_backup_holds_one_state_with_the_changes_on_top(self) -> None:
        with tempfile.TemporaryDirectory() as folder, self.fresh({b"a": b"1", b"b": b"1"}) as store:
            path = os.path.join(folder, "backup")
            if not self.supports_files:
                with raises(StorageError):
                    store.backup(path)
                assert not os.path.exists(path)
                return
            store.backup(path, [(b"b", None), (b"c", b"3")])
            assert read_all(store) == {b"a": b"1", b"b": b"1"}
            with contextlib.closing(self.open_path(path)) as copy:
                assert read_all(copy) == {b"a": b"1", b"c": b"3"}
                assert list(copy.verify()) == []
            with raises(StorageError):
                store.backup(path)
            assert os.listdir(folder) == ["backup"]

    def test_what_was_committed_is_there_after_opening_again(self) -> None:
        if not self.supports_files:
            with self.fresh() as storage:
                assert storage.info().path is None
            return
        with self.fresh({b"a": b"1"}) as storage:
            storage.commit({b"b": b"2"})
            again = self.reopen(storage)
            try:
                assert read_all(again) == {b"a": b"1", b"b": b"2"}
            finally:
                again.close()


def _read_beside(
    storage: Storage, keys: list[bytes], write: Callable[[int], object], commits: int = 60
) -> list[str]:
    """Four threads read while this one calls ``write`` with 1, 2, …; the faults they saw."""
    faults: list[str] = []
    done = threading.Event()

    def read() -> None:
        last = 0
        try:
            while not done.is_set():
                with storage.snapshot() as snapshot:
                    values = snapshot.get_many(keys)
                    scanned = [value for _, value in snapshot.scan(keys[0], keys[-1] + b"\0")]
                if len(set(values)) != 1 or scanned != values:
                    faults.append(f"part of a commit: {set(values)}")
                if int(values[0] or b"-1") < last:
                    faults.append(f"{values[0]!r} after {last}")
                last = int(values[0] or b"-1")
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()

    def write_all() -> None:
        try:
            for n in range(1, commits):
                write(n)
        except BaseException as error:
            faults.append(f"{type(error).__name__} in the writer: {error}")

    writer = threading.Thread(target=write_all, daemon=True)
    writer.start()
    writer.join(STUCK_SECONDS)
    done.set()
    for thread in threads:
        thread.join(STUCK_SECONDS)
    if writer.is_alive() or any(thread.is_alive() for thread in threads):
        faults.append("a thread is stuck")
    return faults
