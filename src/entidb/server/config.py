"""Settings of the server: what may be chosen, what is chosen by default, and why.

Everything is checked when it is made, so a wrong setting is found before the first request. Also
here: which database names there are and in which directory each of them lies, because a name comes
from the network and a directory is on a disk. No clock, no sockets, no files are opened.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from entidb.errors import ConfigError, InvalidNameError
from entidb.protocol import Limits
from entidb.server.declared import Declared, declared
from entidb.server.hooks import check_called, check_hook, load_hook
from entidb.server.origins import check_names
from entidb.storage.addresses import ADDRESSES, is_address, whole, without_secrets
from entidb.types import COLLECTIONS_MAX, SEQUENCE_MAX, TRANSACTION_BYTES_MAX

_MIB: Final = 1024 * 1024
#: Room in a message beside one transaction of the largest size: names, ids and framing.
_FRAMING_BYTES: Final = 2 * _MIB
_BYTES_MAX: Final = 1024 * _MIB
_SECONDS_MAX: Final = 7 * 24 * 3600.0
_OPERATIONS_MAX: Final = 1_000_000
_DAYS_MAX: Final = 36_500

#: ASCII without anything a shell, a URL or a file system reads as more than a letter. A leading
#: dot would hide the directory, a leading dash would make it an option.
_DB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
#: Names that are devices on Windows, whatever follows the first dot.
_RESERVED: Final = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)")
_SUFFIX: Final = ".entidb"
_DIRECTORY: Final = re.compile(r"(?:==)?((?:=[a-z]|[a-z0-9._-])+)" + re.escape(_SUFFIX))


@dataclass(frozen=True, kw_only=True, repr=False)
class ServerConfig:
    """How a server behaves. Raises ``ConfigError``, which names the field.

    Exactly one way of telling who may do what is needed: ``jwt_secret_file``,
    ``jwt_secret_env``, ``jwt_public_key_file``, ``jwt_keys``, ``jwt_jwks_url``,
    ``authenticator``, or ``insecure_no_auth``.
    """

    #: Directory of the databases, one directory each; made if missing. Or the address of a
    #: PostgreSQL database, ``postgresql://user@host/database``, which several servers may serve.
    #: None keeps everything in memory, for tests.
    data_dir: str | os.PathLike[str] | None
    #: Processes that serve it together, each of which opens any database; on Linux only.
    #: ``serve`` starts that many. For an app that another program runs in several processes, any
    #: number above 1 says that those of one parent are one server.
    workers: int = 1
    #: Make a database when a token that grants writing to it first asks for it. False: only
    #: databases that are there are served.
    create_databases: bool = True

    #: File that holds the secret tokens are signed with (HS256), 32 bytes or more. Whitespace at
    #: its end does not count.
    jwt_secret_file: str | os.PathLike[str] | None = None
    #: Name of the environment variable that holds that secret.
    jwt_secret_env: str | None = None
    #: PEM file of the public key tokens are signed for: Ed25519 (EdDSA), RSA (RS256), or the
    #: curves P-256, P-384 and P-521 (ES256, ES384, ES512). Then the server can check tokens and
    #: cannot make them.
    jwt_public_key_file: str | os.PathLike[str] | None = None
    #: Several keys at once: a directory with a file for each, named by its ``kid``, or a JWKS
    #: file. Read again when it changes.
    jwt_keys: str | os.PathLike[str] | None = None
    #: Address of an identity provider's JWKS, over https.
    jwt_jwks_url: str | None = None
    #: Seconds after which those keys are fetched again.
    jwks_refresh_s: float = 300.0
    #: What a token's ``aud`` has to name, so that a token made for another service is worth
    #: nothing here.
    audience: str = "entidb"
    #: Seconds a token counts beyond its times, for clocks that differ.
    leeway_s: float = 10.0
    #: A function of your own from a bearer token (None if there was none) to ``Grants``.
    authenticator: Callable[[str | None], Any] | None = None
    #: Let everybody read and write everything. ``serve`` then binds to loopback only.
    insecure_no_auth: bool = False

    #: Names, without ports, by which a server without authentication may be asked for beside
    #: ``localhost`` and the loopback addresses. Any other Host is refused there: it may be that
    #: of a web page which has made its name point at this machine.
    allowed_hosts: tuple[str, ...] = ()
    #: Origins of web pages that may use this server from a browser (CORS), such as
    #: ``"https://app.example.org"``. None unless named.
    cors_origins: tuple[str, ...] = ()

    #: Called for every transaction of every push, as a function or as ``"module:function"``;
    #: see ``entidb.server.ValidateHook``.
    validate: str | Callable[..., Any] | None = None

    #: Number of the newest schema of the programs that use this server, as they say it; 0: nobody
    #: looks at what they say.
    schema: int = 0
    #: Programs of a lower schema are told to update when they pull. What they push is taken.
    schema_min: int = 0
    #: Called for what a program below ``schema`` pushes, as a function or ``"module:function"``:
    #: ``(collection, value, schema)`` to the value in its newest shape.
    upcast: str | Callable[..., Any] | None = None

    #: What no two entities of a collection may share, in every database: ``{"users": ["email"]}``.
    #: ``("team", "name")`` are unique together, and an ``Index`` may have a ``key``. A transaction
    #: that breaks it gets the verdict ``not_unique``. For a collection that is named here nothing
    #: else is unique; ``[]`` ends it.
    unique: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    #: Indexes of collections, in every database: ``{"stock": ["sku", ("kind", "price")]}``, or
    #: ``Index``. For a collection that is named here these are all, beside what is ``unique``.
    indexes: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    #: Bytes of one transaction, counted as the protocol does. Every server must accept 16 MiB.
    transaction_bytes_max: int = TRANSACTION_BYTES_MAX
    #: Bytes of one request body: on the wire and unpacked. Leaves room for the framing of a
    #: transaction of the largest size.
    body_bytes_max: int = 20 * _MIB
    #: Operations in one push.
    push_operations_max: int = 20_000
    #: Operations in one page of a pull, whatever the device asks for.
    pull_operations_max: int = 20_000
    #: Bytes of entity values in one page of a pull, whatever the device asks for. A single larger
    #: transaction is sent whole all the same.
    pull_bytes_max: int = 8 * _MIB
    #: Collection names in one message.
    collections_max: int = 4096
    #: Bytes of request bodies and answers in memory at once, all clients together. Beyond it
    #: requests are answered ``busy``.
    in_flight_bytes_max: int = 256 * _MIB
    #: Pushes that wait for a commit, in each database. Beyond it pushes are answered ``busy``.
    push_queue_max: int = 1000
    #: Requests of one subject in a second, over time; twice as many, or 10, at once. Beyond it
    #: requests are answered ``rate_limited``. 0: any number.
    subject_requests_per_s: float = 0.0
    #: As ``subject_requests_per_s``, to one database, from whomever.
    database_requests_per_s: float = 0.0
    #: Entities that a database may hold. What would be one more is refused, transaction by
    #: transaction, as ``over_quota``, and withdrawn on its device. 0: any number.
    database_entities_max: int = 0
    #: Bytes that the store of a database may take, measured once a minute, with what pushes to any
    #: process or node add in between; beyond it only what makes nothing larger is accepted. 0: any
    #: number.
    database_bytes_max: int = 0
    #: Devices that a database may have, without those that are revoked or were not seen for
    #: ``tombstone_retention_days``. One more is refused, as ``too_many_devices``, until there is
    #: room. 0: as many as are remembered, which is 10,000.
    database_devices_max: int = 0
    #: The same for the devices of one subject, in each database.
    subject_devices_max: int = 0
    #: Connections at once. Idle ones are closed for new ones; when all are being answered, more
    #: are answered ``busy``.
    connections_max: int = 2000
    #: Devices that wait for news on a connection of their own (``GET /v1/live``), at once. More
    #: are answered ``busy``, and ask now and then instead; so are those beyond half of
    #: ``connections_max``. 0: none.
    live_max: int = 1000
    #: The same for one subject of tokens.
    live_subject_max: int = 200

    #: Seconds for the head of a request, from its first byte or from the connection.
    head_timeout_s: float = 15.0
    #: Seconds for a request body. 20 MiB in it needs 350 kB/s.
    body_timeout_s: float = 60.0
    #: Seconds without progress after which a client that does not read its answer is dropped.
    write_timeout_s: float = 20.0
    #: Seconds that a request under way gets to end when the server stops.
    shutdown_timeout_s: float = 30.0

    #: Days that deletions are remembered. A device that was away for longer pulls everything
    #: again once (its own changes stay).
    tombstone_retention_days: float = 90.0
    #: Seconds between two looks for tombstones to purge, in each open database.
    purge_interval_s: float = 3600.0
    #: Seconds after which a database nobody uses is closed. 0: never.
    idle_close_s: float = 300.0
    #: Databases open at once. The least recently used one is closed for another.
    databases_open_max: int = 64

    #: Entities from which on a database gets an image: files that are made once and serve the first
    #: sync of every device. They take about half of what the database does. 0: none is made.
    segments_min_entities: int = 50_000
    #: Directory of these files. None: below ``data_dir``; for databases in PostgreSQL none are made
    #: then. All nodes of a server have to have the same one.
    segments_dir: str | os.PathLike[str] | None = None
    #: Path at which a proxy in front has these files for its own use, as ``/images/``: the server
    #: says who may have one, and the proxy sends it (``X-Accel-Redirect``). Empty: the server does.
    segments_redirect_to: str = ""

    #: Directory for backups of the databases, best on another disk. None: there are none.
    backup_dir: str | os.PathLike[str] | None = None
    #: Seconds between two backups of each database. 0: only when somebody asks for one.
    backup_every_s: float = 0.0
    #: Backups of each database that are kept; those in which faults were found do not count.
    backup_keep: int = 7

    #: Bytes that have to be free on the disk of ``data_dir`` for ``GET /readyz`` to say so.
    ready_disk_bytes_min: int = 256 * _MIB

    #: Pack answers with zstd or gzip for clients that take it.
    compression: bool = True
    #: Smaller answers go as they are: below about 1 kB the packing costs more than it saves.
    compression_min_bytes: int = 1024
    #: One line of JSON for each request, on the logger ``entidb.access``.
    access_log: bool = True
    #: Serve ``GET /metrics`` for Prometheus. It needs no token: keep it from the public.
    metrics: bool = False
    #: Serve the console, a page for administrators of the server, at ``/console``. The page says
    #: nothing by itself: it asks for a token with the claim ``admin``.
    console: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is True or False, not {getattr(self, name)!r}")
        self._check_place()
        if self.workers > 1 and self.data_dir is None:
            raise ConfigError("workers share what is on a disk: give data_dir, or workers=1")
        self._check_backups()
        self._check_segments()
        if not self.audience:
            raise ConfigError("audience is empty: name what tokens are made for, like 'entidb'")
        check_names(self.allowed_hosts, self.cors_origins)
        self._check_auth()
        check_hook("validate", self.validate)
        check_hook("upcast", self.upcast)
        self._check_schema()
        self.declared()

    def _check_numbers(self) -> None:
        for name, (low, high) in _INTS.items():
            _check_int(name, getattr(self, name), low, high)
        for name, (least, most) in _FLOATS.items():
            _check_number(name, getattr(self, name), least, most)
        if self.body_bytes_max < self.transaction_bytes_max + _FRAMING_BYTES:
            raise ConfigError(
                f"body_bytes_max ({self.body_bytes_max}) has to be at least "
                f"transaction_bytes_max + {_FRAMING_BYTES}, so that every transaction fits"
            )
        if self.in_flight_bytes_max < 3 * self.body_bytes_max:
            raise ConfigError(
                f"in_flight_bytes_max ({self.in_flight_bytes_max}) has to be at least three times "
                f"body_bytes_max, so that one large request does not stop all others"
            )

    def _check_place(self) -> None:
        place = self.data_dir
        if place is None:
            return
        _check_path("data_dir", place)
        _check_path("backup_dir", self.backup_dir)
        _check_path("segments_dir", self.segments_dir)
        if not os.fspath(place):
            raise ConfigError("data_dir is empty: name a directory")
        if self.address is not None:
            whole(self.address)
        if self.address is None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(place)):
            raise ConfigError(
                f"data_dir is a directory, or an address that begins with {ADDRESSES[0]}"
            )

    def __repr__(self) -> str:
        """Without the password that an address may have."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.address is not None:
            values["data_dir"] = without_secrets(self.address)
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"{type(self).__qualname__}({shown})"

    @property
    def address(self) -> str | None:
        """``data_dir`` where it is the address of a PostgreSQL database. It may have a password,
        and belongs into no message."""
        return str(self.data_dir) if is_address(self.data_dir) else None

    @property
    def directory(self) -> str | os.PathLike[str] | None:
        """``data_dir`` where it is a directory."""
        return None if self.address is not None else self.data_dir

    def _check_backups(self) -> None:
        if self.backup_dir is None:
            if self.backup_every_s:
                raise ConfigError("backup_every_s needs backup_dir, the place for the backups")
            return
        where = os.path.abspath(self.backup_dir)
        if self.segments_dir is not None and where == os.path.abspath(self.segments_dir):
            raise ConfigError("segments_dir is another directory than backup_dir")
        if self.directory is not None and where == os.path.abspath(self.directory):
            raise ConfigError("backup_dir is another directory than data_dir: best on another disk")

    def _check_segments(self) -> None:
        to = self.segments_redirect_to
        if to and not _REDIRECT.fullmatch(to):
            raise ConfigError(f'segments_redirect_to is a path like "/images/", not {to!r}')
        if to and self.segments_dir is None:
            raise ConfigError(
                "segments_redirect_to needs segments_dir, a directory that the proxy may read"
            )
        if self.segments_dir is None:
            return
        if not os.fspath(self.segments_dir):
            raise ConfigError("segments_dir is empty: name a directory")
        if self.data_dir is None:
            raise ConfigError("segments_dir needs data_dir: images of a database in memory are too")
        where = os.path.abspath(self.segments_dir)
        if self.directory is not None and where == os.path.abspath(self.directory):
            raise ConfigError("segments_dir is another directory than data_dir")

    def _check_auth(self) -> None:
        ways = [name for name in _AUTH if getattr(self, name) not in (None, False)]
        if len(ways) != 1:
            raise ConfigError(
                "choose exactly one of " + ", ".join(_AUTH) + f"; {', '.join(ways) or 'none'} given"
            )
        if self.authenticator is not None and not callable(self.authenticator):
            raise ConfigError("authenticator is a function from a token to Grants")
        if self.authenticator is not None:
            check_called("authenticator", "authenticator", self.authenticator)

    def _check_schema(self) -> None:
        if self.schema_min > self.schema:
            raise ConfigError(
                f"schema_min ({self.schema_min}) is above schema ({self.schema}), which no program "
                "has then: raise schema with it"
            )
        if self.upcast is not None and not self.schema:
            raise ConfigError("upcast needs schema, the number of what it makes")

    def limits(self) -> Limits:
        """The limits that the handshake names to devices."""
        return Limits(
            transaction_bytes_max=self.transaction_bytes_max,
            message_bytes_max=self.body_bytes_max,
            push_operations_max=self.push_operations_max,
            pull_operations_max=self.pull_operations_max,
            collections_max=self.collections_max,
            database_collections_max=COLLECTIONS_MAX,
        )

    def declared(self) -> Declared:
        """``indexes`` and ``unique`` together. Raises ``ConfigError``."""
        return declared(self.indexes, self.unique)

    def load_validate(self) -> Callable[..., Any] | None:
        """The hook itself. Raises ``ConfigError`` if it cannot be imported."""
        return load_hook("validate", self.validate)

    def load_upcast(self) -> Callable[..., Any] | None:
        """As ``load_validate``."""
        return load_hook("upcast", self.upcast)


