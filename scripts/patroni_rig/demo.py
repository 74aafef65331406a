"""One round that a person can watch: who leads, the kill, the pause, and what is there after it.

make demo-failover
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import IO, Final

from entidb.db import Database, Role
from entidb.testing.failover import Comparison, Fleet, open_in_postgres
from entidb.testing.torture import digest_of
from scripts.patroni_rig.cluster import TTL_S, Machine, PatroniCluster, RigFailure
from scripts.patroni_rig.faults import FAILED
from scripts.patroni_rig.programs import Programs, make_folder, versions

#: Seconds that devices write before the kill, and after they write again.
_BEFORE_S: Final = 4.0
_AFTER_S: Final = 4.0
_DB_ID: Final = "shop"
_DIGEST_CHARACTERS: Final = 16


def show(programs: Programs, output: IO[str]) -> int:
    """0 if nothing was lost."""
    folder = make_folder()
    kept = True
    try:
        found = _Demo(output).run(programs, folder)
        kept = bool(found.faults)
    except FAILED as failure:
        print(f"failed: {failure}", file=output)
        return 1
    finally:
        if kept:
            print(f"files: {folder}", file=output)
        else:
            shutil.rmtree(folder)
    for fault in found.faults:
        print(f"NOT SO: {fault}", file=output)
    return 1 if found.faults else 0


class _Demo:
    def __init__(self, output: IO[str]) -> None:
        self._output = output
        self._began = time.monotonic()

    def run(self, programs: Programs, folder: Path) -> Comparison:
        self._say(versions(programs))
        self._say("1. Three PostgreSQL servers under Patroni, with synchronous replication.")
        servers = folder / "postgres"
        servers.mkdir()
        with PatroniCluster(programs, servers) as cluster:
            self._members(cluster)
            self._say("2. Two nodes of EntiDB serve from them, and five devices write and sync.")
            opens = open_in_postgres(cluster.address)
            with Fleet(cluster.address, folder / "fleet", opens) as fleet:
                fleet.begin(_DB_ID)
                time.sleep(_BEFORE_S)
                self._say(f"   {fleet.acknowledged()} transactions acknowledged so far")
                self._fail(cluster, fleet)
                self._say("5. Writing ends; everybody catches up, and all is compared.")
                fleet.quiet()
                found = fleet.compare()
                self._table(fleet, found)
        return found

    def _fail(self, cluster: PatroniCluster, fleet: Fleet) -> None:
        leader = cluster.leader()
        self._say(f"3. {leader.name}, which leads, loses its power: all its processes are killed.")
        leader.kill()
        since = time.monotonic()
        self._say(f"   Its lock lasts for {TTL_S} seconds; devices go on writing, on their disks.")
        first, last = fleet.resumed(since)
        new = cluster.leader()
        if new is leader:
            raise RigFailure(f"{leader.name} leads although it was killed")
        self._say(
            f"4. {new.name} leads. The first device wrote to the server again after {first:.1f} s, "
            f"all of them after {last:.1f} s."
        )
        self._say(f"   {leader.name} comes back, and follows.")
        self._return(cluster, leader)
        time.sleep(_AFTER_S)

    def _return(self, cluster: PatroniCluster, leader: Machine) -> None:
        leader.start()
        cluster.wait_until_well()
        self._members(cluster)

    def _members(self, cluster: PatroniCluster) -> None:
        for each in cluster.members():
            self._say(f"   {each.name}: {each.role.replace('_', ' ')}, {each.state}")

    def _table(self, fleet: Fleet, found: Comparison) -> None:
        head = f"   {'':<10}{'acknowledged':>14}{'refused, tried again':>22}   digest"
        self._say(head)
        self._say(f"   {'server':<10}{found.acknowledged:>14}{'':>22}   {_short(found.digest)}")
        for number, path in enumerate(fleet.paths):
            told = fleet.ledgers[number].told
            with Database.open(path, create=False, role=Role.DEVICE) as device:
                digest = digest_of(device)
            self._say(
                f"   device {number + 1:<3}{len(told.committed):>14}{told.refused.total():>22}   "
                f"{_short(digest)}"
            )
        self._say(
            f"   {found.acknowledged} acknowledged: {found.on_server} on the server, "
            f"{found.discarded} decided against by a policy and kept for their person, "
            f"{found.lost} lost, {found.doubled} twice, {found.gaps} gaps in the versions"
        )

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {line}", file=self._output, flush=True)


def _short(digest: str) -> str:
    return digest[:_DIGEST_CHARACTERS]
