"""What a clock that was given says later is believed as long as it can be stored."""

from __future__ import annotations

import pytest

from entidb import Database, SyncConfig, SyncEngine
from entidb.server import SyncServer
from entidb.sync import HttpTransport, LoopbackClient
from entidb.types import SystemClock, datetime_of
from tests.server.support import NOW_MS

HOUR_MS = 3_600_000


class Wrong(SystemClock):
    def __init__(self) -> None:
        self.says: object = NOW_MS

    def now_ms(self) -> int:
        return self.says  # type: ignore[return-value]


@pytest.mark.parametrize("says", [2**48, 2**63, 10**30, 253_402_300_800_000, -5, 1.5, None, "now"])
def test_what_is_no_time_that_can_be_stored_is_passed_over(
    says: object, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Wrong()
    with SyncServer.in_memory(clock=clock) as server, Database.in_memory(clock=clock) as database:
        transport = HttpTransport("http://localhost", client=LoopbackClient(server), clock=clock)
        with SyncEngine(SyncConfig(db_id="shop"), transport, database, clock=clock) as engine:
            notes = database.collection("notes")
            notes.add({"n": 1})
            engine.sync()
            clock.says = says
            made = notes.add({"n": 2})
            with database.transaction() as tx:
                tx.collection("notes")[made] = {"n": 3}
            assert engine.sync().pushed == 2
            server.database("shop").collection("notes").add({"n": 4})
            server.housekeep()
            assert engine.sync().pulled == 1
            clock.says = NOW_MS + HOUR_MS
            made = notes.add({"n": 5})
            # Nothing of it stays: the newest id and the newest write are of now.
            assert made.int >> 80 == NOW_MS + HOUR_MS
            assert engine.sync().pushed == 1
            for each in (database, server.database("shop")):
                at = datetime_of(each.read_head().timestamp)
                assert at.timestamp() * 1000 == NOW_MS + HOUR_MS
    told = [each for each in caplog.records if "of the clock gives" in each.getMessage()]
    assert 1 <= len(told) <= 4, "once by each part that asks it, and not at each look"


def test_a_time_that_can_be_stored_is_believed_however_far_it_jumps() -> None:
    clock = Wrong()
    with Database.in_memory(clock=clock) as database:
        clock.says = NOW_MS + 70 * 365 * 24 * HOUR_MS
        made = database.collection("notes").add(1)
        assert made.int >> 80 == clock.says
