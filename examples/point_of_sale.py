"""Two tills in one shop, both offline, both selling: stock that adds up, and a rule it must keep.

    python examples/point_of_sale.py

A sale is one transaction: a receipt, and less stock. Stock is merged as a counter, so two offline
sales of the same article both count. The server checks every transaction before it accepts it:
stock may not fall below zero. A sale it refuses is taken back whole on the till that made it, with
the receipt, and is kept in that till's discarded list with the reason.
"""

from __future__ import annotations

import uuid

from entidb import Database, HttpTransport, LoopbackClient, SyncConfig, SyncEngine, SyncServer
from entidb.server import Refusal, ValidateContext, ValidateTransaction
from entidb.sync import Merge

CONFIG = SyncConfig(
    db_id="shop",
    client="point-of-sale-example",
    policies={"stock": Merge(counters=("quantity",))},
)


def validate(context: ValidateContext, transaction: ValidateTransaction) -> Refusal | None:
    """The server's rule. It sees the transaction as it would be accepted, and may read the state
    it would be accepted on through ``context.get``."""
    for operation in transaction.operations:
        value = operation.value  # None if it deletes
        if operation.collection == "stock" and value is not None and value["quantity"] < 0:
            before = context.get("stock", operation.entity_id)
            left = 0 if before is None else before["quantity"]
            return Refusal("out_of_stock", f"only {left} of {value['name']!r} left")
    return None


class Till:
    """One till: a database of its own, and an engine that nobody has to wait for."""

    def __init__(self, name: str, server: SyncServer) -> None:
        self.name = name
        self.db = Database.in_memory()
        # A loopback client is a server in the same process; a shop would give a URL instead.
        transport = HttpTransport("http://localhost", client=LoopbackClient(server))
        self.engine = SyncEngine(CONFIG, transport, self.db)

    def deliver(self, name: str, quantity: int) -> uuid.UUID:
        return self.db.collection("stock").add({"name": name, "quantity": quantity})

    def sell(self, article: uuid.UUID, quantity: int) -> None:
        """Works without a network. The receipt and the stock change go together, or not at all."""
        with self.db.transaction() as tx:
            stock = tx.collection("stock")
            value = stock[article]
            value["quantity"] -= quantity
            stock[article] = value
            receipt = {"till": self.name, "article": value["name"], "quantity": quantity}
            tx.collection("receipts").add(receipt)
        print(f"{self.name}: sold {quantity} of {value['name']!r}, {value['quantity']} left here")

    def sync(self) -> None:
        result = self.engine.sync()
        print(f"{self.name}: sync pushed {result.pushed}, pulled {result.pulled}")
        for resolved in result.conflicts:
            conflict, merged = resolved.conflict, resolved.resolution.value
            print(
                f"  {merged['name']!r}: was {conflict.base['quantity']}, here "
                f"{conflict.local['quantity']}, on the server {conflict.remote['quantity']}: "
                f"together {merged['quantity']}"
            )
        for withdrawn in self.engine.discarded():
            print(f"  refused ({withdrawn.code}): {withdrawn.message}; taken back:")
            for collection, _, value in withdrawn.values():
                print(f"    {collection}: {value}")
            # The cashier has seen it; until then it stays in the list, also over restarts.
            self.engine.prune(withdrawn)

    def quantity(self, article: uuid.UUID) -> int:
        left: int = self.db.collection("stock")[article]["quantity"]
        return left


def main() -> None:
    with SyncServer.in_memory(validate=validate) as server:
        left, right = Till("left till", server), Till("right till", server)
        tea = left.deliver("tea", 5)
        cake = left.deliver("cake", 1)
        left.sync()
        right.sync()

        print("\nBoth tills lose the network and sell one tea each. Both write 4.")
        left.sell(tea, 1)
        right.sell(tea, 1)
        print("The network is back.")
        left.sync()
        right.sync()
        left.sync()
        assert left.quantity(tea) == right.quantity(tea) == 3, "two sales, three left"

        print("\nOffline again, and both sell the last cake.")
        left.sell(cake, 1)
        right.sell(cake, 1)
        print("The network is back.")
        left.sync()
        right.sync()
        left.sync()
        assert left.quantity(cake) == right.quantity(cake) == 0, "nobody sold what is not there"
        receipts = list(server.database("shop").collection("receipts").values())
        print(
            f"\nOn the server: tea {left.quantity(tea)}, cake {left.quantity(cake)}, and receipts:"
        )
        for receipt in receipts:
            print(f"  {receipt}")
        assert len(receipts) == 3, "the refused sale left no receipt behind"
        for till in (left, right):
            till.engine.close()
            till.db.close()


if __name__ == "__main__":
    main()
