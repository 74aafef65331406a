"""Where ``entidb admin`` asks, and what makes a command of it. A command is a request to the
server's administration, over the socket in its data directory, or to a URL with a token.
"""

from __future__ import annotations

import errno
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

import click
from msgspec import Raw, json

from entidb.cli.exits import NotFoundError, UsageError
from entidb.cli.output import say
from entidb.cli.values import print_json
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
        except PermissionError as error:
            from entidb.storage.disk_errors import disk_error

            doing = f"asking the server of {self.data_dir}, as its own user or as root"
            raise disk_error(error.errno or errno.EACCES, doing) from error
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            raise TransportError(f"asking the server of {self.data_dir} failed: {said}") from error
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


def desk_of(data_dir: str | None, url: str | None, token_file: str | None) -> Desk:
    """The desk that the options name. Raises ``UsageError``, ``ConfigError``."""
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


Result = tuple[Any, Callable[[Any], Iterable[str]]]

NAME: Final = click.argument("name")
LIMIT: Final = click.option("--limit", type=click.IntRange(1, 10_000), default=100,
                            show_default=True, help="How many at most.")  # fmt: skip
DATABASE: Final = click.option("--database", metavar="NAME", help="In this database only.")


def command(name: str, *decorators: Callable[[Any], Any]) -> Callable[[Any], click.Command]:
    """A command of the group, whose function is given the desk and what was typed, and returns the
    answer and how it looks for people; with ``--json`` the answer is printed as it is."""

    def declare(call: Callable[..., Result]) -> click.Command:
        def run(context: click.Context, as_json: bool, **given: Any) -> None:
            answer, view = call(context.obj(), **given)
            if as_json:
                print_json(answer)
                return
            for line in view(answer):
                say(line)

        made: Any = click.pass_context(run)
        made.__doc__ = call.__doc__
        for decorate in reversed((*decorators, json_option)):
            made = decorate(made)
        return click.command(name)(made)

    return declare


def at(*parts: str) -> str:
    """An address of parts that may have any characters."""
    return "/".join(quote(part, safe="") for part in parts)


def given(**named: Any) -> dict[str, Any]:
    """Those that were typed."""
    return {name: value for name, value in named.items() if value not in (None, "", ())}
