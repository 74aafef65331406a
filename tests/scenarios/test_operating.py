"""What ``docs/operations.md`` tells an operator to do, done line by line; and the files beside it.

The machine is a directory: the places that the page names are moved into it, and the few programs
that would change the real machine (``useradd``, ``systemctl``, ``runuser``) are stood in for. What
the service runs is read from the unit file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb.version import VERSION
from tests.cli.support import documents, entidb, environment
from tests.scenarios.test_live_through_proxies import running
from tests.server.test_run import make_certificate
from tests.sync.test_live import served
from tests.tools import free_port, program

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
FILES = ROOT / "docs" / "operations"
#: Seconds, far above what a busy machine takes.
WAIT_S = 600.0
#: Places on a machine that lie in the directory of the test instead.
PLACES = ("/opt/entidb", "/etc/", "/var/lib/entidb", "/var/backups/entidb")

NGINX_AROUND = """
{user}
daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {here}/body; proxy_temp_path {here}/proxy; fastcgi_temp_path {here}/f;
  uwsgi_temp_path {here}/u; scgi_temp_path {here}/s;
  include {snippet};
}}
"""
#: Stands in for systemd: of a unit it reads what it runs, and whom it signals.
SYSTEMCTL = """#!{python}
import os, pathlib, re, shlex, signal, subprocess, sys, time, urllib.request
here = pathlib.Path({here!r})
words = [word for word in sys.argv[1:] if not word.startswith("-")]
if words == ["daemon-reload"]:
    sys.exit(0)
verb, name = words
pid = here / f"{{name}}.pid"

def wait(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    sys.exit(f"{{name}} did not come to it")

def gone():
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return True
    return False

def start(command):
    with open(here / f"{{name}}.log", "a") as log:
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   start_new_session=True)
    pid.write_text(str(started.pid))

def answers(url):
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError as error:
        return not isinstance(getattr(error, "reason", error), ConnectionError)
    return True

if name == "nginx":
    start([{nginx!r}, "-p", str(here), "-c", str(here / "nginx.conf")])
    wait(lambda: answers("https://localhost:{tls}/healthz"))
    sys.exit(0)
unit = (here / "etc/systemd/system/entidb.service").read_text()
if verb == "reload":
    assert "kill -HUP" in re.search("^ExecReload=(.*)$", unit, re.M)[1]
    os.kill(int(pid.read_text()), signal.SIGHUP)
    time.sleep(0.5)
    sys.exit(0)
if verb == "restart":
    os.kill(int(pid.read_text()), signal.SIGTERM)
    wait(lambda: gone())
