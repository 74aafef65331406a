"""``serve`` and ``token``: running the server, and making the tokens it accepts.

The options of ``serve`` are the fields of ``ServerConfig`` and ``Listen``, each with its default
and its meaning; a test compares. What they do is in ``entidb.server``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Final, TypeVar

import click

from entidb.cli.exits import InputError, UsageError
from entidb.cli.output import note, one_line, say, time_text, warn_of_exposure
from entidb.cli.values import parse, print_json
from entidb.cli.words import as_options, json_option, once
from entidb.credentials import read_credential, write_credential
from entidb.errors import ConfigError
from entidb.server.config import ServerConfig, check_db_id
from entidb.types import SystemClock

F = TypeVar("F", bound=Callable[..., Any])

#: Every field of ``ServerConfig`` that a command line can set, and its meaning.
SETTINGS: Final[dict[str, str]] = {
    "jwt_secret_file": "File with the secret tokens are signed with (HS256), 32 bytes or more.",
    "jwt_secret_env": "Environment variable with that secret.",
    "jwt_public_key_file": "PEM file of the public key tokens are signed for (Ed25519, RSA, EC).",
    "jwt_keys": "Several keys at once: a directory of files named by kid, or a JWKS file.",
    "jwt_jwks_url": "Address of an identity provider's JWKS, over https.",
    "jwks_refresh_s": "Seconds after which those keys are fetched again.",
    "insecure_no_auth": "Let everybody do everything. Works on loopback only.",
    "allowed_hosts": "Another name this server is asked for by, without tokens; repeat it.",
    "cors_origins": "Origin of a web page that may use this server; repeat it.",
    "audience": "What a token's `aud` has to name.",
    "leeway_s": "Seconds a token counts beyond its times.",
    "workers": "Processes that serve together, for machines with several cores; on Linux.",
    "create_databases": "Make a database when a token that may write first asks for it.",
    "validate": "MODULE:FUNCTION called for every pushed transaction (found from here).",
    "schema": "Number of the newest schema of the programs that use this server.",
    "schema_min": "Programs of a lower schema may push, and not pull.",
    "upcast": "MODULE:FUNCTION that makes the newest shape of what older programs push.",
    "unique": "COLLECTION=FIELD[,FIELD…] that no two entities may share; repeat it.",
    "indexes": "COLLECTION=FIELD[,FIELD…] to find entities by; repeat it.",
    "transaction_bytes_max": "Bytes of one transaction.",
    "body_bytes_max": "Bytes of one request.",
    "push_operations_max": "Operations in one push.",
    "pull_operations_max": "Operations in one page of a pull.",
    "pull_bytes_max": "Bytes of values in one page of a pull.",
    "collections_max": "Collection names in one message.",
    "in_flight_bytes_max": "Bytes of messages in memory at once.",
    "push_queue_max": "Pushes that wait for a commit, in each database.",
    "subject_requests_per_s": "Requests of one subject in a second, over time; 0: any number.",
    "database_requests_per_s": "Requests to one database in a second, over time; 0: any number.",
    "database_entities_max": "Entities that a database may hold; 0: any number.",
    "database_bytes_max": "Bytes that the store of a database may take; 0: any number.",
    "database_devices_max": "Devices that a database may have; 0: any number.",
    "subject_devices_max": "Devices that one subject may have in a database; 0: any number.",
    "connections_max": "Connections at once.",
    "live_max": "Devices that wait for news at once; 0: none.",
    "live_subject_max": "The same for one subject of tokens.",
    "head_timeout_s": "Seconds for the head of a request.",
    "body_timeout_s": "Seconds for the body of a request.",
    "write_timeout_s": "Seconds after which a client that does not read is dropped.",
    "shutdown_timeout_s": "Seconds that requests under way get at the end.",
    "tombstone_retention_days": "Days that deletions are remembered.",
    "purge_interval_s": "Seconds between two looks for deletions to forget.",
    "idle_close_s": "Seconds after which an unused database is closed; 0: never.",
    "databases_open_max": "Databases open at once.",
    "segments_min_entities": "Entities from which a database has images for first syncs; 0: none.",
    "segments_dir": "Directory of images; all nodes on PostgreSQL have to have the same one.",
    "segments_redirect_to": "Path at which a proxy in front has the files in --segments-dir.",
    "backup_dir": "Directory for backups of the databases, best on another disk.",
    "backup_every_s": "Seconds between two backups of each database; 0: only when asked for.",
    "backup_keep": "Backups of each database that are kept.",
    "ready_disk_bytes_min": "Bytes free on the disk for GET /readyz to say that it is ready.",
    "compression": "Pack answers for clients that take it.",
    "compression_min_bytes": "Smaller answers are not packed.",
    "access_log": "A line of JSON for each request, on standard error.",
    "metrics": "Serve GET /metrics, which needs no token.",
    "console": "Serve a page for administrators at /console.",
}
#: Fields of ``Listen``; and the file that says that the server is ready.
LISTEN: Final[dict[str, tuple[Any, str]]] = {
    "host": ("127.0.0.1", "Address to listen on; 0.0.0.0 for all."),
    "port": (4984, "Port; 0 takes a free one."),
    "tls_cert": (None, "PEM file of the certificate: serve https."),
    "tls_key": (None, "PEM file of its key."),
    "backlog": (2048, "Connections the system keeps waiting."),
    "root_path": ("", "Path under which a proxy that strips it has the server."),
    "trusted_proxies": ("127.0.0.1", "Addresses whose X-Forwarded-For counts, with commas."),
    "ready_file": (None, "Write the URL here when the server listens."),
}
#: Shorter names that are understood too.
_ALIASES: Final = {
    "jwt_secret_file": "--secret-file",
    "jwt_secret_env": "--secret-env",
    "jwt_public_key_file": "--public-key-file",
    "jwt_keys": "--keys",
    "jwt_jwks_url": "--jwks-url",
}
#: Settings of which one has to be given.
WAYS_IN: Final = (*_ALIASES, "insecure_no_auth")
_DEFAULTS: Final = {
    each.name: each.default
    for each in dataclasses.fields(ServerConfig)
    if each.default is not dataclasses.MISSING
}
#: How options are called in the environment.
_PREFIX: Final = "ENTIDB_SERVE_"
#: Lists by collection: an option for each member.
_BY_COLLECTION: Final = ("unique", "indexes")
_DEFAULTS.update(dict.fromkeys(_BY_COLLECTION, ()))


def _option(name: str, default: Any, meaning: str) -> Callable[[F], F]:
    flag = "--" + name.replace("_", "-")
    if default is True:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    if isinstance(default, tuple):
        envvar = f"ENTIDB_SERVE_{name.upper()}"
        return click.option(flag, name, multiple=True, help=meaning, envvar=envvar)
    names = [flag, *([_ALIASES[name]] if name in _ALIASES else [])]
    kind = str if default is None else type(default)
    return click.option(
        *names,
        name,
        default=default,
        type=kind,
        is_flag=default is False or None,
        help=meaning,
        show_default=default not in (None, ""),
        envvar=f"ENTIDB_SERVE_{name.upper()}",
    )


def _settings(command: F) -> F:
    for name, meaning in reversed(SETTINGS.items()):
        command = _option(name, _DEFAULTS[name], meaning)(command)
    for name, (default, meaning) in reversed(LISTEN.items()):
        command = _option(name, default, meaning)(command)
    return command


@click.command("serve")
@click.argument("data_dir", metavar="DIR", required=False, envvar="ENTIDB_SERVE_DATA_DIR")
@_settings
def serve_command(data_dir: str | None, **given: Any) -> None:
    """Serve the databases in DIR to devices.

    Until Ctrl-C or SIGTERM; then what is under way is finished. DIR holds one directory for each
    database and is made if missing; or it is the address of a PostgreSQL database,
    postgresql://USER@HOST/NAME, which several servers may serve (set it in the environment if it
    has a password). Exactly one of the secret, the public key, --keys, --jwks-url
    or --insecure-no-auth is needed. Every option --some-name can also come from the environment as
    ENTIDB_SERVE_SOME_NAME, and DIR as ENTIDB_SERVE_DATA_DIR.
    """
    if data_dir is None:
        raise UsageError(
            "which directory? give DIR, where the server keeps its databases, or postgresql://…"
        )
    _warn_of_unread(given["jwt_secret_env"])
    listen = {name: given.pop(name) for name in LISTEN}
    if not any(given[name] for name in WAYS_IN):
        raise UsageError(
            "who may sync? give --secret-file FILE (make one with `entidb secret --out FILE`), "
            "--public-key-file FILE, --keys DIR, --jwks-url URL, or --insecure-no-auth for a try "
            "on this machine"
        )
    ways = [_FLAGS[name] for name in WAYS_IN if given[name]]
    if len(ways) > 1:
        raise UsageError(f"{' and '.join(ways)} say who may sync: give one of them")
    with as_options(_FLAGS):
        config = config_of(data_dir=data_dir, **given)
        from entidb.server import serve

        serve(config, **listen)


#: How an error of the server names a setting, and how a command line does.
_FLAGS: Final = {
    name: f"--{name.replace('_', '-')}" for name in (*SETTINGS, *LISTEN) if "_" in name
} | {**_ALIASES, "data_dir": "DIR"}


def _warn_of_unread(secret_env: str | None) -> None:
    """A setting in the environment that is misspelt does nothing, and nobody would notice."""
    names = ("data_dir", *SETTINGS, *LISTEN)
    read = [f"{_PREFIX}{name.upper()}" for name in names]
    for name in sorted(os.environ):
        if name.startswith(_PREFIX) and name not in read and name != secret_env:
            near = get_close_matches(name, read, 1)
            meant = f": is {near[0]} meant?" if near else ""
            note(one_line(f"warning: no option is called {name}{meant}"))


def config_of(**given: Any) -> ServerConfig:
    """From the options without those in ``LISTEN``. Raises ``UsageError``, ``ConfigError``."""
    if given["validate"] is not None or given["upcast"] is not None:
        sys.path.insert(0, os.getcwd())  # as `python -m` does; a script's path has no such entry
    for name in _BY_COLLECTION:
        given[name] = _by_collection(name, given[name])
    return ServerConfig(**given)


def _by_collection(option: str, given: tuple[str, ...]) -> dict[str, list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = {}
    for each in given:
        name, equals, fields = each.rpartition("=")
        if not equals or not name:
            raise UsageError(
                f"--{option} wants COLLECTION=FIELD or COLLECTION=FIELD,FIELD, not {each!r}"
            )
        found.setdefault(name, []).append(tuple(fields.split(",")))
    return found


# ---------------------------------------------------------------- secrets and tokens


@click.command("secret")
@click.option("--out", "-o", "out", metavar="FILE",
              help="Write it here, readable for you alone. A file that is there stays.",
)  # fmt: skip
@json_option
def secret_command(out: str | None, as_json: bool) -> None:
    """Make a secret for `entidb serve` and `entidb token`, and print it.

    A person who has it can make tokens for every database. It is 32 random bytes in hexadecimal
    digits.
    """
    secret = secrets.token_hex(32)
    if out is not None:
        write_credential(out, secret, replace=False)
    if as_json:
        print_json({"secret": secret if out is None else None, "path": out})
    elif out is None:
        say(secret)


_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])")
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.command("token")
@click.option("--secret-file", "--jwt-secret-file", "secret_file", metavar="FILE",
              envvar="ENTIDB_SERVE_JWT_SECRET_FILE", show_envvar=True,
              help="The server's secret.")  # fmt: skip
@click.option("--secret-env", metavar="NAME", help="Environment variable with the secret.")
@click.option("--private-key-file", metavar="FILE", help="PEM file of the private key.")
@click.option("--subject", required=True, metavar="TEXT", help="Who the token is for.")
@click.option("--database", "databases", multiple=True, metavar="NAME[=RIGHTS]",
              help="What it grants: r, w or rw (the default); * names all databases.")  # fmt: skip
@click.option("--expires", default="24h", show_default=True, metavar="TIME",
              help="How long it is valid: 90s, 15m, 24h, 30d.")  # fmt: skip
@click.option("--audience", default="entidb", show_default=True, help="As the server's --audience.")
@click.option("--admin", is_flag=True, help="Let it administer the whole server.")
@click.option("--admin-of", multiple=True, metavar="NAME",
              help="Let it administer this database; repeat it.")  # fmt: skip
@click.option("--kid", metavar="NAME", help="The key's name, for a server that has several.")
@click.option("--claim", "claims", multiple=True, metavar="NAME=JSON",
              help="A claim for the server's validate hook.")  # fmt: skip
@click.option("--out", "-o", "out", metavar="FILE",
              help="Write it here, readable for you alone, instead of printing it.")  # fmt: skip
@json_option
def token_command(
    secret_file: str | None,
    secret_env: str | None,
    private_key_file: str | None,
    subject: str,
    databases: tuple[str, ...],
    expires: str,
    audience: str,
    admin: bool,
    admin_of: tuple[str, ...],
    kid: str | None,
    claims: tuple[str, ...],
    out: str | None,
    as_json: bool,
) -> None:
    """Make a token that `entidb serve` accepts, and print it.

    It needs the server's secret, or the private key. The token is a credential: --out writes it to
    a file that only you can read.
    """
    key = _key(secret_file, secret_env, private_key_file)
    granted = once("--database", map(_grant, databases))
    given = once("--claim", map(_claim, claims))
    for name in admin_of:
        check_db_id(name)
    if admin or admin_of:
        given["admin"] = True if admin else list(admin_of)
    if not granted and "admin" not in given:
        raise UsageError("for what? give --database NAME, or --admin for an administrator")
    seconds = _seconds(expires)
    from entidb.server import mint_token

    clock = SystemClock()
    expires_ms = clock.now_ms() + round(seconds * 1000)
    token = mint_token(
        key,
        subject=subject,
        databases=granted,
        expires_s=seconds,
        audience=audience,
        claims=given,
        clock=clock,
        kid=kid,
    )
    if out is not None:
        write_credential(out, token, replace=True)
    _warn_of_exposure(secret_file, secret_env, private_key_file)
    if as_json:
        print_json(
            {
                "token": token if out is None else None,
                "subject": subject,
                "databases": granted,
                "expires_ms": expires_ms,
            }
        )
        return
    if out is None:
        say(token)
    if sys.stdout.isatty():
        click.echo(one_line(f"for {subject}, until {time_text(expires_ms)}"), err=True)


def _key(secret_file: str | None, secret_env: str | None, private: str | None) -> bytes:
    # A secret of the environment is only the default for what the command line leaves open.
    given = [each for each in (secret_env, private) if each is not None]
    if len(given) > 1 or (not given and secret_file is None):
        raise UsageError(
            "sign with what? give --secret-file FILE, --secret-env NAME or --private-key-file FILE"
        )
    if secret_env is not None:
        secret = os.environ.get(secret_env)
        if secret is None:
            raise ConfigError(f"the environment variable {secret_env!r} is not set")
        return os.fsencode(secret)
    path, what = str(private or secret_file), "secret file" if private is None else "key file"
    try:
        key = read_credential(path, what)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    if private is not None and b"PRIVATE KEY" not in key:
        raise UsageError(
            f"the key file {private} holds no private key in PEM form; a secret is given with "
            "--secret-file"
        )
    return key


def _warn_of_exposure(secret_file: str | None, secret_env: str | None, private: str | None) -> None:
    if private is not None:
        warn_of_exposure(private, "key file")
    elif secret_env is None and secret_file is not None:
        warn_of_exposure(secret_file, "secret file")


def _grant(text: str) -> tuple[str, str]:
    name, equals, rights = text.partition("=")
    if rights not in ("r", "w", "rw") and equals:
        raise UsageError(f"--database wants NAME=r, NAME=w or NAME=rw, not {text!r}")
    return name, rights or "rw"


def _seconds(text: str) -> float:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise UsageError(f"--expires wants a time like 15m, 24h or 30d, not {text!r}")
    return float(found[1]) * _UNIT_S[found[2]]


#: Claims that every token has.
_OPTION_OF = {
    "sub": "set it with --subject",
    "aud": "set it with --audience",
    "exp": "set it with --expires",
    "databases": "set it with --database",
    "iat": "every token gets it by itself",
    "admin": "set it with --admin or --admin-of",
}


def _claim(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--claim wants NAME=JSON, not {text!r}")
    if name in _OPTION_OF:
        raise UsageError(f"--claim {name}: {_OPTION_OF[name]}")
    try:
        return name, parse(value)
    except InputError as error:
        said = str(error).replace(", and no entity can hold it", "")
        raise UsageError(f"--claim {name}: the value is JSON: {said}") from error
