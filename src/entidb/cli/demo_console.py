"""The second scene of the demo: a server with its console, and devices that go on working, for a
person who watches.

Ada works all the time, Ben now and then, and Cleo is away for long stretches: she falls behind and
catches up. Now and then two of them change the same entity. What the administrator does in the
console, such as locking one of them out, happens to them. It ends after so many seconds, or with
Ctrl-C, and leaves nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from entidb.cli.demo_device import DB_ID
from entidb.cli.demo_processes import DeviceProcess, ServerProcess, undisturbed
from entidb.cli.demo_story import DemoStory
from entidb.events import SafeEvent
from entidb.server import mint_token
from entidb.types import SystemClock

NAMES: Final = ("Ada", "Ben", "Cleo")
_ROWS_PER_TRANSACTION: Final = 100
_TURN_S: Final = 1.0
#: Turns of the others in which Cleo has no network.
_AWAY_TURNS: Final = 20
_TOKEN_S: Final = 24 * 3600.0
_SCHEDULE_S: Final = 30


@dataclass
class LivingDevices:
    """Who takes part."""

    server: ServerProcess
    token: str
    devices: list[DeviceProcess]


def watch(story: DemoStory, seconds: float) -> None:
    """Run the scene for so many seconds; 0: until somebody ends it. Nothing that it started is left
    when it returns or raises."""
    clock = SystemClock()
    with _stage() as scene:
        story.console.print("[bold]EntiDB[/bold]: a server with its console, and three devices")
        for device in scene.devices:
            found = device.start()
            story.line(f"{device.name}: process {found['pid']}")
        story.line(f"server: process {scene.server.pid}")
        _load(scene, story)
        story.line(f"console: {scene.server.url}/console")
        story.line(f"token: {scene.token}")
        story.line("Sign in with the token, and watch them. Ctrl-C ends it.")
        end = clock.monotonic() + seconds if seconds else None
        never = SafeEvent()
        for turn in itertools.count(1):
            _turn(scene, story, turn)
            left = _TURN_S if end is None else min(_TURN_S, end - clock.monotonic())
            if left <= 0:
                break
            clock.wait(never, left)
    story.line("All processes are stopped, all files removed.")


@contextlib.contextmanager
def _stage() -> Iterator[LivingDevices]:
    cleanup = contextlib.ExitStack()
    try:
        directory = Path(tempfile.mkdtemp(prefix="entidb-demo-"))
        cleanup.callback(shutil.rmtree, directory)
        secret = secrets.token_hex(32)
        secret_file = directory / "secret"
        secret_file.touch(mode=0o600)
        secret_file.write_text(secret, encoding="utf-8")
        options = ["--console", "--backup-dir", str(directory / "backups")]
        options += ["--backup-every-s", str(_SCHEDULE_S), "--backup-keep", "20"]
        server = ServerProcess(directory, secret_file, *options)
        cleanup.callback(server.stop)
        server.start()
        devices = []
        for name in NAMES:
            token = mint_token(
                secret, subject=name.lower(), databases={DB_ID: "rw"}, expires_s=_TOKEN_S
            )
            device = DeviceProcess(name, directory, server.url, token)
            cleanup.callback(device.stop)
            devices.append(device)
        token = mint_token(
            secret, subject="you", databases={}, expires_s=_TOKEN_S, claims={"admin": True}
        )
        yield LivingDevices(server, token, devices)
    finally:
        with undisturbed():
            cleanup.close()


def _load(scene: LivingDevices, story: DemoStory) -> None:
    ada, ben, cleo = scene.devices
    for device, table in ((ada, "airports"), (ben, "cars")):
        answer = device.ask("load", table=table, rows=_ROWS_PER_TRANSACTION)
        story.line(f"{device.name} loads {table}: {answer['entities']:,} rows")
    for device in (ada, ben, cleo):
        device.ask("sync")


def _turn(scene: LivingDevices, story: DemoStory, turn: int) -> None:
    """One second of their lives."""
    ada, ben, cleo = scene.devices
    _edit(ada, "airports", "SEA", {"add": {"visits": 1}})
    _sync(ada, story)
    if turn % 3 == 0:
        _edit(ben, "notes", f"of turn {turn}", {"set": {"title": f"note {turn}", "by": "Ben"}})
        _edit(ben, "airports", "SEA", {"set": {"city": ("Seattle", "SeaTac")[turn % 2]}})
        _sync(ben, story)
    at = turn % (_AWAY_TURNS + 5)
    if at == 5:
        story.line("Cleo loses the network")
    if at < 5:
        if at == 0:
            story.line("Cleo is back")
        _edit(cleo, "cars", "no. 1", {"set": {"Horsepower": 100 + turn % 50}})
        _sync(cleo, story)


def _edit(device: DeviceProcess, collection: str, key: str, change: dict[str, Any]) -> None:
    device.ask("edit", changes=[{"in": collection, "key": key, **change}])


def _sync(device: DeviceProcess, story: DemoStory) -> None:
    answer = device.try_to("sync")
    if "error" in answer:
        # Whoever watches may have locked it out; its work waits.
        story.line(f"{device.name} could not sync: {answer['message']} ({answer['error']})")