#: Settings that decide who may do what.
WAYS_TO_KNOW: Final = (
    "jwt_secret_file",
    "jwt_secret_env",
    "jwt_public_key_file",
    "jwt_keys",
    "jwt_jwks_url",
    "authenticator",
)
_AUTH: Final = (*WAYS_TO_KNOW, "insecure_no_auth")
_REDIRECT: Final = re.compile(r"/(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)+")
_BOOLS: Final = (
    "create_databases",
    "insecure_no_auth",
    "compression",
    "access_log",
    "metrics",
    "console",
)
_INTS: Final = {
    "workers": (1, 256),
    "transaction_bytes_max": (TRANSACTION_BYTES_MAX, _BYTES_MAX),
    "body_bytes_max": (TRANSACTION_BYTES_MAX, _BYTES_MAX + _FRAMING_BYTES),
    "push_operations_max": (1, _OPERATIONS_MAX),
    "pull_operations_max": (1, _OPERATIONS_MAX),
    "pull_bytes_max": (1024, _BYTES_MAX),
    "collections_max": (1, 65536),
    "in_flight_bytes_max": (_MIB, 1024 * _BYTES_MAX),
    "push_queue_max": (1, 1_000_000),
    "database_entities_max": (0, SEQUENCE_MAX),
    "database_bytes_max": (0, SEQUENCE_MAX),
    "database_devices_max": (0, 10_000),
    "subject_devices_max": (0, 10_000),
    "connections_max": (1, 1_000_000),
    "live_max": (0, 1_000_000),
    "live_subject_max": (1, 1_000_000),
    "databases_open_max": (1, 100_000),
    "backup_keep": (1, 10_000),
    "ready_disk_bytes_min": (0, 1024 * _BYTES_MAX),
    "segments_min_entities": (0, SEQUENCE_MAX),
    "schema": (0, SEQUENCE_MAX),
    "schema_min": (0, SEQUENCE_MAX),
    "compression_min_bytes": (0, _BYTES_MAX),
}
_FLOATS: Final = {
    "jwks_refresh_s": (10.0, 24 * 3600.0),
    "leeway_s": (0.0, 300.0),
    "head_timeout_s": (0.1, 3600.0),
    "body_timeout_s": (0.1, 3600.0),
    "write_timeout_s": (0.1, 3600.0),
    "shutdown_timeout_s": (0.1, 3600.0),
    "tombstone_retention_days": (0.0, _DAYS_MAX),
    "purge_interval_s": (1.0, _SECONDS_MAX),
    "idle_close_s": (0.0, _SECONDS_MAX),
    "subject_requests_per_s": (0.0, 1e6),
    "database_requests_per_s": (0.0, 1e6),
    "backup_every_s": (0.0, 366 * 24 * 3600.0),
}


