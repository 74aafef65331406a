"""What fails: one function for each kind. Each strikes, and returns from when writes are waited for
(``time.monotonic``) and what has to be done when they are back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg.conninfo import make_conninfo

from entidb.errors import EntiDBError
from entidb.testing.failover import Fleet
from entidb.testing.torture_process import TortureFailure
from scripts.patroni_rig.cluster import TTL_S, PatroniCluster, RigFailure

#: Seconds both standbys stay frozen, and a node stays away.
_FROZEN_S: Final = 8.0
_AWAY_S: Final = 1.0
#: Seconds that devices go on after a frozen primary was let go: it still thinks that it leads.
_ZOMBIE_S: Final = 4.0
_CUTS: Final = 8
#: What a round may end with.
FAILED: Final = (RigFailure, TortureFailure, EntiDBError, OSError)


@dataclass
class Rig:
    cluster: PatroniCluster
    fleet: Fleet
    source: random.Random


Mend = Callable[[], None]
Struck = tuple[float, Mend]


def postmaster_killed(rig: Rig) -> Struck:
    """SIGKILL to the postmaster of the primary; Patroni starts it again, or another leads."""
    leader = rig.cluster.leader()
    leader.kill_postmaster()
    return time.monotonic(), _nothing


def machine_gone(rig: Rig) -> Struck:
    """SIGKILL to everything of the primary's machine; it comes back when another leads."""
    leader = rig.cluster.leader()
    leader.kill()
    return time.monotonic(), leader.start


def zombie_primary(rig: Rig) -> Struck:
    """The primary's machine is frozen until another leads, and then goes on as if nothing was."""
    leader = rig.cluster.leader()
    leader.freeze()
    since = time.monotonic()

    def let_go() -> None:
        leader.thaw()
        time.sleep(_ZOMBIE_S)

    return since, let_go


def switchover(rig: Rig) -> Struck:
    """As an operator orders it."""
    leader = rig.cluster.leader()
    (candidate,) = (m.name for m in rig.cluster.members() if m.role == "sync_standby")
    since = time.monotonic()
    said = leader.ask("/switchover", {"leader": leader.name, "candidate": candidate}, 60.0)
    if said is None:
        raise RigFailure("nobody answers the order to switch over")
    return since, _nothing


def standbys_frozen(rig: Rig) -> Struck:
    """Nothing can be acknowledged meanwhile: writes are waited for from when they go on."""
    standbys = rig.cluster.standbys()
    for machine in standbys:
        machine.freeze()
    time.sleep(_FROZEN_S)
    since = time.monotonic()
    for machine in standbys:
        machine.thaw()
    return since, _nothing


def node_killed(rig: Rig) -> Struck:
    """SIGKILL to one of the nodes of EntiDB."""
    number = rig.source.randrange(len(rig.fleet.nodes))
    rig.fleet.kill_node(number)
    since = time.monotonic()

    def come_back() -> None:
        time.sleep(_AWAY_S)
        rig.fleet.start_node(number)

    return since, come_back


def connections_dropped(rig: Rig) -> Struck:
    """All connections of EntiDB end at once, several times in a row; a commit may be under way."""
    for _ in range(_CUTS):
        address = make_conninfo(rig.cluster.address, target_session_attrs="read-write")
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'entidb' AND pid <> pg_backend_pid()"
            )
        since = time.monotonic()
        time.sleep(rig.source.uniform(0.05, 0.4))
    return since, _nothing


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Fault:
    """``limit_s``: seconds within which all devices should write again, where that is promised.
    Writes go on for a while after the fault where ``pauses``, and their pause counts."""

    words: str
    strike: Callable[[Rig], Struck]
    limit_s: float | None = None
    pauses: bool = False


FAULTS: Final[Mapping[str, Fault]] = {
    "postmaster": Fault("postmaster killed", postmaster_killed, 5.0),
    "machine": Fault("machine gone", machine_gone, TTL_S + 5.0),
    "zombie": Fault("zombie primary", zombie_primary),
    "switchover": Fault("switchover", switchover, pauses=True),
    "standbys": Fault("both standbys frozen", standbys_frozen),
    "node": Fault("EntiDB node killed", node_killed, 2.0),
    "connections": Fault("connections dropped", connections_dropped),
}
