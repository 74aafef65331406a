"""News through the proxies that people have: nginx, haproxy and Varnish as Debian ships them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb.server import SyncServer
from entidb.sync import live
from entidb.sync.live import LiveState
from tests.server.test_app import eventually
from tests.sync.test_live import Heard, add, listening, served
from tests.tools import free_port, program

pytestmark = pytest.mark.process

NGINX = """
{user}
daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {here}/body; proxy_temp_path {here}/proxy; fastcgi_temp_path {here}/f;
  uwsgi_temp_path {here}/u; scgi_temp_path {here}/s;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://127.0.0.1:{upstream}; {more} }}
  }}
}}
"""
HAPROXY = """
defaults
  mode http
  timeout connect 5s
  timeout client 50s
  timeout server {server}
frontend all
  bind 127.0.0.1:{port}
  default_backend entidb
backend entidb
  server one 127.0.0.1:{upstream}
"""
VARNISH = """
vcl 4.1;
backend default {{ .host = "127.0.0.1"; .port = "{upstream}"; .first_byte_timeout = 60s; }}
sub vcl_backend_response {{
  set beresp.do_stream = false;
  set beresp.uncacheable = true;
}}
"""


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[str]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        eventually(lambda: process.poll() is not None or listens(port))
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read().decode())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def nginx(url: str, here: Path, more: str = "") -> Iterator[str]:
    binary, port = program("nginx"), free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    upstream = url.rsplit(":", 1)[1]
    config = here / "nginx.conf"
    config.write_text(NGINX.format(here=here, port=port, upstream=upstream, more=more, user=user))
    with running([str(binary), "-p", str(here), "-c", str(config)], port) as proxy:
        yield proxy


@contextlib.contextmanager
def haproxy(url: str, here: Path, server: str = "50s") -> Iterator[str]:
    binary, port = program("haproxy"), free_port()
    config = here / "haproxy.cfg"
    upstream = url.rsplit(":", 1)[1]
    config.write_text(HAPROXY.format(port=port, upstream=upstream, server=server))
    with running([str(binary), "-db", "-f", str(config)], port) as proxy:
        yield proxy


@contextlib.contextmanager
def varnish(url: str, here: Path) -> Iterator[str]:
    """Passes nothing on before it has an answer whole."""
    binary, port = program("varnishd"), free_port()
    config = here / "default.vcl"
    config.write_text(VARNISH.format(upstream=url.rsplit(":", 1)[1]))
    command = [str(binary), "-F", "-n", str(here / "work"), "-f", str(config)]
    command += ["-a", f"127.0.0.1:{port}", "-s", "malloc,16m", "-j", "none"]
    with running(command, port) as proxy:
        yield proxy


def hears_at_once(server: SyncServer, heard: Heard) -> None:
    eventually(lambda: heard.states[-1:] == [LiveState.LIVE])
    for _ in range(3):
        head, began = add(server), time.monotonic()
        eventually(lambda head=head: any(told == head for told, _ in heard.heads))
        assert time.monotonic() - began < 10, "it was gathered"
        time.sleep(0.1)
    assert heard.states == [LiveState.LIVE]


def test_a_stream_goes_through_nginx_as_it_is(tmp_path: Path) -> None:
    heard = Heard()
    with served() as (server, url), nginx(url, tmp_path) as proxy, listening(proxy, heard):
        hears_at_once(server, heard)


def test_a_stream_goes_through_haproxy_as_it_is(tmp_path: Path) -> None:
    heard = Heard()
    with served() as (server, url), haproxy(url, tmp_path) as proxy, listening(proxy, heard):
        hears_at_once(server, heard)


def test_behind_a_varnish_that_gathers_answers_polls_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "FIRST_EVENT_S", 1.0)
    heard = Heard()
    with served() as (server, url), varnish(url, tmp_path) as proxy, listening(proxy, heard):
        eventually(lambda: heard.states[-1:] == [LiveState.POLLING])
        head = add(server)
        eventually(lambda: any(told == head for told, _ in heard.heads))


def test_a_haproxy_that_cuts_what_is_silent_is_no_loop(tmp_path: Path) -> None:
    heard = Heard()
    with (
        served() as (server, url),
        haproxy(url, tmp_path, "1s") as proxy,
        listening(proxy, heard),
    ):
        eventually(lambda: len(heard.heads) >= 2)
        # Each new stream says the newest commit, so nothing is missed between two.
        head = add(server)
        eventually(lambda: any(told == head for told, _ in heard.heads))
        count, began = len(heard.heads), time.monotonic()
        time.sleep(1.0)
        assert len(heard.heads) <= count + 3 * (time.monotonic() - began)
