"""A PostgreSQL server of the tests' own: made in a temporary directory, on a socket there, and gone
afterwards. Debian's package ``postgresql`` has to be installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.tools import NOT_RUN

#: Why the tests that need it are not run; None where they are.
MISSING: Final = (
    None
    if list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    else f"{NOT_RUN}postgresql is not installed"
)
_START_SECONDS: Final = 60.0


def _programs() -> Path:
    found = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    return max(found, key=lambda path: int(path.parts[-3])).parent


def address_of(*clusters: Cluster) -> str:
    """Of all of them: the one that takes writes is used."""
    folders = ",".join(str(each.folder) for each in clusters)
    ports = ",".join(str(each.port) for each in clusters)
    return f"postgresql:///postgres?host={folders}&port={ports}&user={clusters[0].user}"


class Cluster:
    """One server. PostgreSQL does not run as root: then it runs as its own user."""

    def __init__(self, folder: Path, port: int = 5432) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = port
        self._user = "postgres" if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return address_of(self)

    @property
    def user(self) -> str:
        return self._user or pwd.getpwuid(os.geteuid()).pw_name

    def make(self) -> None:
        if self._user:
            shutil.chown(self.folder, self._user)
        self._run("initdb", "-N", "-A", "trust", "-E", "UTF8", "--locale=C", "-D", str(self.data))

    def start(self, **settings: str) -> None:
        ours = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "port": str(self.port),
            "shared_buffers": "32MB",
            "max_connections": "150",
        }
        options = [f"-c{name}={value}" for name, value in (ours | settings).items()]
        log = (self.folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [_programs() / "postgres", "-D", self.data, *options],
                user=self._user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        end = time.monotonic() + _START_SECONDS
        while self._run(
            "pg_isready", "-q", "-h", str(self.folder), "-p", str(self.port), check=False
        ):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.05)

    def stop(self, kind: signal.Signals = signal.SIGQUIT) -> None:
        """SIGQUIT is a crash in all but name: it recovers at the next start."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(kind)
            process.wait(_START_SECONDS)

    def set(self, **settings: str) -> None:
        """While it runs; it is so when this returns."""
        for name, value in settings.items():
            self._sql(f"ALTER SYSTEM SET {name} = '{value}'")
        self._sql("SELECT pg_reload_conf()")
        end = time.monotonic() + _START_SECONDS
        while any(self._sql(f"SHOW {name}") != value for name, value in settings.items()):
            if time.monotonic() > end:
                raise RuntimeError(f"{settings} did not come about")
            time.sleep(0.02)

    def _sql(self, statement: str) -> str:
        options = ("-h", str(self.folder), "-p", str(self.port), "-U", self.user)
        done = subprocess.run(
            [_programs() / "psql", *options, "-d", "postgres", "-AtXqc", statement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def kill(self) -> None:
        """SIGKILL to all of it, as if its power was cut."""
        process = self._process
        assert process is not None
        self._signal(signal.SIGKILL)
        process.wait(_START_SECONDS)
        self._process = None

    def freeze(self) -> None:
        """It keeps its connections, and says nothing any more, until ``thaw``."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, kind: signal.Signals) -> None:
        """To the first process, which starts no other one while it is frozen, and to all others."""
        assert self._process is not None
        first = self._process.pid
        self._process.send_signal(kind)
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        for number in map(int, children):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(number, kind)

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        done = subprocess.run(
            [_programs() / program, *arguments],
            user=self._user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace")[-2000:])
        return done.returncode


class Standby(Cluster):
    """A server that follows another one, by its name ``standby``, until it is promoted."""

    def follow(self, primary: Cluster) -> None:
        """Begin with a copy of ``primary``, which runs."""
        if self._user:
            shutil.chown(self.folder, self._user)
        source = f"host={primary.folder} port={primary.port} user={primary.user}"
        self._run("pg_basebackup", "-D", str(self.data), "-d", source, "-c", "fast", "-X", "stream")
        with (self.data / "postgresql.auto.conf").open("a") as settings:
            settings.write(f"primary_conninfo = '{source} application_name=standby'\n")
        (self.data / "standby.signal").touch()

    def promote(self) -> None:
        self._run("pg_ctl", "promote", "-w", "-D", str(self.data))


@contextlib.contextmanager
def pair() -> Iterator[tuple[Cluster, Standby]]:
    """A primary, and a standby that every commit of it waits for."""
    with cluster() as primary:
        folder = Path(tempfile.mkdtemp(prefix="entidb-pg-", dir=primary.folder.parent))
        standby = Standby(folder, primary.port + 1)
        try:
            standby.follow(primary)
            standby.start()
            primary.set(synchronous_standby_names="standby")
            yield primary, standby
        finally:
            standby.stop()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """In memory where the system has that: its ``fsync`` is on, because EntiDB asks for it. The
    test is skipped where PostgreSQL is missing."""
    if MISSING is not None:
        pytest.skip(MISSING)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="entidb-pg-", dir=place))
    made = Cluster(folder)
    try:
        made.make()
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
