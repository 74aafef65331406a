"""How much work one push may be: counted in arrays, maps and items, before anything is decoded.

An empty list is one byte in a message, less than a thousandth of one packed, and a microsecond of
everybody's time once it is decoded. So bytes alone bound nothing. What is too much in one value or
one transaction is that transaction's verdict (R15), and devices refuse it at the commit; only a
request of several transactions that are too much together is to be cut smaller as a whole.
"""

from __future__ import annotations

from typing import Final

from entidb import cbor
from entidb.errors import ProtocolError
from entidb.protocol import PushRequest, PushTransaction
from entidb.types import TRANSACTION_CONTAINERS_MAX, VALUE_CONTAINERS_MAX

#: What is wrong with one transaction: code and message.
Fault = tuple[str, str]

#: Arrays and maps in all values of a push of more than one transaction.
PUSH_CONTAINERS_MAX: Final = 2 * TRANSACTION_CONTAINERS_MAX


def too_much(request: PushRequest) -> dict[bytes, Fault]:
    """What is too much work in ``request``, by the id of the transaction.

    Raises ``ProtocolError`` (too_large) if its transactions are too much together. Costs next to
    nothing where no value is large, and they are not many bytes together.
    """
    transactions = request.transactions
    sizes = [
        len(op.payload) for each in transactions for op in each.operations if op.payload is not None
    ]
    size, largest = sum(sizes), max(sizes, default=0)
    if largest <= VALUE_CONTAINERS_MAX and size <= TRANSACTION_CONTAINERS_MAX:
        return {}
    faults: dict[bytes, Fault] = {}
    left: list[bytes] = []
    together = 0
    for transaction in transactions:
        fault = _fault_of_values(transaction)
        if fault is None:
            payloads = [op.payload for op in transaction.operations if op.payload is not None]
            count = _containers(payloads)
            if count is not None:
                together += count
                left += payloads
                continue
            fault = (
                "too_large",
                f"its values have more than {TRANSACTION_CONTAINERS_MAX} maps and lists together",
            )
        faults[transaction.transaction_id] = fault
    if (
        together > PUSH_CONTAINERS_MAX
        and len(transactions) - len(faults) > 1
        and cbor.containers_together(left, PUSH_CONTAINERS_MAX) is None
    ):
        raise ProtocolError(
            f"the values of this push have more than {PUSH_CONTAINERS_MAX} maps and lists "
            "together: send fewer transactions at a time",
            code="too_large",
        )
    return faults


def _containers(payloads: list[bytes]) -> int | None:
    if sum(map(len, payloads)) <= TRANSACTION_CONTAINERS_MAX:
        # An estimate that is never too low, at the speed of a search.
        return sum(map(cbor.containers_at_most, payloads))
    return cbor.containers_together(payloads, TRANSACTION_CONTAINERS_MAX)


def _fault_of_values(transaction: PushTransaction) -> Fault | None:
    for op in transaction.operations:
        reason = None if op.payload is None else cbor.too_much(op.payload)
        if reason is not None:
            return "codec_error", f"its entity {op.entity_id.hex()} has {reason}"
    return None
