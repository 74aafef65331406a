"""The command table, and the way out: every error is one line on standard error and an exit code.

Commands are loaded when they are named, so that ``entidb get`` pays for nothing of the server, and
a command whose packages are missing takes only itself down. What commands do is in their modules.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final, NoReturn, TextIO

import click

from entidb.cli.exits import CALLS, HINTS, Exit, exit_of
from entidb.cli.output import code_text, columns, one_line
from entidb.errors import EntiDBError
from entidb.version import VERSION

#: Command -> module and object; in the order of ``--help``.
COMMANDS: Final[dict[str, str]] = {
    "init": "entities:init_command",
    "put": "entities:put_command",
    "get": "entities:get_command",
    "delete": "entities:delete_command",
    "list": "entities:list_command",
    "import": "transfer:import_command",
    "export": "transfer:export_command",
    "sync": "syncing:sync_command",
    "status": "outbox:status_command",
    "pending": "outbox:pending_command",
    "conflicts": "outbox:conflicts_command",
    "resolve": "outbox:resolve_command",
    "discarded": "outbox:discarded_command",
    "reset": "outbox:reset_command",
    "logout": "signing:logout_command",
    "serve": "serving:serve_command",
    "secret": "serving:secret_command",
    "token": "serving:token_command",
    "admin": "admin:admin_command",
    "doctor": "doctor:doctor_command",
    "verify": "care:verify_command",
    "inspect": "care:inspect_command",
    "compact": "care:compact_command",
    "backup": "care:backup_command",
    "snapshot": "snapshots:snapshot_command",
    "restore": "restoring:restore_command",
    "renew": "copying:renew_command",
    "copy": "copying:copy_command",
    "index": "indexing:index_command",
    "migrate": "migrating:migrate_command",
    "demo": "demo:demo_command",
    "version": "care:version_command",
}
#: What commands read from the environment, beside the options of ``serve``.
VARIABLES: Final = (
    "ENTIDB_DIR",
    "ENTIDB_URL",
    "ENTIDB_DB",
    "ENTIDB_TOKEN",
    "ENTIDB_TOKEN_FILE",
    "ENTIDB_ADMIN_URL",
    "ENTIDB_ADMIN_TOKEN",
    "ENTIDB_DEBUG",
)
#: How much alike two names are, of which one is the other misspelt.
_NEAR: Final = 0.85
#: What ``--help`` says of each without loading it: the first sentence of its own help.
SUMMARIES: Final[dict[str, str]] = {
    "init": "Make a new, empty database in the directory DIR.",
    "put": "Store VALUE under ID, or under a new id, and print the id.",
    "get": "Print the entity ID of COLLECTION as JSON.",
    "delete": "Delete the entity ID of COLLECTION.",
    "list": "List the collections, or the entities of one in order of ids.",
    "import": "Read the rows of a file into a collection.",
    "export": "Write a collection as NDJSON or CSV.",
    "sync": "Synchronise with the server at URL: pull, merge, push.",
    "status": "Say what is synchronised, pending, and waiting for you.",
    "pending": "List what the server has not decided yet, oldest first.",
    "conflicts": "List the conflicts that wait for you, with all values.",
    "resolve": "Decide a conflict; the next sync pushes what was decided.",
    "discarded": "List what was withdrawn or overruled, why, and what it lost to.",
    "reset": "Start over with a server that was restored or made anew.",
    "logout": "Let somebody else have this device.",
    "serve": "Serve the databases in DIR to devices.",
    "secret": "Make a secret for `entidb serve` and `entidb token`, and print it.",
    "token": "Make a token that `entidb serve` accepts, and print it.",
    "admin": "Look after a running server: databases, devices, keys, tasks.",
    "doctor": "Look for what is wrong with how a server is run, and say what to change.",
    "verify": "Check every record, checksum and cross-reference.",
    "inspect": "Show what is in a database: sizes, counters, identity.",
    "compact": "Give unused room back to the file system.",
    "backup": "Write a consistent copy to the new directory TARGET.",
    "snapshot": "Write a server's database to FILE, for devices that begin from it.",
    "restore": "Put a backup in the place of a server's database.",
    "renew": "Begin a new history of a server's database whose files or rows were put back.",
    "copy": "Copy a database, or all of a server, to another place, with its history.",
    "index": "Show the indexes of a database, and how far each is built.",
    "migrate": "Rewrite a collection in the shape that FUNCTION makes of each entity.",
    "demo": "Show everything on this machine: a server, three devices, and what can go wrong.",
    "version": "Show the versions of EntiDB and of the packages that it uses.",
}


#: Headings of ``--help``, each with the first command below it; those of docs/cli.md.
HEADINGS: Final[dict[str, str]] = {
    "init": "Entities",
    "import": "Files",
    "sync": "Synchronising",
    "serve": "The server",
    "verify": "Care",
    "demo": "EntiDB itself",
}


class _Entidb(click.Group):
    """The group ``entidb``; ``main`` ends the process with an exit code of the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # As wide as the longest name, so that the columns of all groups are one.
        width = max(map(len, SUMMARIES))
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, summary in SUMMARIES.items():
            rows = groups.setdefault(HEADINGS.get(name, next(reversed(groups), "")), [])
            rows.append((name.ljust(width), summary))
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        try:
            command = getattr(import_module(f"entidb.cli.{module}"), name)
        except ImportError as error:
            return _unavailable(cmd_name, error)
        assert isinstance(command, click.Command)
        return command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """As click's, with our exit codes. For ``CliRunner`` and for programs that call the
        group."""
        sys.exit(run(args))

    def run_click(self, args: Sequence[str] | None) -> Any:
        """What click's ``main`` does, without its own way to end a process."""
        if "_ENTIDB_COMPLETE" in os.environ:  # a shell asks how a line could go on
            return super().main(prog_name="entidb")
        given = sys.argv[1:] if args is None else list(args)
        _warn_of_misspelt()
        try:
            # By itself click takes no terminal to be narrower than 50 columns.
            narrow: dict[str, Any] = {"terminal_width": columns() - 2} if columns() < 52 else {}
            with self.make_context("entidb", given, **narrow) as context:
                return self.invoke(context)
        except click.exceptions.Exit as ended:  # --help and --version
            return ended.exit_code


