"""The command line: ``entidb …`` and ``python -m entidb …``; ``docs/cli.md`` is its manual.

    app        the command table, and how every error becomes one line and an exit code
    exits      exit codes, and which error has which
    words      positional arguments: the database directory, ids and short ids
    values     JSON as it is typed and printed, and the values that it means
    output     lines, tables, times and sizes, the same on a terminal and in a pipe
    entities   init, put, get, delete, list
    transfer   import, export (``rows`` reads and writes the files)
    syncing    sync, and its ``watch`` loop; ``summary`` says what a cycle did
    outbox     status, pending, conflicts, resolve, discarded, reset
    serving    serve, token
    restoring  restore
    admin      admin: a running server (``admin_desk`` asks it, ``admin_looking`` has what only
               looks, ``admin_views`` shows its answers)
    care       verify, inspect, compact, backup, version (``comparing``: verify with a server)

Nothing is imported here: what a command needs is loaded when that command runs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

#: What the ``cli`` extra brings.
_EXTRA = ("click", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with ``arguments`` (default: the process's) and return its exit code.

    Raises only for a bug in the interpreter: errors are one line on standard error.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error[missing_extra]: the command line needs {' and '.join(missing)}: "
            'pip install "entidb[cli]"',
            file=sys.stderr,
        )
        return 1
    from entidb.cli.app import run

    return run(arguments)


__all__ = ["main"]
