"""Which processes form one server: those that one parent has started for it.

``entidb serve`` is such a parent; so are uvicorn with ``--workers``, and gunicorn, which know
nothing of EntiDB. Anybody else who serves the same directory is another server, and is refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import sys
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from entidb.errors import ConfigError
from entidb.server.config import ServerConfig

logger = logging.getLogger("entidb.server")

#: Begins the names of folders for processes whose parent knows nothing of them.
_FOLDER: Final = "entidb-workers-"
#: Programs that start several processes of one app, each of them by ``multiprocessing``.
_MANAGERS: Final = ("uvicorn", "hypercorn")
_ARBITER: Final = "gunicorn.arbiter"
_GUNICORN: Final = "gunicorn.workers"


@dataclass(frozen=True)
class Family:
    """``parent`` is the number of the process whose end is the end of the server; ``name`` tells it
    from an earlier process of that number. Where there is no data directory, ``folder`` is where
    the processes leave things for each other, if there is such a place."""

    parent: int
    name: str
    folder: str = ""

    @classmethod
    def of(cls, parent: int, folder: str = "") -> Family:
        return cls(parent, name_of(parent), folder)


def family_of(config: ServerConfig) -> Family | None:
    """The family that this process serves with; None: it is a server by itself. Raises
    ``ConfigError`` where ``workers`` asks for what this system does not have."""
    kept = config.directory is not None or config.address is not None
    manager = _manager() if kept else None
    if config.workers == 1 and manager is None:
        return None
    if config.address is not None:
        # Each process is a node, and ends with its parent.
        parent = os.getppid() if manager is None else manager
        return Family.of(parent, _folder_of(parent, config.address) if config.metrics else "")
    if not can_share():
        if manager is not None and config.workers == 1:
            return None  # the first process serves, and the others are refused
        raise cannot_share()
    return Family.of(os.getppid() if manager is None else manager)


def _folder_of(parent: int, address: str) -> str:
    """A folder among the temporary files of the system for the processes that serve ``address``
    and were started by ``parent``, which knows nothing of it: the first of them makes it, and
    removes those of parents that are dead. Empty where there can be none."""
    if os.name != "posix":
        return ""
    root, ours = tempfile.gettempdir(), f"{_FOLDER}{os.geteuid()}-"
    name = name_of(parent)
    which = sha256(address.encode()).hexdigest()[:16]
    path = os.path.join(root, f"{ours}{name}-{which}")
    try:
        for each in os.listdir(root):
            if each.startswith(ours) and not is_alive(each.removeprefix(ours).partition("-")[0]):
                shutil.rmtree(os.path.join(root, each), ignore_errors=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            return path
        logger.warning("%s is somebody else's: counters go with each process", path)
    except OSError as error:
        logger.warning("counters go with each process: %s", error)
    return ""


def can_share() -> bool:
    """Whether several processes may have one database open here."""
    from entidb.storage.lmdb.company import SHARING  # the store is loaded when one is opened

    return SHARING


def cannot_share() -> ConfigError:
    return ConfigError(
        "workers: on this system a database is open in one process at a time, and several workers "
        "need Linux; serve with workers=1"
    )


def name_of(pid: int) -> str:
    """Of one process, and no other before or after it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of the program, in brackets, may hold anything.
            began = file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        began = "gone"
    return f"{pid}.{began}"


def is_alive(name: str) -> bool:
    """Whether the process that ``name_of`` has called so is there."""
    pid = name.partition(".")[0]
    return pid.isdigit() and name_of(int(pid)) == name


def _manager() -> int | None:
    """The process that manages this one as one of several of an app."""
    if _ARBITER in sys.modules:
        # Loaded before the fork, the app belongs to the process that is going to fork.
        return os.getppid() if _is_called_by(_GUNICORN) else os.getpid()
    starter = sys.modules.get("multiprocessing.process")  # who is started by it, has it
    target = None if starter is None else getattr(starter.current_process(), "_target", None)
    module = getattr(target, "__module__", "") or ""
    return os.getppid() if module.partition(".")[0] in _MANAGERS else None


def _is_called_by(package: str) -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if str(frame.f_globals.get("__name__", "")).startswith(package):
            return True
    return False


__all__ = ["Family", "can_share", "cannot_share", "family_of", "is_alive", "name_of"]