command = shlex.split(re.search("^ExecStart=(.*)$", unit, re.M)[1])
start([*command, "--port", "{port}"])
wait(lambda: answers("http://127.0.0.1:{port}/healthz"))
"""


class Machine:
    """A directory that is taken for a machine."""

    def __init__(self, here: Path) -> None:
        self.here = here
        self.port, self.tls = free_port(), free_port()
        (here / "bin").mkdir()
        for place in ("etc/ssl/entidb", "etc/nginx/conf.d", "etc/systemd/system"):
            (here / place).mkdir(parents=True)
        shutil.copytree(FILES, here / "docs" / "operations")
        for path in (here / "docs" / "operations").iterdir():
            path.write_text(self.moved(path.read_text()))
        cert, key = make_certificate(here / "etc" / "ssl" / "entidb", days=90)
        both = here / "etc" / "ssl" / "entidb" / "both.pem"
        both.write_text(Path(cert).read_text() + Path(key).read_text())
        self.authority = cert
        user = "user root;" if os.geteuid() == 0 else ""
        snippet = here / "etc" / "nginx" / "conf.d" / "entidb.conf"
        around = NGINX_AROUND.format(user=user, here=here, snippet=snippet)
        (here / "nginx.conf").write_text(around)

        (here / "packages").mkdir()
        for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if "entidb" not in path.name:
                (here / "packages" / path.name).symlink_to(path)

    def moved(self, text: str) -> str:
        """``text`` of the page or its files, for this machine."""
        for place in PLACES:
            text = re.sub(rf"(?<![\w/.]){re.escape(place)}", f"{self.here}{place}", text)
        text = text.replace("https://sync.example.org", f"https://localhost:{self.tls}")
        text = text.replace("sync.example.org", "localhost")
        text = re.sub(r"listen 443|bind :443", lambda at: at[0].replace("443", str(self.tls)), text)
        return text.replace("4984", str(self.port))

    def stand_in(self, name: str, text: str) -> None:
        path = self.here / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def stand_ins(self, nginx: Path) -> None:
        self.stand_in("useradd", "#!/bin/sh\n")
        # What follows `runuser -u entidb --` runs as who runs the tests.
        self.stand_in("runuser", '#!/bin/sh\nshift 3\nexec "$@"\n')
        self.stand_in(
            "install",
            '#!/bin/bash\nfor word; do [ "$word" = entidb ] || [ "$word" = -o ] || '
            'words+=("$word"); done\nexec /usr/bin/install "${words[@]}"\n',
        )
        text = SYSTEMCTL.format(
            python=sys.executable, here=str(self.here), nginx=str(nginx), port=self.port,
            tls=self.tls,
        )  # fmt: skip
        self.stand_in("systemctl", text)

    def quick_environments(self) -> None:
        """Let environments have the pip of the packages, which need not be unpacked."""
        self.stand_in(
            "python3",
            f'#!/bin/bash -e\n{shlex.quote(sys.executable)} "$1" "$2" --without-pip "$3"\n'
            'printf \'#!/bin/sh\\nexec %s -m pip "$@"\\n\' "$3/bin/python" > "$3/bin/pip"\n'
            'chmod +x "$3/bin/pip"\n',
        )

    def environment(self) -> dict[str, str]:
        """Packages come from where the tests have theirs, and EntiDB from its wheel."""
        given = environment(
            PATH=f"{self.here / 'bin'}:{os.environ['PATH']}",
            SSL_CERT_FILE=self.authority,
            PYTHONPATH=str(self.here / "packages"),
            PIP_NO_INDEX="1",
            PIP_NO_DEPS="1",
            PIP_NO_BUILD_ISOLATION="0",  # pip reads it the wrong way round: there is none
            PIP_FIND_LINKS=str(self.here / "wheels"),
            PIP_DISABLE_PIP_VERSION_CHECK="1",
        )
        del given["PYTHONWARNINGS"]
        return given

    def stop(self) -> None:
        for path in self.here.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGTERM)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def steps(page: str) -> list[tuple[str, str]]:
    """The lines to type under each heading."""
    found = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return [
        (heading, "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)))
        for heading, text in found
    ]


def built(wheels: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=WAIT_S)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def test_an_operator_gets_from_an_empty_machine_to_an_upgrade_by_the_page_alone(
    machine: Machine,
) -> None:
    program("curl")
    machine.stand_ins(program("nginx"))
    machine.quick_environments()
    built(machine.here / "wheels")
    script = ["set -euo pipefail"]
    for heading, lines in steps(PAGE.read_text(encoding="utf-8")):
        script += [f"echo; echo '## {heading}'", machine.moved(lines)]
    ended = subprocess.run(
        ["bash"],
        input="\n".join(script),
        env=machine.environment(),
        cwd=machine.here,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    said = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", ended.stdout, re.M | re.S))
    assert VERSION in said["Install"] and VERSION in said["Upgrade"]
    assert "0 problems" in said["Proxy with TLS"] and "0 problems" in said["First device"]
    assert "shop" in said["Backup"]
    assert "history_changed" in said["Restore"]
    assert "second" in said["Rotate the key"]
    assert "ada" in said["Who is behind"] and '"ready"' in said["Who is behind"]
    assert "revoked" in said["Lock a device or a person out"]
    assert "{'notes': 1}" in said["Erase a person"]
    listed = entidb("list", machine.here / "device", "notes", "--json")
    assert {each["value"]["text"] for each in documents(listed.stdout)} == {
        "the first",
        "after the backup",
    }


# ---------------------------------------------------------------- the files beside it


def without_problem(machine: Machine) -> None:
    """A doctor looks through what stands before a server, and finds nothing to change."""
    url = f"https://localhost:{machine.tls}"
    found = entidb("doctor", "--json", url, "--db", "shop", "--wait", 2,
                   "--ca-file", machine.authority)  # fmt: skip
    assert found.exit_code == 0, found.output
    states = {each["check"]: each["state"] for each in documents(found.stdout)}
    assert set(states.values()) == {"ok"}, states
    assert {"tls", "body", "stream", "idle", "idle poll", "packed requests"} <= set(states)


def at_port(machine: Machine, url: str) -> None:
    """Let the files lead to the server at ``url``."""
    port = url.rsplit(":", 1)[1]
    for path in (machine.here / "docs" / "operations").iterdir():
        text = re.sub(rf"127\.0\.0\.1:{machine.port}\b", f"127.0.0.1:{port}", path.read_text())
        path.write_text(text)


def metrics_status(machine: Machine, address: str = "/metrics") -> int:
    context = ssl.create_default_context(cafile=machine.authority)
    try:
        with urllib.request.urlopen(f"https://localhost:{machine.tls}{address}", context=context):
            return 200
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def command_of(name: str, machine: Machine) -> list[str]:
    files = machine.here / "docs" / "operations"
    binary = str(program(name))
    if name == "nginx":
        shutil.copy(files / "nginx.conf", machine.here / "etc/nginx/conf.d/entidb.conf")
        return [binary, "-p", str(machine.here), "-c", str(machine.here / "nginx.conf")]
    if name == "haproxy":
        return [binary, "-db", "-f", str(files / "haproxy.cfg")]
    text = (files / "Caddyfile").read_text().replace("localhost {", f"localhost:{machine.tls} {{")
    (files / "Caddyfile").write_text("{\n    admin off\n}\n" + text)
    # It remembers its settings and its certificates in the home of whoever runs it.
    home = [f"{name}={machine.here / 'caddy'}" for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME")]
    run = [binary, "run", "--adapter", "caddyfile", "--config", str(files / "Caddyfile")]
    return ["env", *home, *run]


@pytest.mark.parametrize("name", ["nginx", "haproxy", "caddy"])
def test_behind_the_proxy_of_the_docs_nothing_is_wrong(machine: Machine, name: str) -> None:
    program(name)
    with served(metrics=True) as (_, url):
        at_port(machine, url)
        with running(command_of(name, machine), machine.tls):
            without_problem(machine)
            assert metrics_status(machine) == 403
            for disguise in ("/%6detrics", "/metric%73", "/%6D%65%74%72%69%63%73"):
                assert metrics_status(machine, disguise) == 403


def test_systemd_takes_the_unit(machine: Machine) -> None:
    analyze = program("systemd-analyze")
    unit = machine.here / "docs" / "operations" / "entidb.service"
    text = unit.read_text().replace(f"{machine.here}/opt/entidb/bin/entidb", sys.executable)
    unit.write_text(text)
    ended = subprocess.run(
        [str(analyze), "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    mine = [line for line in ended.stderr.splitlines() if "entidb" in line]
    assert (ended.returncode, mine) == (0, []), ended.stderr


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_steps_of_the_containerfile_make_a_server_that_is_healthy(machine: Machine) -> None:
    text = machine.moved((FILES / "Containerfile").read_text(encoding="utf-8"))
    text = text.replace("/src", str(ROOT))
    machine.stand_ins(Path("/nowhere"))
    machine.quick_environments()
    given = instructions(text)
    known = {"FROM", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
             "ENTRYPOINT", "CMD"}  # fmt: skip
    assert {word for word, _ in given} == known
    for word, rest in given:
        if word == "RUN":
            subprocess.run(
                ["bash", "-c", rest], env=machine.environment(), check=True, timeout=WAIT_S,
                cwd=machine.here, capture_output=True,
            )  # fmt: skip
    last = dict(given)
    keys = machine.here / "etc" / "entidb" / "keys"
    keys.mkdir(mode=0o700, parents=True)
    (keys / "first.secret").write_text("s" * 64)
    command = [*json.loads(last["ENTRYPOINT"]), *json.loads(last["CMD"]), "--port"]
    healthy = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    with subprocess.Popen(
        [*command, str(machine.port)], env=machine.environment(), stderr=subprocess.DEVNULL
    ) as process:
        try:
            ends = time.monotonic() + WAIT_S
            while subprocess.run(healthy, check=False, capture_output=True).returncode:
                assert process.poll() is None and time.monotonic() < ends
                time.sleep(0.1)
        finally:
            process.send_signal(getattr(signal, last["STOPSIGNAL"]))
        assert process.wait(WAIT_S) == 0
    assert shlex.split(last["USER"]) == ["entidb"]
