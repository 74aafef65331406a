"""Three PostgreSQL servers under Patroni, and the etcd that they agree by, on loopback.

A server and its Patroni are one *machine* here: they are killed, stopped and started together.
Only processes are signalled that descend from what was started here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from entidb.testing.torture_worker import end_with_parent
from scripts.patroni_rig.programs import ROOT, Programs

#: Seconds until a leader that says nothing is replaced; 20 is the least that Patroni takes.
TTL_S: Final = 20
LOOP_S: Final = 1
_RETRY_S: Final = 5
#: Bounds a wait for something that must come.
_WAIT_S: Final = 120.0
_POLL_S: Final = 0.1


class RigFailure(Exception):
    """The servers did not do what they were told, or did not come back."""


@dataclass(frozen=True)
class Member:
    """A machine as Patroni tells of it."""

    name: str
    role: str
    state: str
    timeline: int
    lag: int | str


class Machine:
    """A PostgreSQL server, and the Patroni that looks after it."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any], user: str | None) -> None:
        self.name = name
        self.port: int = settings["postgresql"]["port"]
        self.rest: str = settings["restapi"]["listen"]
        self._folder = folder
        self._settings = folder / "patroni.json"
        self._patroni_program: str = settings["program"]
        self._user = user
        self._patroni: subprocess.Popen[bytes] | None = None
        self._seen: set[int] = set()
        folder.mkdir(mode=0o700)
        if user is not None:
            shutil.chown(folder, user)
        self._settings.write_text(json.dumps(settings["patroni"], indent=1))

    def start(self) -> None:
        with (self._folder / "patroni.log").open("ab") as log:
            self._patroni = subprocess.Popen(
                [self._patroni_program, str(self._settings)],
                user=self._user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env={**os.environ, "HOME": str(self._folder), "LC_ALL": "C.UTF-8"},
                preexec_fn=end_with_parent,
            )

    @property
    def running(self) -> bool:
        return self._patroni is not None

    def postmaster(self) -> int | None:
        """Its process id, if PostgreSQL runs."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            number = int((self._folder / "data" / "postmaster.pid").read_text().splitlines()[0])
            where = os.readlink(f"/proc/{number}/cwd")
            if Path(where) == self._folder / "data":
                return number
        return None

    def processes(self) -> list[int]:
        """All of this machine, Patroni first, and PostgreSQL's own that lost their parent."""
        roots = [self._patroni.pid if self._patroni is not None else None, self.postmaster()]
        found = [root for root in roots if root is not None]
        for pid in found:  # grows meanwhile
            found += [child for child in _children(pid) if child not in found]
        at_data = [pid for pid in _all_pids() if _is_at(pid, self._folder / "data")]
        return found + [pid for pid in at_data if pid not in found]

    def kill(self) -> None:
        """As if its power was cut."""
        for pid in self.processes():
            _signal(pid, signal.SIGKILL)
        if self._patroni is not None:
            self._patroni.wait()
            self._patroni = None
        end = time.monotonic() + _WAIT_S
        while left := self.processes():
            for pid in left:
                _signal(pid, signal.SIGKILL)
            if time.monotonic() > end:
                raise RigFailure(f"{self.name} does not go")
            time.sleep(0.01)

    def kill_postmaster(self) -> None:
        number = self.postmaster()
        if number is None:
            raise RigFailure(f"{self.name} has no postmaster")
        os.kill(number, signal.SIGKILL)

    def freeze(self) -> None:
        for pid in self.processes():
            _signal(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in reversed(self.processes()):
            _signal(pid, signal.SIGCONT)

    def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = 2.0) -> Any:
        """What Patroni answers; None if it does not. Raises ``RigFailure`` if it refuses."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.rest}{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise RigFailure(f"{self.name}: {path}: {error.read().decode()}") from error
        except OSError:
            return None
        return json.loads(text) if text.startswith("{") else text

    def last_words(self) -> str:
        return "\n".join((self._folder / "patroni.log").read_text().splitlines()[-15:])


class PatroniCluster:
    """See the module. A context manager; ``machines`` are three."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._user = "postgres" if os.geteuid() == 0 else None
        self._etcd: subprocess.Popen[bytes] | None = None
        self._janitor: subprocess.Popen[bytes] | None = None
        ports = free_ports(8)
        self._etcd_ports = ports[:2]
        if self._user:
            shutil.chown(folder, self._user)
        self.machines = [
            self._machine(f"pg{number + 1}", ports[2 + number], ports[5 + number])
            for number in range(3)
        ]

    @property
    def address(self) -> str:
        hosts = ",".join(f"127.0.0.1:{machine.port}" for machine in self.machines)
        return f"postgresql://postgres@{hosts}/postgres"

    def _machine(self, name: str, port: int, rest: int) -> Machine:
        folder = self._folder / name
        return Machine(
            name,
            folder,
            {
                "program": str(self._programs.patroni),
                "postgresql": {"port": port},
                "restapi": {"listen": f"127.0.0.1:{rest}"},
                "patroni": self._settings(name, folder, port, rest),
            },
            self._user,
        )

    def _settings(self, name: str, folder: Path, port: int, rest: int) -> dict[str, Any]:
        parameters = {
            "max_connections": 150,
            "shared_buffers": "32MB",
            "min_wal_size": "48MB",
            "max_wal_size": "192MB",
            "wal_keep_size": "64MB",
            "unix_socket_directories": str(folder),
        }
        return {
            "scope": "entidb",
            "name": name,
            "restapi": {"listen": f"127.0.0.1:{rest}", "connect_address": f"127.0.0.1:{rest}"},
            "etcd3": {"host": f"127.0.0.1:{self._etcd_ports[0]}"},
            "bootstrap": {
                "dcs": {
                    "ttl": TTL_S,
                    "loop_wait": LOOP_S,
                    "retry_timeout": _RETRY_S,
                    "maximum_lag_on_failover": 1 << 20,
                    # A primary that crashed is not waited for: its synchronous standby leads.
                    "primary_start_timeout": 0,
                    "synchronous_mode": True,
                    "synchronous_mode_strict": True,
                    "postgresql": {"use_pg_rewind": True, "parameters": parameters},
                },
                "initdb": ["no-sync", {"encoding": "UTF8"}, {"locale": "C"}],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{port}",
                "connect_address": f"127.0.0.1:{port}",
                "data_dir": str(folder / "data"),
                "bin_dir": str(self._programs.postgres),
                "pgpass": str(folder / "pgpass"),
                "parameters": parameters,
                "pg_hba": [
                    "local all all trust",
                    "host all all 127.0.0.1/32 trust",
                    "host replication all 127.0.0.1/32 trust",
                ],
                "authentication": {
                    "superuser": {"username": "postgres"},
                    "replication": {"username": "postgres"},
                },
                "remove_data_directory_on_rewind_failure": True,
                "remove_data_directory_on_diverged_timelines": True,
            },
        }

    def __enter__(self) -> PatroniCluster:
        try:
            self._janitor = subprocess.Popen(
                [sys.executable, "-m", "scripts.patroni_rig.janitor", str(self._folder)],
                stdin=subprocess.PIPE,
                cwd=ROOT,
                start_new_session=True,
            )
            self._start_etcd()
            for machine in self.machines:
                machine.start()
            self.wait_until_well()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for machine in self.machines:
            machine.kill()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()
        if self._janitor is not None:
            self._janitor.communicate(b"all is well\n")

    def _start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in self._etcd_ports)
        with (self._folder / "etcd.log").open("ab") as log:
            self._etcd = subprocess.Popen(
                [
                    self._programs.etcd, "--name", "only", "--data-dir", self._folder / "etcd",
                    "--listen-client-urls", client, "--advertise-client-urls", client,
                    "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                    "--initial-cluster", f"only={peer}",
                ],
                user=self._user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                preexec_fn=end_with_parent,
            )  # fmt: skip

    # ---- what is so

    def members(self) -> list[Member]:
        """As any machine that answers tells it; empty if none does."""
        for machine in self.machines:
            told = machine.ask("/cluster") if machine.running else None
            if isinstance(told, dict):
                return [
                    Member(
                        each["name"],
                        each["role"],
                        each["state"],
                        each.get("timeline", 0),
                        each.get("lag", 0),
                    )
                    for each in told["members"]
                ]
        return []

    def leader(self) -> Machine:
        """The machine that leads now. Raises ``RigFailure`` if none comes to."""
        found = self._until("a leader", self._leads)
        assert isinstance(found, Machine)
        return found

    def _leads(self) -> Machine | None:
        for each in self.members():
            if each.role == "leader" and each.state == "running":
                return next(one for one in self.machines if one.name == each.name)
        return None

    def wait_until_well(self) -> None:
        """One leads, the others follow without a gap, and one of them is synchronous."""
        self._until("a leader and two standbys that follow", self._is_well)

    def _is_well(self) -> bool:
        found = self.members()
        roles = sorted(each.role for each in found)
        timelines = {each.timeline for each in found}
        return (
            len(found) == len(self.machines)
            and roles == ["leader", "replica", "sync_standby"]
            and len(timelines) == 1
            and all(each.state in ("running", "streaming") for each in found)
            and all(each.lag in (0, "unknown") or each.role == "replica" for each in found)
        )

    def _until(self, what: str, found: Any) -> Any:
        end = time.monotonic() + _WAIT_S
        while not (value := found()):
            if time.monotonic() > end:
                words = [f"{m.name}: {m.last_words()}" for m in self.machines]
                raise RigFailure("\n".join([f"{what} did not come", str(self.members()), *words]))
            time.sleep(_POLL_S)
        return value

    def writes_since(self, since: float) -> float:
        """When PostgreSQL first acknowledged a commit that was begun after ``since``: what EntiDB
        could have known at best. Raises ``RigFailure``."""
        with ThreadPoolExecutor(len(self.machines)) as threads:
            while time.monotonic() < since + _WAIT_S:
                tries = [threads.submit(_write_to, machine.port) for machine in self.machines]
                times = [at for each in tries if (at := each.result()) is not None]
                if times:
                    return min(times)
                time.sleep(_POLL_S)
        raise RigFailure("no PostgreSQL server takes writes")

    def standbys(self) -> list[Machine]:
        leader = self.leader()
        return [machine for machine in self.machines if machine is not leader]


def _write_to(port: int) -> float | None:
    """When the commit was acknowledged, within the two seconds that libpq waits at least."""
    try:
        with psycopg.connect(
            f"host=127.0.0.1 port={port} user=postgres dbname=postgres",
            autocommit=True,
            connect_timeout=2,
            options="-c application_name=probe",
        ) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS rig_probe (at timestamptz)")
            connection.execute("INSERT INTO rig_probe VALUES (now())")
        return time.monotonic()
    except psycopg.Error:
        return None


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in made:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in made]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(each) for each in (task / "children").read_text().split()]
    return found


def _all_pids() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def _is_at(pid: int, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path(os.readlink(f"/proc/{pid}/cwd")) == folder
    return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
