"""A server in a process of its own, looked at from outside: its answers, its memory, its files."""

from __future__ import annotations

import hashlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAM = """
import sys
from entidb.server import ServerConfig, serve
serve(ServerConfig(data_dir=sys.argv[1], insecure_no_auth=True, access_log=False,
                   head_timeout_s=1.0, body_timeout_s=float(sys.argv[3]), write_timeout_s=1.0,
                   shutdown_timeout_s=5.0),
      port=0, ready_file=sys.argv[2])
"""
START_S = 30.0


@dataclass
class ServerProcess:
    process: subprocess.Popen[bytes]
    host: str
    port: int
    data_dir: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def memory(self, name: str = "VmRSS") -> int:
        """Bytes; ``VmHWM`` is the most there ever was."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def files(self) -> int:
        """Open file descriptors."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def store_hash(self) -> str:
        """Of the data files: whatever commits changes them."""
        digest = hashlib.sha256()
        for path in sorted(self.data_dir.rglob("data.mdb")):
            digest.update(str(path).encode() + path.read_bytes())
        return digest.hexdigest()

    def connect(self, timeout_s: float = 20.0) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=timeout_s)

    def say(self, data: bytes) -> bytes:
        """Send ``data`` on a connection of its own; everything that comes back."""
        with self.connect() as connection:
            try:
                connection.sendall(data)
            except OSError:
                return read_all(connection)  # refused while it was being sent
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


@contextmanager
def running_server(where: Path, body_timeout_s: float = 1.5) -> Iterator[ServerProcess]:
    data_dir, ready = where / "data", where / "ready"
    command = [sys.executable, "-c", PROGRAM, str(data_dir), str(ready), str(body_timeout_s)]
    with (where / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < until, "it does not start"
            time.sleep(0.02)
        host, _, port = ready.read_text().strip().removeprefix("http://").rpartition(":")
        yield ServerProcess(process, host, int(port), data_dir)
    finally:
        process.terminate()
        process.wait(30)