def _check_path(name: str, path: object) -> None:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{name} is a path, as text or as a Path, not {type(path).__name__}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is a whole number from {low} to {high}, not {value!r}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not low <= number <= high:  # which NaN is not
        raise ConfigError(f"{name} is a number from {low:g} to {high:g}, not {value!r}")


# ---------------------------------------------------------------- names of databases


def is_db_id(db_id: str) -> bool:
    """Whether a server database may be called so."""
    return _DB_ID.fullmatch(db_id) is not None


def check_db_id(db_id: str) -> str:
    """``db_id`` itself if a server database may be called so: 1 to 100 ASCII letters, digits,
    dots, underscores and dashes, beginning with a letter or digit; else ``InvalidNameError``."""
    if not is_db_id(db_id):
        raise InvalidNameError(
            f"{db_id[:100]!r} is no name for a database: use up to 100 of A-Z a-z 0-9 . _ -, "
            "beginning with a letter or digit"
        )
    return db_id


def directory_name(db_id: str) -> str:
    """Name of the directory that holds ``db_id``, below ``data_dir``.

    Different for names that differ only in case, also where the file system ignores case: a
    capital is written ``=x``. The suffix keeps dots off the end, which Windows drops.
    """
    check_db_id(db_id)
    name = re.sub("[A-Z]", lambda found: "=" + found[0].lower(), db_id)
    return ("==" if _RESERVED.match(name) else "") + name + _SUFFIX


def db_id_of(directory: str) -> str | None:
    """The database whose ``directory_name`` this is, None if it is none."""
    found = _DIRECTORY.fullmatch(directory)
    if found is None:
        return None
    db_id = re.sub("=([a-z])", lambda match: match[1].upper(), found[1])
    known = _DB_ID.fullmatch(db_id) is not None and directory_name(db_id) == directory
    return db_id if known else None
