"""Spacers: rows that keep regions of keys on pages of their own.

A region grows at its end. Where its last page holds the first rows of the next region, every split
is one in the middle, and leaves a page behind that stays half empty; at the end of a page a split
leaves it full.

Not here: which regions there are (``db``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: What a row takes of a page beside key and value: LMDB's head of a row (8) and its place (2), our
#: checksum (4), and half of the page's own head (8).
_ROW_OVERHEAD_BYTES: Final = 22
_NUMBER_BYTES: Final = 16
#: Bytes of half a page for each short row, which takes 43: all of them fill four tenths of a page.
_SHARE: Final = 50


def half_page(page_bytes: int) -> int:
    """What a key and its value may take for two such rows to share a page of ``page_bytes`` and
    leave no room on it."""
    return page_bytes // 2 - _ROW_OVERHEAD_BYTES


def spacers(
    regions: Sequence[bytes], page_bytes: int
) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """The rows to store before all others, and those they become with the next commit.

    At first there are two rows for each region, and the second takes half a page: so it does not
    fit behind the region before it, and begins a page together with the first. That done, many
    short ones keep the page so full that the store does not join it with the one before when what
    is behind them leaves. One long row would do that too, but rows that leave in great numbers can
    bring it to where others grow, and there it would be in the way of every page; of short ones a
    split has little to fear."""
    half = half_page(page_bytes)
    short = [key for region in regions for key in _keys(region, half // _SHARE)]
    first = {key: b"" for region in regions for key in _keys(region, 2)}
    for region in regions:
        key = _keys(region, 2)[1]
        first[key] = bytes(half - len(key))
    return first, dict.fromkeys(short, b"")


def _keys(region: bytes, count: int) -> list[bytes]:
    return [region + n.to_bytes(_NUMBER_BYTES, "big") for n in range(count)]
