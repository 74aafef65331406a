"""What a store puts on its disk for a batch, whether it has few records or many."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb.errors import StorageError
from entidb.storage import checksums
from entidb.storage.base import KEY_BYTES_MAX
from entidb.storage.checksums import RESIDUE, stage

keys = st.binary(min_size=1, max_size=KEY_BYTES_MAX)
batches = st.dictionaries(keys, st.none() | st.binary(max_size=300), max_size=60)


@given(batches)
def test_many_records_are_staged_as_few_are(batch: Mapping[bytes, bytes | None]) -> None:
    puts, deletes = stage(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "_FEW", 1000)
        few, few_deletes = stage(batch)
        pairs = list(few)
    assert list(puts) == pairs and deletes == few_deletes
    assert list(puts) == pairs, "a commit that has to be begun again writes the same"
    assert len(puts) == len(few) == len(pairs)
    assert [key for key, _ in pairs] == sorted(
        key for key, value in batch.items() if value is not None
    )
    assert all(crc32(value, crc32(key)) == RESIDUE for key, value in pairs)


@pytest.mark.parametrize("others", [0, 100])
@pytest.mark.parametrize("key", [b"", bytes(KEY_BYTES_MAX + 1)])
def test_a_key_that_cannot_be_stored_is_refused_among_few_and_many(others: int, key: bytes) -> None:
    batch = {b"%d" % number: b"x" for number in range(others)} | {key: b"x"}
    with pytest.raises(StorageError, match="cannot be stored"):
        stage(batch)


@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("others", [0, 100])
def test_a_value_that_cannot_be_stored_is_refused_among_few_and_many(
    others: int, gone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_VALUE_BYTES_MAX", 3)
    batch: dict[bytes, bytes | None] = {b"%d" % number: b"xxx" for number in range(others)}
    batch |= {b"gone%d" % number: None for number in range(gone)}
    stage(batch)
    with pytest.raises(StorageError, match="split it"):
        stage(batch | {b"long": b"xxxx"})
