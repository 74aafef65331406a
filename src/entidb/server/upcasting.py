"""What an older program pushes, in its newest shape (R33). Nothing is stored here."""

from __future__ import annotations

import logging
from typing import Any

from entidb import cbor
from entidb.errors import CodecError
from entidb.protocol import PushRequest, PushTransaction
from entidb.server.hooks import Schema
from entidb.types import TRANSACTION_BYTES_MAX

_log = logging.getLogger("entidb.server")
#: An upcast may make an entity larger by so much.
_GROWTH_BYTES_MAX = TRANSACTION_BYTES_MAX // 16


def upcast_all(
    schema: Schema, request: PushRequest, transaction: PushTransaction, values: list[Any]
) -> list[bytes | None] | None:
    """The payloads to store for each operation of ``transaction``, whose ``values`` become those
    of the payloads; None where they are the ones that were pushed."""
    made: list[bytes | None] = []
    for index, op in enumerate(transaction.operations):
        payload = op.payload
        if payload is not None:
            name = request.collections[op.collection]
            values[index], payload = _upcast(schema, name, values[index], payload, request.schema)
        made.append(payload)
    return None if made == [op.payload for op in transaction.operations] else made


def _upcast(
    schema: Schema, collection: str, value: Any, payload: bytes, said: int
) -> tuple[Any, bytes]:
    """Work that was done with an old program is always taken: where the hook raises, or answers
    what no entity can be, it is stored as it came, and read like all that was written before."""
    assert schema.upcast is not None, "asked only where there is a hook"
    try:
        # A value of its own, so that a hook which fails halfway has changed nothing.
        made = schema.upcast(collection, cbor.decode_trusted(payload), said)
        encoded = cbor.encode(made)
    except CodecError as error:
        _log.error(
            "upcast of an entity of %r is no value: %s; stored as it came", collection, error
        )
        return value, payload
    except KeyboardInterrupt:
        raise
    except BaseException:  # also SystemExit, which would end the thread that commits
        _log.exception("upcast raised at an entity of %r; stored as it came", collection)
        return value, payload
    if made is None or len(encoded) > len(payload) + _GROWTH_BYTES_MAX:
        what = "None" if made is None else f"{len(encoded)} bytes"
        _log.error("upcast of an entity of %r is %s; stored as it came", collection, what)
        return value, payload
    return made, encoded
