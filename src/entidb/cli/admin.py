"""``admin``: looking after a running server, beside it or from afar.

What can be asked is in ``entidb.server.admin.routes``; ``admin_desk`` asks it, ``admin_looking``
has the commands that look at how things are, and ``admin_views`` says how answers look for people.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Final

import click
from msgspec import json

from entidb.cli import admin_views as views
from entidb.cli.admin_desk import DATABASE, LIMIT, NAME, Desk, Result, at, command, desk_of
from entidb.cli.admin_looking import LOOKING
from entidb.cli.exits import UsageError
from entidb.cli.output import WholeGroup
from entidb.cli.values import Bounded
from entidb.errors import EntiDBError


@click.group("admin", cls=WholeGroup)
@click.option("--dir", "data_dir", metavar="DIR", envvar="ENTIDB_SERVE_DATA_DIR", show_envvar=True,
              help="The data directory of a server here, or a postgresql:// address.")  # fmt: skip
@click.option("--url", metavar="URL", envvar="ENTIDB_ADMIN_URL", show_envvar=True,
              help="The address of a server anywhere.")  # fmt: skip
@click.option("--token-file", metavar="FILE",
              help="File with a token made with --admin; else ENTIDB_ADMIN_TOKEN.")  # fmt: skip
@click.pass_context
def admin_command(
    context: click.Context, data_dir: str | None, url: str | None, token_file: str | None
) -> None:
    """Look after a running server: databases, devices, keys, tasks.

    With --dir it goes through a socket in the data directory, which only the user of the server
    and root can use; or, for a server on PostgreSQL, through that. With --url it goes over the
    network, with a token.
    """
    context.obj = lambda: desk_of(data_dir, url, token_file)


for _each in LOOKING:
    admin_command.add_command(_each)


def _command(name: str, *decorators: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A command that is part of the group."""

    def declare(call: Callable[..., Result]) -> None:
        admin_command.add_command(command(name, *decorators)(call))

    return declare


_REASON: Final = click.option("--reason", default="", help="Why; it is kept in the audit log.")
_KIND: Final = click.argument("kind", type=click.Choice(["device", "subject", "token"]))


def _asked(what: str) -> str:
    """The name that somebody types to confirm ``what``; not on standard output, which has the
    answer. Raises ``UsageError`` where there is nobody to type."""
    click.echo(f"{what}. Its name once more: ", nl=False, err=True)
    typed = sys.stdin.readline()
    if not typed:
        click.echo(err=True)
        raise UsageError("nobody confirmed this: give --confirm NAME, with the name once more")
    return typed.strip()


@_command("databases")
def databases_command(desk: Desk) -> Result:
    """List the databases: size, entities, head, devices, last use."""
    return desk.ask("GET", "databases"), views.databases


@_command("show", NAME)
def show_command(desk: Desk, name: str) -> Result:
    """Show a database with its present figures."""
    return desk.ask("GET", at("databases", name)), views.database


@_command("create", NAME)
def create_command(desk: Desk, name: str) -> Result:
    """Make a database."""
    return desk.ask("POST", "databases", {"name": name}), views.database


@_command("freeze", NAME, _REASON)
def freeze_command(desk: Desk, name: str, reason: str) -> Result:
    """Let a database be read only; what devices have pending waits."""
    return desk.ask("POST", at("databases", name, "freeze"), {"reason": reason}), views.database


@_command("thaw", NAME)
def thaw_command(desk: Desk, name: str) -> Result:
    """Let a frozen database be written to again."""
    return desk.ask("POST", at("databases", name, "thaw")), views.database


@_command("rename", NAME, click.argument("to"))
def rename_command(desk: Desk, name: str, to: str) -> Result:
    """Give a database another name. Devices know it by the old one."""
    return desk.ask("POST", at("databases", name, "rename"), {"to": to}), views.database


@_command("delete", NAME, click.option("--confirm", metavar="NAME", help="The name once more."))
def delete_command(desk: Desk, name: str, confirm: str | None) -> Result:
    """Delete a database. It can be taken back for a day."""
    if confirm is None:
        confirm = _asked(f"This takes {name} away from its devices")
    return desk.ask("DELETE", at("databases", name), {"confirm": confirm}), views.aside


@_command("deleted")
def deleted_command(desk: Desk) -> Result:
    """List the databases that can be taken back."""
    return desk.ask("GET", "deleted"), views.deleted


@_command("undelete", click.argument("identity", metavar="ID"))
def undelete_command(desk: Desk, identity: str) -> Result:
    """Take a deleted database back, by the id that `deleted` lists."""
    return desk.ask("POST", at("deleted", identity, "undelete")), views.database


@_command("revoke", _KIND, NAME, DATABASE, _REASON)
def revoke_command(desk: Desk, kind: str, name: str, database: str | None, reason: str) -> Result:
    """Lock a device, a subject or a token (by its `jti`) out, at once.

    A device id is what a device says of itself: to keep out whoever has a stolen one, revoke its
    token or its subject too.
    """
    body = {"kind": kind, "name": name, "database": database, "reason": reason}
    return desk.ask("POST", "revoked", body), views.revocation


@_command("allow", _KIND, NAME, DATABASE)
def allow_command(desk: Desk, kind: str, name: str, database: str | None) -> Result:
    """Let a device, a subject or a token in again."""
    body = {"kind": kind, "name": name, "database": database}
    return desk.ask("DELETE", "revoked", body), views.changed


@_command("revoked")
def revoked_command(desk: Desk) -> Result:
    """List who is locked out."""
    return desk.ask("GET", "revoked"), views.revoked


