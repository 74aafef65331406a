"""``sync``: one cycle, or with ``--watch`` one after the other.

The cycle runs on a thread of its own, so that Ctrl-C works at once, also while a request is under
way: it closes the engine, which cuts the request off (a cycle may stop at any point, R9). What
``--watch`` does is in ``watching``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from entidb.cli.exits import Exit, UsageError
from entidb.cli.output import (
    Bar,
    progress,
    say,
    warn_of_exposure,
)
from entidb.cli.summary import document, lines
from entidb.cli.values import print_json
from entidb.cli.watching import watch as watch_until_ended
from entidb.cli.words import a_directory, as_options, bind, json_option, once, opened
from entidb.cli.words import words as positional
from entidb.credentials import read_token
from entidb.db import Database
from entidb.errors import (
    ConfigError,
)
from entidb.events import SafeEvent, Thread
from entidb.sync import (
    DatabaseApplier,
    HttpTransport,
    RetryConfig,
    SyncConfig,
    SyncCycleResult,
    SyncEngine,
    SyncProgress,
    SyncState,
    SyncStatus,
)
from entidb.version import VERSION

T = TypeVar("T")
INTERVAL_S: Final = 30.0
#: How an error of the engine names a setting, and how this command does.
_FLAGS: Final = {
    "attempts_max": "--attempts",
    "total_timeout_s": "--timeout",
    "read_timeout_s": "--timeout",
    "connect_timeout_s": "--timeout",
    "interval_s": "--interval",
    "default_policy": "--policy",
    "db_id": "--db",
}
_PHASES: Final = {SyncState.PULLING: "pulling", SyncState.PUSHING: "pushing"}


@click.command("sync")
@positional("URL")
@click.option("--db", "db_id", envvar="ENTIDB_DB", metavar="NAME", show_envvar=True,
              help="Database on the server. Needed for the first sync only.")  # fmt: skip
@click.option("--token", metavar="TEXT", help="Bearer token. Others on this machine may see it in "
              "the list of processes: prefer --token-file or ENTIDB_TOKEN.")  # fmt: skip
@click.option("--token-file", metavar="FILE", envvar="ENTIDB_TOKEN_FILE", show_envvar=True,
              help="File with the token; read again when the server refuses it.")  # fmt: skip
@click.option("--policy", "policies", multiple=True, metavar="[COLLECTION=]NAME",
              help="Conflict policy: server_wins (default), client_wins, last_write_wins, merge, "
              "manual. May be given for each collection.")  # fmt: skip
@click.option("--collections", metavar="NAME,…", help="What to synchronise, both ways; `all` for "
              "everything not local. Remembered in the database.")  # fmt: skip
@click.option("--watch", is_flag=True, help="Keep on synchronising until Ctrl-C.")
@click.option("--interval", default=INTERVAL_S, show_default=True, help="Seconds between two "
              "cycles of --watch.")  # fmt: skip
@click.option("--attempts", default=5, show_default=True, help="How often to try when the server "
              "cannot be reached.")  # fmt: skip
@click.option("--timeout", default=120.0, show_default=True, help="Seconds for one request.")
@click.option("--insecure-token", is_flag=True, help="Send the token over http:// to another "
              "machine. Only on networks that are encrypted below HTTP.")  # fmt: skip
@json_option
@as_options(_FLAGS)
def sync_command(
    words: tuple[str, ...],
    directory: str | None,
    db_id: str | None,
    token: str | None,
    token_file: str | None,
    policies: tuple[str, ...],
    collections: str | None,
    watch: bool,
    interval: float,
    attempts: int,
    timeout: float,
    insecure_token: bool,
    as_json: bool,
) -> int:
    """Synchronise with the server at URL: pull, merge, push.

    URL is the address of `entidb serve`, or ENTIDB_URL. Exit code 4: conflicts wait for you.
    """
    path, url = _path_and_url(words, directory)
    settings: dict[str, Any] = {
        "client": f"entidb-cli/{VERSION}",
        "retry": RetryConfig(attempts_max=attempts),
        "total_timeout_s": timeout,
        "read_timeout_s": min(30.0, timeout),
        "connect_timeout_s": min(10.0, timeout),
        "interval_s": interval,
        "allow_insecure_token": insecure_token,
        **policies_of(policies),
    }
    job = Sync(path, url, db_id, token_of(token, token_file), collections, settings)
    job.token_file = token_file if token is None else None
    report = _report_json if as_json else _report_lines
    if watch:
        shown = report_watched if as_json else report
        return watch_until_ended(job, interval, shown, line=not as_json)
    with opened(path) as database:
        result, status = job.run(database)
    report(result, status, url)
    job.warn()
    return _exit_of(result, status)


def _path_and_url(words: tuple[str, ...], directory: str | None) -> tuple[str, str]:
    """DIR and URL in any number from none to both; a URL is what has :// in it."""
    urls = [word for word in words if "://" in a_directory(word)]
    rest = tuple(word for word in words if "://" not in word)
    default = _environment("ENTIDB_URL")
    if len(urls) > 1 or (not urls and not default):
        raise UsageError(
            "which server? give DIR URL, like https://example.org (ENTIDB_URL can name it too)"
        )
    return bind(rest, directory).path, urls[0] if urls else default


def _environment(name: str) -> str:
    return os.environ.get(name, "")


