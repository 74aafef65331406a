"""``admin``: looking after a running server, beside it or from afar.

A command is a request to the server's administration, over the socket in its data directory, or to
a URL with a token. What can be asked is in ``entidb.server.admin.routes``; how answers look for
people is ``admin_views``.
"""

from __future__ import annotations

import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

import click
from msgspec import Raw, json

from entidb.cli import admin_views as views
from entidb.cli.exits import NotFoundError, UsageError
from entidb.cli.output import WholeGroup, say
from entidb.cli.values import Bounded, print_json
from entidb.credentials import read_token
from entidb.errors import (
    ERROR_TABLE,
    ConfigError,
    EntiDBError,
    TransportError,
    error_from_code,
)
from entidb.storage.addresses import is_address

_PREFIX: Final = "/v1/admin/"
_TIMEOUT_S: Final = 120.0
_BYTES_MAX: Final = 64 * 2**20
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@dataclass(frozen=True)
class Desk:
    """Where to ask."""

    data_dir: str | None
    url: str | None
    token: str | None

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
        """What the server answers. Raises the error that it names."""
        if self.url is not None:
            status, data = self._over_http(method, path, body or {}, query)
        else:
            status, data = self._beside(method, path, body or {}, query)
        try:
            answer = json.decode(data)
        except ValueError as error:
            raise TransportError(
                f"what answered with status {status} is no EntiDB server", code="unexpected_answer"
            ) from error
        if status != 200:
            raise _error(status, answer)
        return answer

    def _beside(
        self, method: str, path: str, body: dict[str, Any], query: dict[str, Any]
    ) -> tuple[int, bytes]:
        from entidb.server.admin.local import LocalRequest, ask
        from entidb.server.nodes.door import ask_nodes

        assert self.data_dir is not None
        request = LocalRequest(
            method,
            _PREFIX + path,
            {name: str(value) for name, value in query.items()},
            Raw(json.encode(body)),
        )
        if is_address(self.data_dir):
            answer = ask_nodes(self.data_dir, request, _TIMEOUT_S)
            return answer.status, bytes(answer.body)
        try:
            answer = ask(self.data_dir, request, _TIMEOUT_S)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise TransportError(
                f"no server of this machine serves {self.data_dir}: start one, or give --url"
            ) from error
        except (OSError, ValueError) as error:
            raise TransportError(f"asking the server of {self.data_dir} failed: {error}") from error
        return answer.status, bytes(answer.body)

    def _over_http(
        self, method: str, path: str, body: dict[str, Any], query: dict[str, Any]
    ) -> tuple[int, bytes]:
        assert self.url is not None
        where = self.url.rstrip("/") + _PREFIX + path
        if query:
            where += "?" + urlencode(query)
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(
            where, json.encode(body) if method != "GET" else None, headers, method=method
        )
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=_TIMEOUT_S) as answer:
                return answer.status, answer.read(_BYTES_MAX)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(_BYTES_MAX)
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, ssl.SSLError):
                raise TransportError(
                    f"the certificate of {self.url} is not accepted: {reason}", code="tls_error"
                ) from error
            raise TransportError(f"{self.url} cannot be reached: {reason}") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token goes where it was meant to go."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def _error(status: int, answer: Any) -> EntiDBError:
    given = answer if isinstance(answer, dict) else {}
    code, message = str(given.get("code", "")), str(given.get("message", f"status {status}"))
    if code in ("unknown_database", "not_found"):
        return NotFoundError(message, code=code)
    if code in ERROR_TABLE:
        return error_from_code(code, message)
    if status >= 500:
        return EntiDBError(message, code=code or "server_error")
    return ConfigError(message, code=code or "failed")


