"""What a server accepts at most, and what a device accepts from any server."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from entidb.types import COLLECTIONS_MAX, TRANSACTION_BYTES_MAX

Uint = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Limits(Struct, frozen=True, kw_only=True):
    """What the server accepts at most; in the handshake. All byte counts are uncompressed."""

    transaction_bytes_max: Uint
    message_bytes_max: Uint
    push_operations_max: Uint
    pull_operations_max: Uint
    collections_max: Uint
    #: Collections that the database holds; what goes beyond is rejected, transaction by
    #: transaction. Servers before 0.4 do not say, and hold so many.
    database_collections_max: Uint = 1024


#: What a device accepts from any server, and what a server starts from. One transaction of the
#: largest size every server must accept fits into a message, whatever the names and the framing.
LIMITS: Final = Limits(
    transaction_bytes_max=TRANSACTION_BYTES_MAX,
    message_bytes_max=4 * TRANSACTION_BYTES_MAX,
    push_operations_max=100_000,
    pull_operations_max=100_000,
    collections_max=4096,
    database_collections_max=COLLECTIONS_MAX,
)
