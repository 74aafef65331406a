"""What the doctor looks at on the machine of a server: nothing here opens a database, so that it
works beside a running server and on a directory that no server would open.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from entidb.cli.doctor_findings import Finding, ok, problem, skipped, warning
from entidb.cli.exits import NotFoundError
from entidb.cli.output import plural, size_text
from entidb.errors import EntiDBError
from entidb.server.admin.backups import rows_in
from entidb.server.auth import authenticator_for
from entidb.server.config import ServerConfig, db_id_of, directory_name
from entidb.storage.opening import holds_store
from entidb.types import SystemClock

#: Names of files that hold a secret or a token, as docs/server.md calls them.
_SECRET_NAMES: Final = ("secret", "token", "admin-token")
_SECRET_ENDS: Final = (".secret", ".token")
#: Milliseconds by which a file may seem to be younger than now: file systems round.
_AHEAD_MS: Final = 5_000
_FILES_EACH: Final = 9
_DISK_SHARE: Final = 0.1


def look(
    place: str, settings: Sequence[str], token_files: Sequence[str], *, mend: bool
) -> list[Finding]:
    """Raises ``NotFoundError`` if there is no such directory, and what ``serve`` raises for
    settings it does not know."""
    directory = Path(place)
    if not directory.is_dir():
        raise NotFoundError(f"{place} is not a directory: name the data directory of a server")
    given = parsed(place, settings)
    config, found = config_found(given)
    found += _permissions(_secrets(directory, given, token_files), mend=mend)
    found += _directory(directory)
    found += _clock(directory)
    floor = ServerConfig.ready_disk_bytes_min if config is None else config.ready_disk_bytes_min
    found += _disk("disk", directory, floor)
    if config is not None:
        found += _open_files(config)
        found += _backups(directory, config)
    return found


# ---------------------------------------------------------------- settings


def parsed(place: str, settings: Sequence[str]) -> dict[str, Any]:
    """What ``entidb serve`` would get, from the words and from the environment."""
    from entidb.cli.serving import serve_command

    with serve_command.make_context("entidb serve", [place, *settings]) as context:
        return dict(context.params)


def config_found(given: dict[str, Any]) -> tuple[ServerConfig | None, list[Finding]]:
    from entidb.cli.serving import LISTEN, WAYS_IN, config_of

    settings = {name: value for name, value in given.items() if name not in LISTEN}
    if not any(settings[name] for name in WAYS_IN):
        says = "not looked at: give them as `entidb serve` gets them, after `--`"
        return None, [skipped("settings", says)]
    try:
        config = config_of(**settings)
        config.load_validate()
        config.load_upcast()
        if config.jwt_jwks_url is None:
            authenticator_for(config, SystemClock())
    except EntiDBError as error:
        return None, [problem("settings", str(error), "mend this setting of `entidb serve`")]
    if (given["tls_cert"] is None) != (given["tls_key"] is None):
        says = "a certificate works only with its key"
        return config, [problem("settings", says, "give --tls-cert and --tls-key")]
    return config, [ok("settings", "the server would take them")]


# ---------------------------------------------------------------- permissions


def _secrets(directory: Path, given: dict[str, Any], more: Sequence[str]) -> list[Path]:
    """Every file of which is known that it holds something secret."""
    named = [given["jwt_secret_file"], given["tls_key"], *more]
    found = [Path(each) for each in named if each]
    places = [directory, directory.absolute().parent]
    if given["jwt_keys"] and Path(given["jwt_keys"]).is_dir():
        places.append(Path(given["jwt_keys"]))
    for place in places:
        if os.access(place, os.R_OK | os.X_OK):
            found += sorted(each for each in place.iterdir() if _sounds_secret(each))
    return list(dict.fromkeys(each.absolute() for each in found))


def _sounds_secret(path: Path) -> bool:
    return (path.name in _SECRET_NAMES or path.name.endswith(_SECRET_ENDS)) and path.is_file()


def _permissions(files: Sequence[Path], *, mend: bool) -> Iterator[Finding]:
    if os.name != "posix":
        yield skipped("permissions", "this system keeps them in another way")
        return
    if not files:
        yield skipped("permissions", "no file with a secret or a token is known")
    for path in files:
        yield _permission(path, mend=mend)


def _permission(path: Path, *, mend: bool) -> Finding:
    check = "permissions"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if not mode & 0o077:
            return ok(check, f"{path} is its owner's alone")
        if mend:
            path.chmod(0o600)
            says = f"{path} was {mode:04o} and is 0600 now"
            if mode & 0o022:
                change = "make a new secret: another user could write to this one"
                return warning(check, says, change)
            return ok(check, says)
    except OSError as error:
        return problem(check, f"{path}: {error.strerror}", "run this as the user of the server")
    says = f"{path} is {mode:04o}: other users of this machine can read or write it"
    return problem(check, says, f"chmod 600 {path}, or --mend")


def _directory(directory: Path) -> Iterator[Finding]:
    if holds_store(directory):
        says = f"{directory} is one database, and not the data directory of a server"
        change = f"name the directory that a server serves, or run `entidb verify {directory}`"
        yield problem("directory", says, change)
        return
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        says = f"{directory} cannot be read and written by this user"
        yield problem("directory", says, "chown it to the user of the server, and run this as that")
        return
    mode = stat.S_IMODE(directory.stat().st_mode)
    if os.name == "posix" and mode & stat.S_IWOTH:
        says = f"every user of this machine can write in {directory}"
        yield problem("directory", says, f"chmod 700 {directory}")
    else:
        count = sum(db_id_of(each.name) is not None for each in directory.iterdir())
        yield ok("directory", f"it holds {plural(count, 'database')}")


# ---------------------------------------------------------------- clock, disk, system


def _clock(directory: Path) -> Iterator[Finding]:
    now = SystemClock().now_ms()
    for path in sorted(directory.rglob("*")):
        ahead = _modified_ms(path) - now
        if ahead > _AHEAD_MS:
            says = f"{path} was written {ahead / 1000:,.0f} s in the future"
            yield problem("clock", says, "set the clock, and keep it with NTP (timedatectl)")
            return
    yield ok("clock", "no file is from the future")


def _modified_ms(path: Path) -> float:
    try:
        return path.stat().st_mtime * 1000
    except OSError:
        return 0.0  # a file of a running server that has gone meanwhile


def _disk(check: str, place: Path, floor: int) -> Iterator[Finding]:
    usage = shutil.disk_usage(place)
    says = f"{size_text(usage.free)} of {size_text(usage.total)} are free for {place}"
    if usage.free < floor:
        change = f"make room: below {size_text(floor)} the server is not ready (/readyz)"
        yield problem(check, says, change)
    elif usage.free < _DISK_SHARE * usage.total:
        yield warning(check, says, "make room, or `entidb admin compact` databases that shrank")
    else:
        yield ok(check, says)


def _open_files(config: ServerConfig) -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    have = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # to which the server raises its own
    need = config.connections_max + _FILES_EACH * config.databases_open_max + 100
    says = f"{have:,} may be open here; these settings can take {need:,}"
    if have == resource.RLIM_INFINITY or have >= need:
        yield ok("open files", says)
    else:
        change = f"LimitNOFILE={need} in the unit, or ulimit -n; or a lower connections_max"
        yield warning("open files", says, change)


def _backups(directory: Path, config: ServerConfig) -> Iterator[Finding]:
    if config.backup_dir is None:
        says = "with these settings there are none"
        change = "set --backup-dir and --backup-every-s, or give them here as the server has them"
        yield warning("backups", says, change)
        return
    place = Path(config.backup_dir)
    if not os.path.lexists(place) and _can_be_made(place):
        # That of a server that has made no backup yet looks the same as a misspelt one.
        says = f"{place} is not there; the server makes it with its first backup"
        yield warning("backups", says, "check that this is the directory that is meant")
        return
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        says = f"{place} is not a directory that this user can write"
        yield problem("backups", says, "make it, and chown it to the user of the server")
        return
    if place.stat().st_dev == directory.stat().st_dev:
        says = f"{place} is on the same disk as the databases"
        yield warning("backups", says, "put --backup-dir on another disk, or copy it elsewhere")
    yield from _disk("backups", place, config.ready_disk_bytes_min)
    if not config.backup_every_s:
        says = "they are made only when somebody asks"
        yield warning("backups", says, "set --backup-every-s, such as 86400")
        return
    late = _late(directory, place, config.backup_every_s)
    if late:
        says = f"none that is young enough of {', '.join(late[:10])}"
        yield problem("backups", says, "`entidb admin tasks` and the server's log say why")
    else:
        yield ok("backups", "those of every database are young enough")


def _can_be_made(place: Path) -> bool:
    """Whether this user may make it, and what is missing above it."""
    there = next((each for each in place.absolute().parents if os.path.lexists(each)), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _late(directory: Path, place: Path, every_s: float) -> list[str]:
    """Databases without a good backup younger than two intervals."""
    since = SystemClock().now_ms() - 2000 * every_s
    named = sorted(filter(None, (db_id_of(each.name) for each in directory.iterdir())))
    return [name for name in named if _newest_ms(place / directory_name(name), name) < since]


def _newest_ms(folder: Path, name: str) -> int:
    return max((each.made_ms for each in rows_in(folder, name) if not each.faults), default=0)
