"""Running the app on uvicorn: addresses, TLS, signals, and connections that do nothing; in this
process, or in several that have this one as their parent.

One server per data directory. What is served is ``app``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn

from entidb.credentials import check_place, exposure
from entidb.errors import ConfigError
from entidb.events import SafeEvent, Thread
from entidb.server.app import SyncApp, create_app
from entidb.server.beside import check_proxies, check_root_path
from entidb.server.certificates import Certificate
from entidb.server.config import ServerConfig
from entidb.server.connections import (
    LimitedConnection,
    connection_class,
    files_needed,
    fit_connections,
    fit_databases,
    raise_file_limit,
)
from entidb.server.cores import stay_on_core
from entidb.server.handshakes import Handshakes, ProtocolFactory, ShakingHands
from entidb.server.keys import key_files
from entidb.server.server import SyncServer
from entidb.server.signals import read_again, signals
from entidb.server.workers.family import Family, can_share, cannot_share
from entidb.types import Clock, kind_name

logger = logging.getLogger("entidb.server")

DEFAULT_PORT: Final = 4984
_KEEP_ALIVE_S: Final = 75
#: Seconds that a TLS handshake gets: some round trips of the slowest network.
_HANDSHAKE_S: Final = 10.0
#: Seconds for which a thread that decides or packs keeps the interpreter from others. Python's own
#: five milliseconds are more than most requests take, and one waits for several threads.
_SWITCH_S: Final = 0.001


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Where and how to listen. ``port`` 0 takes a free one; ``root_path`` is where a reverse
    proxy that strips it has the app; ``tls_cert`` and ``tls_key`` are PEM files."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    tls_cert: str | None = None
    tls_key: str | None = None
    backlog: int = 2048
    root_path: str = ""
    #: Addresses whose X-Forwarded-For is believed, separated by commas.
    trusted_proxies: str = "127.0.0.1"

    def __post_init__(self) -> None:
        check_root_path(self.root_path)
        check_proxies(self.trusted_proxies)


def serve(
    config: ServerConfig | SyncServer,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    ready_file: str | os.PathLike[str] | None = None,
    **listen: Any,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is under way, close everything and return.
    SIGHUP has keys and certificate read again, and says so in a line on standard error.

    Prints the address once it is bound, as one line on standard error, and writes it to
    ``ready_file``. With ``workers`` it serves in that many processes, forked from this one, and
    replaces those that end; call it before the program starts threads. Other keywords are those of
    ``Listen``. Logs go to standard error unless the program has set up logging. Warns there of a
    secret or a key that every user of this machine can read. Raises ``ConfigError`` for an address
    that cannot be bound, for certificates that cannot be read, for a ``ready_file`` that cannot be
    written, and for anything but loopback without authentication; ``DatabaseLockedError`` if
    another server has the directory.
    """
    _log_to_stderr()

    def announce(url: str) -> None:
        print(f"entidb: serving on {url}", file=sys.stderr, flush=True)
        if ready_file is not None:
            _write_ready(Path(ready_file), url)
        _warn_of_exposure(config, listen.get("tls_key"))

    if ready_file is not None:
        _check_ready(Path(ready_file))
    settings = _settings_of(config)
    where = Listen(host=host, port=port, **listen)
    if settings.workers > 1:
        _serve_together(config, settings, where, announce)
        return
    runner = _prepare(config, where, announce)
    with signals(runner.server, runner.read_again), _to_itself():
        runner.run()


def _settings_of(config: ServerConfig | SyncServer) -> ServerConfig:
    settings: object = config.config if isinstance(config, SyncServer) else config
    if not isinstance(settings, ServerConfig):
        raise ConfigError(f"config must be a ServerConfig, not {kind_name(settings)}")
    return settings


def _serve_together(
    config: ServerConfig | SyncServer,
    settings: ServerConfig,
    listen: Listen,
    announce: Callable[[str], None],
) -> None:
    if isinstance(config, SyncServer):
        raise ConfigError(
            "each of several workers has a server of its own: give serve the ServerConfig"
        )
    if not can_share():
        raise cannot_share()
    with contextlib.ExitStack() as stack:
        folder = ""
        if settings.address is not None and settings.metrics:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="entidb-workers-"))
        server = SyncServer(config, family=Family.of(os.getpid(), folder))
        stack.callback(server.close)
        runner = _prepare(server, listen, _nothing, worker=True)
        with runner.bound:
            from entidb.server.workers.parent import Parent  # most servers are one process

            parent = Parent(
                settings.workers,
                partial(_work, runner, listen.backlog, settings),
                announce=lambda: announce(runner.server.url),
                grace_s=settings.shutdown_timeout_s,
            )
            parent.run()