def policies_of(given: tuple[str, ...]) -> dict[str, Any]:
    """``NAME`` is the default, ``COLLECTION=NAME`` for one of them."""
    pairs = [each.rpartition("=") for each in given]
    named = once("--policy", ((name, policy) for name, equals, policy in pairs if equals))
    others = {policy for _, equals, policy in pairs if not equals}
    if len(others) > 1:
        raise UsageError(f"--policy names {' and '.join(sorted(others))} for everything: give one")
    return {"default_policy": next(iter(others), "server_wins"), "policies": named}


def token_of(token: str | None, file: str | None) -> str | Callable[[bool], str] | None:
    """From the option, the file, or the environment, in this order."""
    if token is not None and file is not None and not _environment("ENTIDB_TOKEN_FILE"):
        raise UsageError("--token and --token-file are two tokens: give one of them")
    if token is not None:
        return _visible(token.strip(), "--token")
    if file is None:
        return _visible(_environment("ENTIDB_TOKEN").strip(), "ENTIDB_TOKEN") or None
    known = [_read_token(file)]

    def provide(refused: bool) -> str:
        if refused:
            known[0] = _read_token(file)
        return known[0]

    return provide


def _visible(token: str, where: str) -> str:
    if not all("!" <= character <= "~" for character in token) or (not token and where[0] == "-"):
        raise UsageError(f"{where} is no token: it is one word of visible ASCII characters")
    return token


def _read_token(file: str) -> str:
    try:
        return read_token(file)
    except ConfigError as error:
        # Also when it is read again: a token service may be about to write it.
        raise UsageError(str(error)) from error


# ---------------------------------------------------------------- cycles


class Sync:
    """The settings of a sync, and one cycle at a time with them."""

    def __init__(
        self,
        path: str,
        url: str,
        db_id: str | None,
        token: str | Callable[[bool], str] | None,
        collections: str | None,
        settings: dict[str, Any],
    ) -> None:
        self.path = path
        self.url = url
        self._db_id = db_id
        self._token = token
        self._collections = collections
        self._settings = settings
        self.token_file: str | None = None
        # Everything that can be wrong on the command line is found before anything is opened.
        self._config("checked", None)
        HttpTransport(url, token=token, config=self._config("checked", None)).close()

    def warn(self) -> None:
        """Print the warnings, after the output proper: an error stays one line."""
        if self.token_file is not None:
            warn_of_exposure(self.token_file, "token file")

    def run(self, database: Database) -> tuple[SyncCycleResult, SyncStatus]:
        """One cycle. Raises what ``SyncEngine.sync`` raises, and ``KeyboardInterrupt``."""
        with self.engine(database) as engine:
            with progress("connecting", None, unit="rows") as bar:
                engine.on_state(lambda _, new: _show_waiting(bar, new))
                engine.on_progress(lambda step: _show(bar, step))
                result = on_a_thread(engine, engine.sync)
            return result, engine.status()

    def engine(self, database: Database) -> SyncEngine:
        """One for ``database``; close it. Raises what making it raises."""
        if database.role.value == "server":
            raise ConfigError(
                f"{self.path} is a server's database: devices sync with it through `entidb serve`"
            )
        if self._collections == "all":
            database.set_scope(None)
        config = self._config(self._name_on_server(database), self._scope())
        return SyncEngine(config, self.url, database, token=self._token)

    def _config(self, db_id: str, collections: tuple[str, ...] | None) -> SyncConfig:
        return SyncConfig(db_id=db_id, collections=collections, **self._settings)

    def _name_on_server(self, database: Database) -> str:
        known = DatabaseApplier(database).state().db_id
        name = self._db_id or known
        if name is None:
            raise UsageError(
                "which database on the server? give --db NAME for the first sync (or ENTIDB_DB)"
            )
        return name

    def _scope(self) -> tuple[str, ...] | None:
        if self._collections in (None, "all"):
            return None
        assert self._collections is not None
        return tuple(self._collections.split(","))


def _show_waiting(bar: Bar, state: SyncState) -> None:
    if state is SyncState.RETRY_WAIT:
        bar.reach(0, description="no answer; waiting to try again")


def _show(bar: Bar, step: SyncProgress) -> None:
    bar.reach(step.operations, step.operations_total, _PHASES.get(step.state, step.state.value))


def on_a_thread(engine: SyncEngine, call: Callable[[], T]) -> T:
    """What ``call`` returns, which syncs with ``engine``; Ctrl-C ends it at once."""
    done = SafeEvent()
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # goes on in the thread that waits
            errors.append(error)
        finally:
            done.set()

    thread = Thread(target=work, name="entidb-cli-sync", daemon=True)
    thread.start()
    try:
        # With a timeout, because without one Ctrl-C does nothing on Windows.
        while not done.wait(0.5):
            continue
    except BaseException:
        engine.close()
        thread.join()
        raise
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


# ---------------------------------------------------------------- reports


def _report_json(result: SyncCycleResult, status: SyncStatus, url: str) -> None:
    print_json({"url": url, **document(result, status)})


def report_watched(result: SyncCycleResult, status: SyncStatus, url: str) -> None:
    """A line of ``--watch --json``."""
    live = {"live": status.live, "live_since_ms": status.live_since_ms}
    print_json({"url": url, **document(result, status), **live, "heard_ms": status.heard_ms})


def _report_lines(result: SyncCycleResult, status: SyncStatus, url: str) -> None:
    for line in lines(result, status, url):
        say(line)


def _exit_of(result: SyncCycleResult, status: SyncStatus) -> Exit:
    unfinished = result.incomplete or result.kept_back or status.conflicts or status.held
    return Exit.UNRESOLVED if unfinished else Exit.OK
