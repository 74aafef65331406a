"""Where the programs are that the rig needs, and what to say where one is missing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
#: What ``make failover-tools`` fills.
_TOOLS: Final = ROOT / ".failover" / "bin"
_TRIED: Final = "PostgreSQL 15, Patroni 4 and etcd 3.4"


@dataclass(frozen=True)
class Programs:
    """``postgres`` is the folder of PostgreSQL's programs."""

    postgres: Path
    etcd: Path
    patroni: Path


def find_programs() -> Programs | str:
    """The programs; or one line that says what is missing, and how it is installed."""
    if not sys.platform.startswith("linux"):
        return f"failover is tried on Linux only ({_TRIED})"
    postgres = max(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"),
        key=lambda path: int(path.parts[-3]),
        default=None,
    )
    etcd, patroni = shutil.which("etcd"), shutil.which("patroni", path=_search_path())
    missing = [
        words
        for found, words in (
            (postgres, "postgresql (apt-get install postgresql)"),
            (etcd, "etcd (apt-get install etcd-server)"),
            (patroni, "patroni (make failover-tools)"),
        )
        if found is None
    ]
    if missing or postgres is None or etcd is None or patroni is None:
        return f"not installed: {', '.join(missing)}"
    return Programs(postgres.parent, Path(etcd), Path(patroni))


def _search_path() -> str:
    return os.pathsep.join([str(_TOOLS), os.environ.get("PATH", os.defpath)])


def versions(programs: Programs) -> str:
    said = [
        _first_line(programs.postgres / "postgres", "--version"),
        _first_line(programs.patroni, "--version"),
        _first_line(programs.etcd, "--version"),
    ]
    return "; ".join(said)


def _first_line(program: Path, option: str) -> str:
    done = subprocess.run([program, option], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def make_folder() -> Path:
    """For everything of a run; in memory where the system has that. Ends the run in order when it
    is told to end."""
    signal.signal(signal.SIGTERM, _end)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="entidb-failover-", dir=place))
    folder.chmod(0o711)  # PostgreSQL's user passes through
    return folder


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
