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
        user = self._user or pwd.getpwuid(os.geteuid()).pw_name
        return f"postgresql:///postgres?host={self.folder}&port={self.port}&user={user}"

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


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """In memory where the system has that: its ``fsync`` is on, because EntiDB asks for it."""
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
