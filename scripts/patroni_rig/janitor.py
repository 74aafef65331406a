"""Ends what a run has left when it was killed: PostgreSQL's processes have no parent that they end
with. Started by the run, with its folder; waits until the other end of its standard input closes.

    python -m scripts.patroni_rig.janitor FOLDER
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

#: Times that processes are looked for: one may start another one meanwhile.
_LOOKS: Final = 20


def processes_below(folder: Path) -> Iterator[int]:
    """Those whose working directory is ``folder`` or lies below it, but for this one."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                    yield int(entry.name)


def clean(folder: Path) -> None:
    for _ in range(_LOOKS):
        found = list(processes_below(folder))
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        if not found:
            break
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends in order by itself
    if sys.stdin.read() != "all is well\n":
        clean(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