def _work(
    runner: _Runner,
    backlog: int,
    settings: ServerConfig,
    number: int,
    ready: Callable[[], None],
) -> None:
    if settings.address is None:  # beside a server of databases, that one wants cores too
        stay_on_core(number, settings.workers)

    def listens(url: str) -> None:
        # It was told to accept one connection at a time, for others to get their share.
        runner.bound.listen(backlog)
        ready()

    runner.server.announce = listens
    with signals(runner.server, runner.read_again), _to_itself():
        runner.run()


@contextlib.contextmanager
def _to_itself() -> Iterator[None]:
    """In a process that does nothing but serve, threads take turns more often; and the collector
    does not look at what was imported and made until now: that takes some twenty milliseconds, in
    which nobody is answered."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_S))
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before)


@contextlib.contextmanager
def serving(config: ServerConfig | SyncServer, **listen: Any) -> Iterator[str]:
    """As ``serve``, on a thread, as long as the block runs; yields the URL. The port is a free
    one unless given. For tests, examples and programs that are more than a server."""
    ready = SafeEvent()
    urls: list[str] = []

    def announce(url: str) -> None:
        urls.append(url)
        ready.set()

    if _settings_of(config).workers > 1:
        raise ConfigError("serving runs in this process alone: take serve for several workers")
    runner = _prepare(config, Listen(**{"port": 0, **listen}), announce)

    def run() -> None:
        try:
            runner.run()
        finally:
            ready.set()

    thread = Thread(target=run, name="entidb-server", daemon=True)
    thread.start()
    ready.wait()
    if not urls:
        thread.join()
        raise RuntimeError("the server did not start; its log says why")
    try:
        yield urls[0]
    finally:
        runner.server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class _Runner:
    server: _Server
    bound: socket.socket
    read_again: Callable[[], None]

    def run(self) -> None:
        with self.bound:
            self.server.run(sockets=[self.bound])


def _prepare(
    config: ServerConfig | SyncServer,
    listen: Listen,
    announce: Callable[[str], None],
    *,
    worker: bool = False,
) -> _Runner:
    settings = config.config if isinstance(config, SyncServer) else config
    # First, so that a directory that another server has is not called a port that is taken.
    app = (
        SyncApp(config, owned=True)
        if isinstance(config, SyncServer) and worker
        else (create_app(config))
    )
    bound = None
    try:
        bound = _bind(listen, settings)
        certificate = _certificate(listen, app.server.clock)
        most = _connections_max(app, settings)
        kind = connection_class(settings, most, app.note_refused)
        uvicorn_config = _uvicorn_config(app, kind, settings, listen, certificate)
        if worker:
            uvicorn_config.backlog = 1
        name = bound.getsockname()
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        scheme = "https" if listen.tls_cert else "http"
        url = app.server.address = f"{scheme}://{host}:{name[1]}"
        handshakes = Handshakes(most, told=app.note_refused)
        server = _Server(uvicorn_config, announce, url, app.send_away, handshakes)
        server.gentle = worker
        return _Runner(server, bound, partial(read_again, app.server, certificate))
    except BaseException:
        if bound is not None:
            bound.close()
        app.discard()
        raise


def _nothing(url: str) -> None:
    return None


def _certificate(listen: Listen, clock: Clock) -> Certificate | None:
    if (listen.tls_cert is None) != (listen.tls_key is None):
        raise ConfigError("tls_cert and tls_key go together: give both or none")
    if listen.tls_cert is None or listen.tls_key is None:
        return None
    return Certificate(listen.tls_cert, listen.tls_key, clock)


def _uvicorn_config(
    app: SyncApp,
    kind: type[LimitedConnection],
    settings: ServerConfig,
    listen: Listen,
    certificate: Certificate | None,
) -> uvicorn.Config:
    def with_newest(config: uvicorn.Config, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        assert certificate is not None, "asked for TLS only"
        return certificate.install(make())

    return uvicorn.Config(
        app,
        http=kind,
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=listen.backlog,
        root_path=listen.root_path,
        forwarded_allow_ips=listen.trusted_proxies,
        timeout_keep_alive=_KEEP_ALIVE_S,
        # Without it one client that does not read keeps a stopping server running.
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
        ssl_certfile=listen.tls_cert,
        ssl_keyfile=listen.tls_key,
        ssl_context_factory=None if certificate is None else with_newest,
    )


def _connections_max(app: SyncApp, settings: ServerConfig) -> int:
    """As many connections as are asked for, or as this process may have open files for; and no more
    databases open in ``app`` than leave room for those."""
    needed = files_needed(settings)
    files = raise_file_limit(needed)
    most = fit_connections(settings, files)
    app.server.stores.most = fit_databases(settings, files)
    if most < settings.connections_max:
        logger.warning(
            "connections_max is %d, and this process may have %d open files: %d connections are "
            "taken, and %d databases open at once. Raise the limit (ulimit -n %d, or LimitNOFILE "
            "in a systemd unit), or lower connections_max or databases_open_max",
            settings.connections_max,
            files,
            most,
            app.server.stores.most,
            needed,
        )
    return most


def _bind(listen: Listen, settings: ServerConfig) -> socket.socket:
    where = f"{listen.host}:{listen.port}"
    if not listen.host or not 0 <= listen.port <= 65535:
        # The system would take another port than the one asked for, by leaving out its top bits.
        raise ConfigError(
            f"cannot listen on {where}: name a host, and a port from 0 to 65535",
            code="cannot_bind",
        )
    try:
        found = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise _cannot_listen(where, error) from error
    if settings.insecure_no_auth and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"insecure_no_auth only works on loopback, and {where} is reachable from elsewhere: "
            "configure a key for tokens, or listen on 127.0.0.1"
        )
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            # Else a restart has to wait for connections of the last run to be forgotten.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise _cannot_listen(where, error) from error
    bound.set_inheritable(False)
    return bound


def _cannot_listen(where: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or "that is no name of a host"
    return ConfigError(f"cannot listen on {where}: {reason}", code="cannot_bind")


def _check_ready(path: Path) -> None:
    check_place(path, "ready_file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise ConfigError(
            f"ready_file cannot be written: {path}: {error.strerror}; name a file in a directory "
            "that the user of the server may write to"
        ) from error


def _write_ready(path: Path, url: str) -> None:
    """Appears whole or not at all: a program that waits for the file reads it at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(url + "\n", encoding="utf-8")
    temporary.replace(path)