def _warn_of_misspelt() -> None:
    """A variable that is called nearly as one of ours does nothing, and nobody would notice."""
    for name in os.environ:
        # Those of `entidb serve` are looked at by that.
        ours = name.startswith("ENTIDB_") and not name.startswith("ENTIDB_SERVE_")
        if ours and name not in VARIABLES:
            from difflib import get_close_matches  # which most commands have no use for

            near = get_close_matches(name, VARIABLES, 1, _NEAR)
            if near:
                said = f"warning: nothing reads {name}: is {near[0]} meant?"
                click.echo(one_line(said), err=True)


def _unavailable(name: str, error: ImportError) -> click.Command:
    """Takes the place of a command that cannot be loaded; the others still can."""
    reason = one_line(str(error))

    @click.command(
        name,
        help=f"(not available: {reason})",
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def unavailable(words: tuple[str, ...]) -> NoReturn:
        raise EntiDBError(
            f"`entidb {name}` is not available: {reason}", code="command_unavailable"
        ) from error

    return unavailable


@click.group(
    cls=_Entidb,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="DIR is a database directory; with ENTIDB_DIR set, or --dir given, it is left out. "
    "Ids may be shortened while they stay unambiguous. `entidb COMMAND --help` has more of each; "
    "exit codes: docs/cli.md.",
)
@click.version_option(VERSION, message="entidb %(version)s")
def cli() -> None:
    """EntiDB: an embedded, transactional entity database that synchronises."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; its exit code. Raises only what a debugger wants to see."""
    _open_missing_streams()
    _make_streams_safe()
    try:
        return _run(arguments)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _empty(stream)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        with _signals_as_exits():
            result = cli.run_click(arguments)
            sys.stdout.flush()
            return result if isinstance(result, int) else Exit.OK
    except SystemExit as ended:  # SIGTERM, or a command's own way to say it
        return ended.code if isinstance(ended.code, int) else Exit.FAILURE
    except BrokenPipeError:
        return Exit.BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort) as stopped:
        said = str(stopped) or "stopped by Ctrl-C; what was committed stays"
        return fail("interrupted", said, Exit.INTERRUPTED)
    except click.ClickException as error:
        return _fail_usage(error)
    except EntiDBError as error:
        _print_details()
        return fail(error.code, _with_hint(error), exit_of(error))
    except ImportError as error:
        _print_details()
        return fail("missing_extra", str(error), Exit.FAILURE)
    except OSError as error:
        _print_details()
        return fail("os_error", _os_words(error), Exit.STORAGE)
    except Exception as error:
        _print_details()
        hint = "this is a bug in EntiDB; ENTIDB_DEBUG=1 shows where"
        return fail("internal", f"{type(error).__name__}: {error} ({hint})", Exit.FAILURE)


