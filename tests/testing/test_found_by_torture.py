"""What torture runs have found, each as the smallest sequence that shows it."""

from __future__ import annotations

from tests.support import World, assert_in_step


def test_an_equal_deletion_does_not_take_what_an_earlier_transaction_wrote() -> None:
    """Both sides deleted an entity; on this one a transaction before the deletion had written it,
    and the transaction with the deletion was withdrawn for something else it touched."""
    world = World()
    device = world.device(policies={"kept": "client_wins", "strict": "server_wins"})
    world.put(("kept", 1, {"v": 0}), ("strict", 1, {"v": 0}))
    device.settle()
    device.put(("kept", 1, {"v": "mine"}), ("kept", 2, {"v": "whole"}))
    withdrawn = device.put(("kept", 1, None), ("strict", 1, {"v": "mine"}))
    world.put(("kept", 1, None))
    world.put(("strict", 1, {"v": "theirs"}))
    device.settle()
    assert [entry.id for entry in device.engine.discarded()] == [withdrawn]
    assert world.values("kept") == {1: {"v": "mine"}, 2: {"v": "whole"}}
    assert_in_step(world, device)


def test_an_equal_deletion_does_not_let_half_a_transaction_through() -> None:
    """As above, but the transaction with the deletion is done, and settled before the first."""
    world = World()
    device = world.device(policies={"kept": "client_wins"})
    world.put(("kept", 1, {"v": 0}))
    device.settle()
    device.put(("kept", 1, {"v": "mine"}), ("kept", 2, {"v": "whole"}))
    device.put(("kept", 1, None))
    world.put(("kept", 1, None))
    device.settle()
    assert world.server.sequence == 4  # both were decided by the server, the first one whole
    assert world.values("kept") == {2: {"v": "whole"}}
    assert_in_step(world, device)