def _warn_of_exposure(config: ServerConfig | SyncServer, tls_key: Any) -> None:
    settings = config.config if isinstance(config, SyncServer) else config
    named = [(settings.jwt_secret_file, "secret file"), (tls_key, "key file")]
    if settings.jwt_keys is not None:
        several = Path(settings.jwt_keys)
        files = key_files(several) if several.is_dir() else [several]
        named += [(path, "secret file") for path in files if _holds_secret(path)]
    for path, what in named:
        warning = None if path is None else exposure(path, what)
        if warning is not None:
            print(f"entidb: warning: {warning}", file=sys.stderr, flush=True)


def _holds_secret(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False  # gone since the keys were read
    return b"-----BEGIN" not in content and (b"{" not in content or b'"oct"' in content)


def _log_to_stderr() -> None:
    """Unless the program has set up logging: then its handlers get everything."""
    for name, style in _LOGS.items():
        named = logging.getLogger(name)
        if named.handlers or logging.getLogger().handlers:
            continue
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(style))
        named.addHandler(handler)
        named.setLevel(logging.INFO)
        named.propagate = False


#: A line of the access log is JSON and nothing else.
_LOGS: Final = {
    "entidb": "%(levelname)s %(name)s: %(message)s",
    "entidb.access": "%(message)s",
}


# ---------------------------------------------------------------- uvicorn


@contextlib.contextmanager
def _bounded_handshakes(handshakes: Handshakes) -> Iterator[None]:
    """Servers that the running event loop makes in the block have their TLS handshakes among
    ``handshakes``, and give each less time than the minute of the loop: uvicorn has no settings for
    either."""
    loop: Any = asyncio.get_running_loop()
    create_server = loop.create_server

    def create(make: ProtocolFactory, *, ssl: ssl.SSLContext | None = None, **named: Any) -> Any:
        if ssl is not None:
            make = partial(ShakingHands, make, ssl, _HANDSHAKE_S, handshakes)
        return create_server(make, **named)

    loop.create_server = create
    try:
        yield
    finally:
        del loop.create_server  # the loop's own again


class _Server(uvicorn.Server):
    """Says where it listens as soon as it does, and sends those away who wait for news before it
    waits for its connections to end."""

    def __init__(
        self,
        config: uvicorn.Config,
        announce: Callable[[str], None],
        url: str,
        send_away: Callable[[], None],
        handshakes: Handshakes,
    ) -> None:
        super().__init__(config)
        self._handshakes = handshakes
        self._send_away = send_away
        self.announce = announce
        self.url = url
        #: Ctrl-C reaches it from the terminal and from its parent, and is no second one.
        self.gentle = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        with _bounded_handshakes(self._handshakes):
            await super().startup(sockets)
        if self.started:
            self.announce(self.url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.gentle:
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._send_away()
        await super().shutdown(sockets)