def _desk(data_dir: str | None, url: str | None, token_file: str | None) -> Desk:
    token = os.environ.get("ENTIDB_ADMIN_TOKEN") or None
    if token_file is not None:
        token = read_token(token_file)
    if url is None:
        if not data_dir:
            raise UsageError(
                "which server? name its data directory, or its address, before the command: "
                "`entidb admin --dir DIR databases`, or --url URL in the place of --dir DIR"
            )
        return Desk(data_dir, None, None)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url wants an address like https://sync.example.org, not {url!r}")
    if token is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise ConfigError(
            f"the token would cross the network in the clear to {parts.hostname}: use https://",
            code="insecure_token",
        )
    return Desk(None, url, token)


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
    context.obj = lambda: _desk(data_dir, url, token_file)


def _command(name: str, *decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A command of the group, which is given the desk and ``--json``."""

    def declare(call: Callable[..., Any]) -> Any:
        def run(context: click.Context, as_json: bool, **given: Any) -> Any:
            answer, view = call(context.obj(), **given)
            if as_json:
                print_json(answer)
                return None
            for line in view(answer):
                say(line)
            return None

        made: Any = click.pass_context(run)
        made.__doc__ = call.__doc__
        for decorate in reversed((*decorators, json_option)):
            made = decorate(made)
        return admin_command.command(name)(made)

    return declare


_NAME: Final = click.argument("name")
_REASON: Final = click.option("--reason", default="", help="Why; it is kept in the audit log.")
_LIMIT: Final = click.option("--limit", type=click.IntRange(1, 10_000), default=100,
                             show_default=True, help="How many at most.")  # fmt: skip
_KIND: Final = click.argument("kind", type=click.Choice(["device", "subject", "token"]))
_DATABASE: Final = click.option("--database", metavar="NAME", help="In this database only.")

Result = tuple[Any, Callable[[Any], Any]]


def _asked(what: str) -> str:
    """The name that somebody types to confirm ``what``; not on standard output, which has the
    answer. Raises ``UsageError`` where there is nobody to type."""
    click.echo(f"{what}. Its name once more: ", nl=False, err=True)
    typed = sys.stdin.readline()
    if not typed:
        click.echo(err=True)
        raise UsageError("nobody confirmed this: give --confirm NAME, with the name once more")
    return typed.strip()


def _at(*parts: str) -> str:
    return "/".join(quote(part, safe="") for part in parts)


@_command("databases")
def databases_command(desk: Desk) -> Result:
    """List the databases: size, entities, head, devices, last use."""
    return desk.ask("GET", "databases"), views.databases


@_command("show", _NAME)
def show_command(desk: Desk, name: str) -> Result:
    """Show a database with its present figures."""
    return desk.ask("GET", _at("databases", name)), views.database


@_command("create", _NAME)
def create_command(desk: Desk, name: str) -> Result:
    """Make a database."""
    return desk.ask("POST", "databases", {"name": name}), views.database


@_command("freeze", _NAME, _REASON)
def freeze_command(desk: Desk, name: str, reason: str) -> Result:
    """Let a database be read only; what devices have pending waits."""
    return desk.ask("POST", _at("databases", name, "freeze"), {"reason": reason}), views.database


@_command("thaw", _NAME)
def thaw_command(desk: Desk, name: str) -> Result:
    """Let a frozen database be written to again."""
    return desk.ask("POST", _at("databases", name, "thaw")), views.database


@_command("rename", _NAME, click.argument("to"))
def rename_command(desk: Desk, name: str, to: str) -> Result:
    """Give a database another name. Devices know it by the old one."""
    return desk.ask("POST", _at("databases", name, "rename"), {"to": to}), views.database


@_command("delete", _NAME, click.option("--confirm", metavar="NAME", help="The name once more."))
def delete_command(desk: Desk, name: str, confirm: str | None) -> Result:
    """Delete a database. It can be taken back for a day."""
    if confirm is None:
        confirm = _asked(f"This takes {name} away from its devices")
    return desk.ask("DELETE", _at("databases", name), {"confirm": confirm}), views.aside


@_command("deleted")
def deleted_command(desk: Desk) -> Result:
    """List the databases that can be taken back."""
    return desk.ask("GET", "deleted"), views.deleted


@_command("undelete", click.argument("identity", metavar="ID"))
def undelete_command(desk: Desk, identity: str) -> Result:
    """Take a deleted database back, by the id that `deleted` lists."""
    return desk.ask("POST", _at("deleted", identity, "undelete")), views.database


@_command("devices", _NAME, _LIMIT)
def devices_command(desk: Desk, name: str, limit: int) -> Result:
    """List the devices of a database: who, when, how far behind."""
    return desk.ask("GET", _at("databases", name, "devices"), limit=limit), views.devices


@_command("quotas", _DATABASE, _LIMIT)
def quotas_command(desk: Desk, database: str | None, limit: int) -> Result:
    """List what databases and devices use of what they may, the fullest first."""
    return desk.ask("GET", "quotas", limit=limit, **_in(database)), views.quotas


@_command("images", _DATABASE)
def images_command(desk: Desk, database: str | None) -> Result:
    """List the images of databases, with which devices begin: how old, how large."""
    return desk.ask("GET", "images", **_in(database)), views.images


def _in(database: str | None) -> dict[str, Any]:
    return {} if database is None else {"database": database}


@_command("revoke", _KIND, _NAME, _DATABASE, _REASON)
def revoke_command(desk: Desk, kind: str, name: str, database: str | None, reason: str) -> Result:
    """Lock a device, a subject or a token (by its `jti`) out, at once.

    A device id is what a device says of itself: to keep out whoever has a stolen one, revoke its
    token or its subject too.
    """
    body = {"kind": kind, "name": name, "database": database, "reason": reason}
    return desk.ask("POST", "revoked", body), views.revocation


@_command("allow", _KIND, _NAME, _DATABASE)
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


@_command("audit", _LIMIT)
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
    return desk.ask("POST", _at("tasks", str(number), "cancel")), views.changed


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
        return _task(desk, _at("databases", name, "backup"), {}, wait)
    tasks = desk.ask("POST", "backups")
    return [wait_for(desk, task) for task in tasks] if wait else tasks, views.tasks


@_command("backups")
def backups_command(desk: Desk) -> Result:
    """List the backups, newest first."""
    return desk.ask("GET", "backups"), views.backups


@_command("restore", _NAME, click.argument("backup", metavar="ID"), _WAIT,
          click.option("--confirm", metavar="NAME", help="The name once more."))  # fmt: skip
def restore_command(desk: Desk, name: str, backup: str, wait: bool, confirm: str | None) -> Result:
    """Put a backup in the place of a database, which can be taken back for a day.

    The database begins a new history: every device stops until its program has chosen a side.
    """
    if confirm is None:
        confirm = _asked(f"This replaces {name} by an older state")
    body = {"backup": backup, "confirm": confirm}
    return _task(desk, _at("databases", name, "restore"), body, wait)


@_command("verify", _NAME, _WAIT)
def verify_command(desk: Desk, name: str, wait: bool) -> Result:
    """Check every record of a database, on a copy."""
    return _task(desk, _at("databases", name, "verify"), {}, wait)


@_command("compact", _NAME, _WAIT)
def compact_command(desk: Desk, name: str, wait: bool) -> Result:
    """Give unused room of a database back to the file system; requests to it wait."""
    return _task(desk, _at("databases", name, "compact"), {}, wait)


_DAYS: Final = click.option(
    "--days", type=Bounded(0, 100_000), help="Older than this; else as the retention."
)


@_command("purge", _NAME, _DAYS, _WAIT)
def purge_command(desk: Desk, name: str, wait: bool, days: float | None) -> Result:
    """Forget old deletions. Devices that were away for longer pull everything anew."""
    return _task(desk, _at("databases", name, "purge"), {"days": days}, wait)


@_command("erase", _NAME, _WAIT,
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
        return desk.ask("POST", _at("databases", name, "erase", "preview"), body), views.preview
    body |= {"confirm": confirm, "backups": backups}
    return _task(desk, _at("databases", name, "erase"), body, wait)


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
        task = desk.ask("GET", _at("tasks", str(task["id"])))
    if task["state"] != "done":
        raise EntiDBError(f"the task {task['state']}: {task.get('error', '')}", code="failed")
    return task
