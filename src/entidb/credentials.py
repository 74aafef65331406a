"""Files that hold a secret or a token: how they are read, written, and who else can read them.

Nothing here says what a credential means, and no message repeats one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from entidb.errors import ConfigError, StorageError, StorageFullError

#: Bytes. No secret or key is longer; a file that is, is another file.
CREDENTIAL_BYTES_MAX: Final = 64 * 1024
_UTF8_MARK: Final = b"\xef\xbb\xbf"
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


def read_credential(path: str | os.PathLike[str], what: str) -> bytes:
    """What the file at ``path`` holds, without a UTF-8 mark and whitespace at either end.

    ``what`` names it in messages: ``token file``. Raises ``ConfigError`` if it cannot be read, is
    empty, is UTF-16 text, is larger than ``CREDENTIAL_BYTES_MAX``, or if every user of this machine
    can write to it: then it keeps nothing secret."""
    if not os.fspath(path):
        raise ConfigError(f"the name of the {what} is empty")
    where = f"the {what} {os.fspath(path)}"
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(CREDENTIAL_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {where}: {why_unreadable(error)}") from error
    if os.name == "posix" and stat.S_ISREG(mode) and mode & stat.S_IWOTH:
        raise ConfigError(
            f"every user of this machine can write to {where}, so its content proves "
            f"nothing: `chmod 600 {os.fspath(path)}`, and make a new one"
        )
    if len(data) > CREDENTIAL_BYTES_MAX:
        raise ConfigError(f"{where} is larger than {CREDENTIAL_BYTES_MAX} bytes: another file?")
    if b"\0" in data and not data.startswith(_UTF16_MARKS) and 0 in data[::2] and 0 in data[1::2]:
        raise ConfigError(f"{where} holds bytes that no text has: another file?")
    if data.startswith(_UTF16_MARKS) or b"\0" in data:
        raise ConfigError(
            f"{where} is UTF-16 text, as `>` of Windows PowerShell writes it: save it as UTF-8 or "
            "ASCII (`… | Out-File -Encoding ascii FILE`)"
        )
    data = data.removeprefix(_UTF8_MARK).strip()
    if not data:
        raise ConfigError(f"{where} is empty")
    return data


def why_unreadable(error: OSError | ValueError) -> str:
    """Why a file or directory of credentials cannot be read, and what to do."""
    number = getattr(error, "errno", None)
    reason = str(getattr(error, "strerror", None) or error)
    if number in (errno.EACCES, errno.EPERM):
        return f"{reason}; check owner and mode: the user who runs this has to be able to read it"
    if number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        return f"{reason}; check the path"
    return f"{reason}; {_TO_DO[number]}" if number in _TO_DO else reason


def read_token(path: str | os.PathLike[str]) -> str:
    """The bearer token in a file. Raises ``ConfigError`` as ``read_credential``, and for what no
    HTTP header can carry."""
    data = read_credential(path, "token file")
    where = f"the token file {os.fspath(path)}"
    if data[:7].lower() == b"bearer ":
        raise ConfigError(f'{where} begins with "Bearer": keep only the token itself in it')
    if len(data.split()) > 1:
        raise ConfigError(f"{where} holds more than one word: keep only the token itself in it")
    if not all(0x21 <= byte <= 0x7E for byte in data):
        raise ConfigError(f"{where} holds something other than visible ASCII text: no token")
    return data.decode("ascii")


def exposure(path: str | os.PathLike[str], what: str) -> str | None:
    """The warning if every user of this machine can read the file at ``path``, else None."""
    if os.name != "posix":
        return None
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None  # reading it raises, and says why
    if not stat.S_ISREG(mode) or not mode & stat.S_IROTH:
        return None
    name = os.fspath(path)
    return f"every user of this machine can read the {what} {name}: `chmod 600 {name}`"


def check_place(path: str | os.PathLike[str], what: str) -> None:
    """Raises ``ConfigError`` where a new file must not be put in the place of what stands at
    ``path``: a device, a pipe, a directory, or a file of a database."""
    place = Path(path)
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(place.stat().st_mode):
            raise ConfigError(f"{what} {place} is no file and stays as it is: name a file")
    if (place.parent / "data.mdb").is_file():
        raise ConfigError(
            f"{what} {place} would be inside the database {place.parent}: name a file elsewhere"
        )


_ELSEWHERE: Final = "name a file in a directory that is there and that you may write to"
#: What else to do, where the place is none of the reasons.
_TO_DO: Final = {
    errno.ENOSPC: "free space, and try again",
    errno.EDQUOT: "free space, or ask for more",
    errno.EIO: "look into the system's log, and check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close some files",
}
_KINDS: Final = {errno.ENOSPC: StorageFullError, errno.EDQUOT: StorageFullError}


def write_credential(path: str | os.PathLike[str], text: str, *, replace: bool) -> None:
    """Write ``text`` and a newline into a file that only its owner can read, from the first byte
    on: the owner of the file that it replaces, or else of the directory, as far as this user may
    give files away. It appears when it is complete, durably. Raises ``ConfigError`` if it cannot be
    there, if something else than a file is, or if it is and ``replace`` is false; ``StorageError``
    where the disk is full or fails."""
    if not os.fspath(path):
        raise ConfigError("the output is empty: name a file")
    target = Path(path)
    try:
        if not replace and os.path.lexists(target):
            raise ConfigError(
                f"{target} exists already, and is not overwritten: name a new file", code="exists"
            )
        check_place(target, "the output")
        # mkstemp makes files that only their owner can read.
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                _give_owner(file.fileno(), target)
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(name, target)
            else:
                _appear(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        try:
            _sync_names(target.parent)
        except OSError:
            if not replace:  # else who tries again is told that it is there
                with contextlib.suppress(OSError):
                    os.unlink(target)
            raise
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        number = getattr(error, "errno", None) or 0
        kind = _KINDS.get(number, StorageError) if number in _TO_DO else ConfigError
        todo = _TO_DO.get(number, _ELSEWHERE)
        raise kind(f"cannot write {target}: {reason}; {todo}") from error


def _give_owner(descriptor: int, target: Path) -> None:
    """What root makes for a service is of use to it only if the service may read it."""
    if os.name != "posix":
        return
    like = os.stat(target if target.exists() else target.parent)
    if like.st_uid != os.geteuid():
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, like.st_uid, like.st_gid)


def _sync_names(folder: Path) -> None:
    """Which files are in a directory is durable when that is."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _appear(name: str, target: Path) -> None:
    """Move without replacing a file that another process has put there meanwhile, where the system
    can."""
    try:
        os.link(name, target)
    except FileExistsError:
        raise
    except OSError:
        os.rename(name, target)  # no hard links here
    else:
        os.unlink(name)