@_command("keys")
def keys_command(desk: Desk) -> Result:
    """List the keys that tokens are signed with."""
    return desk.ask("GET", "keys"), views.keys


@_command("reload")
def reload_command(desk: Desk) -> Result:
    """Read the keys again now."""
    return desk.ask("POST", "keys/reload"), views.keys


@_command("audit", LIMIT)
def audit_command(desk: Desk, limit: int) -> Result:
    """Read the audit log, newest first."""
    return desk.ask("GET", "audit", limit=limit), views.audit


@_command("nodes")
def nodes_command(desk: Desk) -> Result:
    """List the processes of the server, and which is on duty."""
    return desk.ask("GET", "nodes"), views.nodes


@_command("tasks")
def tasks_command(desk: Desk) -> Result:
    """List the tasks, newest first."""
    return desk.ask("GET", "tasks"), views.tasks


@_command("cancel", click.argument("number", type=int))
def cancel_command(desk: Desk, number: int) -> Result:
    """Cancel a task."""
    return desk.ask("POST", at("tasks", str(number), "cancel")), views.changed


_WAIT: Final = click.option("--wait/--no-wait", default=True, show_default=True,
                            help="Wait until it is done.")  # fmt: skip


def _task(desk: Desk, path: str, body: dict[str, Any], wait: bool) -> Result:
    task = desk.ask("POST", path, body)
    return wait_for(desk, task) if wait else task, views.task


@_command("backup", click.argument("name", required=False),
          click.option("--all", "every", is_flag=True, help="Every database."), _WAIT)  # fmt: skip
def backup_command(desk: Desk, name: str | None, every: bool, wait: bool) -> Result:
    """Make a backup of a database, or of all, and verify it."""
    if (name is None) is not every:
        raise UsageError("which database? give NAME or --all")
    if name is not None:
        return _task(desk, at("databases", name, "backup"), {}, wait)
    tasks = desk.ask("POST", "backups")
    return [wait_for(desk, task) for task in tasks] if wait else tasks, views.tasks


@_command("backups")
def backups_command(desk: Desk) -> Result:
    """List the backups, newest first."""
    return desk.ask("GET", "backups"), views.backups


@_command("restore", NAME, click.argument("backup", metavar="ID"), _WAIT,
          click.option("--confirm", metavar="NAME", help="The name once more."))  # fmt: skip
def restore_command(desk: Desk, name: str, backup: str, wait: bool, confirm: str | None) -> Result:
    """Put a backup in the place of a database, which can be taken back for a day.

    The database begins a new history: every device stops until its program has chosen a side.
    """
    if confirm is None:
        confirm = _asked(f"This replaces {name} by an older state")
    body = {"backup": backup, "confirm": confirm}
    return _task(desk, at("databases", name, "restore"), body, wait)


@_command("verify", NAME, _WAIT)
def verify_command(desk: Desk, name: str, wait: bool) -> Result:
    """Check every record of a database, on a copy."""
    return _task(desk, at("databases", name, "verify"), {}, wait)


@_command("compact", NAME, _WAIT)
def compact_command(desk: Desk, name: str, wait: bool) -> Result:
    """Give unused room of a database back to the file system; requests to it wait."""
    return _task(desk, at("databases", name, "compact"), {}, wait)


_DAYS: Final = click.option(
    "--days", type=Bounded(0, 100_000), help="Older than this; else as the retention."
)


@_command("purge", NAME, _DAYS, _WAIT)
def purge_command(desk: Desk, name: str, wait: bool, days: float | None) -> Result:
    """Forget old deletions. Devices that were away for longer pull everything anew."""
    return _task(desk, at("databases", name, "purge"), {"days": days}, wait)


@_command("erase", NAME, _WAIT,
          click.option("--where", "wanted", nargs=2, multiple=True, required=True,
                       metavar="COLLECTION CONDITION", help="What to erase; CONDITION is JSON."),
          click.option("--confirm", metavar="TOKEN", help="What the preview said."),
          click.option("--backups", is_flag=True,
                       help="Remove the backups that have it, too."))  # fmt: skip
def erase_command(
    desk: Desk,
    name: str,
    wait: bool,
    wanted: tuple[tuple[str, str], ...],
    confirm: str | None,
    backups: bool,
) -> Result:
    """Erase a person. Without --confirm only counts what would go.

    What is found is deleted for every device, and gone from the bytes of the database's files;
    devices that are behind pull everything anew. The answer names who may still have it.
    """
    body: dict[str, Any] = {"collections": {each: _condition(text) for each, text in wanted}}
    if len(body["collections"]) < len(wanted):
        raise UsageError("give each collection once; a condition can join several with |")
    if confirm is None:
        return desk.ask("POST", at("databases", name, "erase", "preview"), body), views.preview
    body |= {"confirm": confirm, "backups": backups}
    return _task(desk, at("databases", name, "erase"), body, wait)


def _condition(text: str) -> Any:
    try:
        return json.decode(text)
    except ValueError as error:
        raise UsageError(f"a condition of --where is no JSON: {error}") from error


def wait_for(desk: Desk, task: dict[str, Any]) -> dict[str, Any]:
    """The task when it is over. Raises ``EntiDBError`` (failed) if it did not come to a good
    end."""
    while task.get("ended_ms") is None:
        time.sleep(0.2)
        task = desk.ask("GET", at("tasks", str(task["id"])))
    if task["state"] != "done":
        raise EntiDBError(f"the task {task['state']}: {task.get('error', '')}", code="failed")
    return task