def fail(code: str, message: str, exit_code: Exit) -> int:
    """Print the one line of an error; returns the exit code."""
    with contextlib.suppress(OSError):  # Where nobody can be told, the exit code still says it.
        click.echo(f"error[{code_text(code)}]: {one_line(message)}", err=True)
    return exit_code


def _os_words(error: OSError) -> str:
    from entidb.storage.disk_errors import disk_error  # --help needs no storage

    what = error.strerror or str(error)
    if error.filename is not None and error.errno is not None:
        return str(disk_error(error.errno, os.fsdecode(error.filename)))
    if isinstance(error, FileNotFoundError) and not _has_directory():
        return "the directory in which this process runs is gone; change to one that is there"
    # What has a name is named where it is opened.
    return f"standard output or a file that was open: {what}; what was committed stays"


def _has_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _with_hint(error: EntiDBError) -> str:
    said = str(error)
    for call, command in CALLS.items():
        said = said.replace(call, command)
    hint = HINTS.get(error.code)
    return said if hint is None else f"{said}; {hint}"


def _fail_usage(error: click.ClickException) -> int:
    message = error.format_message()
    if not isinstance(error, click.UsageError):
        return fail("failed", message, Exit.FAILURE)
    path = error.ctx.command_path if error.ctx is not None else "entidb"
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(message)
        return Exit.USAGE
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        earlier = _group_with(error.ctx, error.option_name)
        if earlier is not None:
            rest = path.removeprefix(earlier).strip()
            message = f"{error.option_name} comes before {rest}: `{earlier} {error.option_name} …"
            return fail("usage", f"{message} {rest}`", Exit.USAGE)
    return fail("usage", f"{message.rstrip('.')}; see `{path} --help`", Exit.USAGE)


def _group_with(context: click.Context, option: str) -> str | None:
    """The command, among those that ``context`` is below, that has ``option``."""
    above = context.parent
    while above is not None:
        if any(option in param.opts for param in above.command.params):
            return above.command_path
        above = above.parent
    return None


def _print_details() -> None:
    if os.environ.get("ENTIDB_DEBUG") not in (None, "", "0"):
        import traceback

        traceback.print_exc()


@contextlib.contextmanager
def _signals_as_exits() -> Any:
    """SIGTERM ends a command as an exception does, so that everything is closed in order; so does
    SIGHUP, the end of a terminal, unless somebody wants it otherwise (``nohup``)."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(Exit.TERMINATED if number == signal.SIGTERM else Exit.HUNG_UP)

    numbers = [signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:
        numbers.append(hangup)
    try:
        before = {number: signal.signal(number, leave) for number in numbers}
    except ValueError:  # not the main thread: the main thread handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_missing_streams() -> None:
    """A standard stream that was closed (``>&-``) reads and writes nothing. Left as it is, the next
    file opened would get its number, and everything that goes to standard error would be written
    into a database.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        mode = "w" if number else "r"
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _make_streams_safe() -> None:
    """A character the terminal cannot show is written as an escape, not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _empty(stream: TextIO) -> None:
    """What cannot be written any more is dropped: the interpreter would try once more at its end,
    complain, and end with an exit code of its own."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


__all__ = ["COMMANDS", "cli", "fail", "run"]
