"""In which order an imported file had its fields, as canonical CBOR keeps none; of this device
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from entidb import cbor
from entidb.db.core import Core
from entidb.db.records import META_COLUMNS
from entidb.types import check_name

#: Names of the columns of one collection that are worth remembering.
COLUMNS_BYTES_MAX: Final = 64 << 10


def column_order(database: Core, name: str) -> list[str]:
    """The fields of collection ``name`` in the order of a file; empty if it is unknown."""
    with database.view() as view:
        raw = view.get(META_COLUMNS)
    order: list[str] = [] if raw is None else cbor.decode_trusted(raw).get(name, [])
    return order


def keep_column_order(database: Core, name: str, columns: Sequence[str]) -> None:
    """Remember ``columns`` for ``column_order``, in front of those that are known already;
    nothing, where they are more than ``COLUMNS_BYTES_MAX``."""
    check_name(name)
    known = column_order(database, name)
    order = list(dict.fromkeys([*columns, *known]))
    if order == known or len("".join(order).encode()) > COLUMNS_BYTES_MAX:
        return
    with database.write("local") as writer:
        raw = writer.get(META_COLUMNS)
        orders = {} if raw is None else cbor.decode_trusted(raw)
        writer.put(META_COLUMNS, cbor.encode_message({**orders, name: order}))


__all__ = ["column_order", "keep_column_order"]
