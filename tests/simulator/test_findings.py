"""What the simulator has found and nobody has mended yet: each fails, and says so when it does not.

Once mended, a test moves to the rules it belongs to, and its seed to ``test_regressions``.
"""

from __future__ import annotations

import contextlib

import pytest

from entidb.errors import SyncStateError
from entidb.protocol import PullRequest, SyncRequest
from tests.support import Device, World, assert_sound


@pytest.mark.xfail(strict=True, reason="the answer opens a stage of its own and loses its table")
def test_r31_a_scope_narrowed_while_a_widening_pulls_changes_leaves_no_table_behind() -> None:
    world = World()
    a = world.device()
    a.db.declare_local("drafts")
    world.put(("notes", 1, "x"))
    a.sync()
    a.db.declare_local("drafts", False)

    def during_pulls(request: SyncRequest) -> None:
        if isinstance(request, PullRequest) and len(a.wire.pulls()) == before + 1:
            world.put(("notes", 2, "y"))
        if isinstance(request, PullRequest) and len(a.wire.pulls()) == before + 2:
            # "drafts" has come in; what changed in the others since is on its way.
            a.db.declare_local("drafts")

    before = len(a.wire.pulls())
    a.wire.after = during_pulls
    with contextlib.suppress(SyncStateError):
        a.sync()
    a.settle()
    assert_sound(a.db, world.server)


def widen_after_adopting(device: Device, names: list[str]) -> None:
    """Another thread widens the scope when the cycle has just looked for what to make pending."""
    adopt = device.engine.applier.adopt
    once = [True]

    def adopt_and_widen() -> bool:
        more = adopt()
        if not more and once:
            once.clear()
            device.db.set_scope(names)
        return more

    device.engine.applier.adopt = adopt_and_widen  # type: ignore[method-assign]


@pytest.mark.xfail(strict=True, reason="the page is applied before what it meets is made pending")
def test_r31_what_was_written_outside_a_scope_survives_a_first_pull_that_brings_the_same() -> None:
    world = World()
    world.put(("tasks", 1, "theirs"))
    a = world.device(collections=("notes",))
    a.put(("tasks", 1, "mine"))
    widen_after_adopting(a, ["notes", "tasks"])
    a.sync()
    a.settle()
    mine = [payload for gone in a.engine.discarded() for _, _, payload in gone.operations]
    assert a.values("tasks") == {1: "mine"} or mine, "R4: it is gone without a trace"


@pytest.mark.xfail(strict=True, reason="what was local is made pending on top of what was pulled")
def test_r31_widening_before_a_pull_of_a_cycle_meets_what_the_server_has_as_a_conflict() -> None:
    world = World()
    a = world.device(collections=("notes",))
    a.sync()
    world.put(("tasks", 1, "theirs"), ("notes", 1, "x"))
    a.sync()
    a.put(("tasks", 1, "mine"))
    widen_after_adopting(a, ["notes", "tasks"])
    result = a.sync()
    a.settle()
    assert [r.conflict.kind for r in result.conflicts] == ["create/create"]
    assert world.values("tasks") == {1: "theirs"}
