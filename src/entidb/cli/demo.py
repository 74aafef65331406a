"""``entidb demo``: a server and three devices on this machine, real tables, and a story with an
end that is checked.

Everything in it is the real thing: ``entidb serve`` on a socket of loopback, a token, a database
in a directory for each device, and a process for each, one of which is killed. What is printed is
what the processes answered. The exit code is 0 only if every check held.

    demo            the story, in the order in which it happens
    demo_processes  starting, asking, killing and stopping
    demo_device     what a device process does
    demo_data       the tables
    demo_story      what is printed
    demo_console    the second scene: a server with its console, to watch
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from entidb.cli.demo_console import watch
from entidb.cli.demo_data import data_directory
from entidb.cli.demo_device import DB_ID, fingerprint
from entidb.cli.demo_processes import DeviceProcess, ServerProcess, ended_by_signals, undisturbed
from entidb.cli.demo_story import Answer, DemoStory
from entidb.cli.exits import UsageError
from entidb.db import Database
from entidb.db.records import ACCEPTED, end_of
from entidb.protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR, HandshakeRequest
from entidb.server import mint_token
from entidb.server.config import directory_name
from entidb.sync import HttpTransport
from entidb.types import SystemClock

NAMES: Final = ("Ada", "Ben", "Cleo")
#: Rows of a table in one transaction while it is loaded.
ROWS_PER_TRANSACTION: Final = 100
#: The push whose answer the killed process never reads: one before it is settled, and more come
#: after it.
HELD_PUSH: Final = 3
#: Rounds in which every device syncs, after which no device may have anything left to do.
QUIET_ROUNDS_MAX: Final = 4


#: What the devices do while they have no network: which device, the sentence that says it, and the
#: changes; each entry is one transaction.
_OFFLINE_WORK: Final[list[tuple[str, str, list[dict[str, Any]]]]] = [
    (
        "ada",
        "renames airport SEA, and counts 2 visits there and 2 at ORD",
        [
            {
                "in": "airports",
                "key": "SEA",
                "set": {"name": "Seattle-Tacoma International"},
                "add": {"visits": 2},
            },
            {"in": "airports", "key": "ORD", "add": {"visits": 2}},
        ],
    ),
    (
        "ada",
        "gives car 1 a horsepower of 135 and deletes car 2",
        [
            {"in": "cars", "key": "no. 1", "set": {"Horsepower": 135}},
            {"in": "cars", "key": "no. 2", "delete": True},
        ],
    ),
    (
        "ada",
        "corrects the temperature of 2012/01/01 to 13.1",
        [{"in": "weather", "key": "2012/01/01", "set": {"temp_max": 13.1}}],
    ),
    ("ada", "deletes airport 00M", [{"in": "airports", "key": "00M", "delete": True}]),
    (
        "ada",
        "writes a note: the gate is closed",
        [{"in": "notes", "key": "gate", "set": {"title": "gate", "text": "closed"}}],
    ),
    (
        "ben",
        "moves SEA to the city SeaTac, tags it, counts 3 visits there and 1 at 00R",
        [
            {
                "in": "airports",
                "key": "SEA",
                "set": {"city": "SeaTac"},
                "add": {"visits": 3},
                "tags": ["hub"],
            },
            {"in": "airports", "key": "00R", "add": {"visits": 1}},
        ],
    ),
    (
        "ben",
        "gives car 1 a horsepower of 150, car 3 a weight of 3500, and deletes car 4",
        [
            {"in": "cars", "key": "no. 1", "set": {"Horsepower": 150}},
            {"in": "cars", "key": "no. 3", "set": {"Weight_in_lbs": 3500}},
            {"in": "cars", "key": "no. 4", "delete": True},
        ],
    ),
    (
        "ben",
        "changes car 3 once more",
        [{"in": "cars", "key": "no. 3", "set": {"Acceleration": 10.5}}],
    ),
    ("ben", "deletes airport 00M as well", [{"in": "airports", "key": "00M", "delete": True}]),
    (
        "ben",
        "corrects the same temperature, a moment later, to 12.9",
        [{"in": "weather", "key": "2012/01/01", "set": {"temp_max": 12.9}}],
    ),
    (
        "cleo",
        "tags SEA too, and counts 1 visit",
        [{"in": "airports", "key": "SEA", "add": {"visits": 1}, "tags": ["customs"]}],
    ),
    (
        "cleo",
        "deletes airports 00R, 01G and 05C in one transaction",
        [{"in": "airports", "key": key, "delete": True} for key in ("00R", "01G", "05C")],
    ),
    (
        "cleo",
        "writes the same note: the gate is open",
        [{"in": "notes", "key": "gate", "set": {"title": "gate", "text": "open"}}],
    ),
]


@click.command("demo")
@click.option("--console", is_flag=True, help="A server with its console, to watch.")
@click.option("--seconds", default=0.0, help="With --console: for how long; 0: until Ctrl-C.")
def demo_command(console: bool, seconds: float) -> None:
    """Show everything on this machine: a server, three devices, and what can go wrong."""
    data_directory()  # no tables, no story: found out before anything is started
    if seconds < 0 or (seconds and not console):
        raise UsageError("--seconds is 0 or more, and goes with --console")
    story = DemoStory()
    failed: list[str] = []
    try:
        with ended_by_signals():
            if console:
                watch(story, seconds)
            else:
                failed = tell(story)
    except KeyboardInterrupt:
        story.line("Interrupted. The processes are stopped and the files are gone.")
        raise SystemExit(130) from None
    if failed:
        raise click.ClickException(f"{len(failed)} checks failed: {'; '.join(failed)}")


def tell(story: DemoStory) -> list[str]:
    """Run the whole story. Returns the sentences that turned out not to be true. Nothing that it
    started is left when it returns or raises."""
    clock = SystemClock()
    began = clock.monotonic()
    with stage() as scene:
        demo = Demo(scene, story)
        demo.introduce()
        demo.load_tables()
        demo.work_offline()
        demo.sync_in_turn()
        demo.look_at_what_was_withdrawn()
        demo.kill_in_the_middle_of_a_push()
        demo.come_to_rest()
        demo.compare()
    story.line(f"All processes are stopped, all files removed. {clock.monotonic() - began:.0f} s.")
    story.line("The second scene is yours to watch: make demo-console, or entidb demo --console.")
    return demo.failed


@dataclass
class Scene:
    """Who takes part."""

    server: ServerProcess
    token: str
    ada: DeviceProcess
    ben: DeviceProcess
    cleo: DeviceProcess

    @property
    def devices(self) -> list[DeviceProcess]:
        return [self.ada, self.ben, self.cleo]


@contextlib.contextmanager
def stage() -> Iterator[Scene]:
    """A server and three devices, started; stopped and removed at the end, whatever ends it."""
    cleanup = contextlib.ExitStack()
    try:
        directory = Path(tempfile.mkdtemp(prefix="entidb-demo-"))
        cleanup.callback(shutil.rmtree, directory)
        yield _set_up(directory, cleanup)
    finally:
        with undisturbed():
            cleanup.close()


def _set_up(directory: Path, cleanup: contextlib.ExitStack) -> Scene:
    """Each process is announced to ``cleanup`` before it is started."""
    secret = secrets.token_hex(32)
    secret_file = directory / "secret"
    secret_file.touch(mode=0o600)
    secret_file.write_text(secret, encoding="utf-8")
    server = ServerProcess(directory, secret_file)
    cleanup.callback(server.stop)
    server.start()
    token = mint_token(secret, subject="demo", databases=[DB_ID], expires_s=3600)
    devices = [DeviceProcess(name, directory, server.url, token) for name in NAMES]
    for device in devices:
        cleanup.callback(device.stop)
    return Scene(server, token, *devices)


@dataclass
class Demo:
    """The chapters. ``failed`` collects what should have been true and was not."""

    scene: Scene
    story: DemoStory
    failed: list[str] = field(default_factory=list)
    #: Transactions the server had already, because both sides did the same (R24).
    done: set[str] = field(default_factory=set)
    #: Withdrawn transactions that were committed again, so that their ids are gone.
    again: set[str] = field(default_factory=set)

    def check(self, sentence: str, holds: bool) -> None:
        """Say ``sentence``, and remember it if it is not true."""
        self.story.line(f"{'ok' if holds else 'NOT SO'}: {sentence}", "green" if holds else "red")
        if not holds:
            self.failed.append(sentence)

    def sync(self, device: DeviceProcess) -> Answer:
        answer = device.ask("sync")
        self.done |= set(answer["done"])
        self.story.sync(device.name, answer)
        return answer

    # ------------------------------------------------------------ chapters

    def introduce(self) -> None:
        story, scene = self.story, self.scene
        story.console.print("[bold]EntiDB[/bold]: three devices, a server, and what goes wrong")
        story.chapter("A server, and three devices that have not met it yet")
        story.line(f"$ {' '.join(Path(p).name if '/' in p else p for p in scene.server.command)}")
        story.line(f"server: process {scene.server.pid}, {scene.server.url}, database {DB_ID!r}")
        for device in scene.devices:
            found = device.start()
            story.line(f"{device.name}: process {found['pid']}, an empty database of its own")

    def load_tables(self) -> None:
        self.story.chapter("Real tables, loaded on two devices")
        ada, ben, cleo = self.scene.devices
        loaded = 0
        for device, table in ((ada, "airports"), (ben, "cars"), (ben, "weather")):
            answer = device.ask("load", table=table, rows=ROWS_PER_TRANSACTION)
            loaded += answer["entities"]
            self.story.line(
                f"{device.name} loads {table}: {answer['entities']:,} rows in "
                f"{len(answer['committed'])} transactions, durable before any request"
            )
        for device in (ada, ben, cleo, ada):
            self.sync(device)
        counts = [device.ask("fingerprint")["entities"] for device in self.scene.devices]
        self.check(f"all three devices hold {loaded:,} entities", counts == [loaded] * 3)

    def work_offline(self) -> None:
        self.story.chapter("All three lose the network, and go on working")
        for device in self.scene.devices:
            device.ask("network", online=False)
        for who, sentence, changes in _OFFLINE_WORK:
            edited: DeviceProcess = getattr(self.scene, who)
            edited.ask("edit", changes=changes)
            self.story.line(f"{edited.name} {sentence}")
        refused = self.scene.ben.try_to("sync")
        self.story.line(f"Ben tries to sync: {refused.get('error')} ({refused.get('message')})")
        waiting = self.scene.ben.ask("status")["pending"]
        self.check(
            f"that is an error and no loss: Ben's {waiting} transactions wait in the outbox",
            refused.get("error") == "transport_error" and waiting == 5,
        )

    def sync_in_turn(self) -> None:
        self.story.chapter("The network is back, and they sync one after the other")
        for device in self.scene.devices:
            device.ask("network", online=True)
        ada, ben, cleo = (self.sync(device) for device in self.scene.devices)
        self.check("Ada came first: nothing of hers was disputed", not ada["conflicts"])
        codes = [entry["code"] for entry in ben["withdrawn"]]
        self.check(
            "Ben's transaction on car 1 was withdrawn whole, with the one built on it",
            codes == ["conflict", "depends"],
        )
        self.check("both deleted airport 00M, which is no conflict", len(ben["done"]) == 1)
        self.check("Cleo's note waits for a person", len(cleo["unresolved"]) == 1)
        explained = self.scene.cleo.ask("resolve", choice="mine")["explained"]
        self.story.line("Cleo asks what it is about:")
        for line in "\n".join(explained).splitlines():
            self.story.detail(line)
        self.story.line('Cleo decides: "mine"')
        for device in (self.scene.cleo, self.scene.ada, self.scene.ben):
            self.sync(device)
        seattle = [d.ask("get", collection="airports", key="SEA")["value"] for d in self._devices]
        expected = {"name": "Seattle-Tacoma International", "city": "SeaTac", "visits": 6}
        self.story.line(
            f"SEA is now {seattle[0]['name']!r} in {seattle[0]['city']!r}, "
            f"visits {seattle[0]['visits']}, tags {', '.join(seattle[0]['tags'])}"
        )
        self.check(
            "no change to SEA is lost: Ada's name, Ben's city, 2 + 3 + 1 visits, both tags",
            all(expected.items() <= s.items() and len(s["tags"]) == 2 for s in seattle),
        )
        temperature = self.scene.ada.ask("get", collection="weather", key="2012/01/01")["value"]
        self.check("the later reading of the two won", temperature["temp_max"] == 12.9)

    def look_at_what_was_withdrawn(self) -> None:
        self.story.chapter("What was withdrawn is not lost")
        ben = self.scene.ben
        entries = ben.ask("discarded")["discarded"]
        for entry in entries:
            self.story.withdrawn(entry)
        self.story.line("Ben still wants both, and commits them again on top of what is there now")
        for entry in entries:
            ben.ask("recommit", transaction_id=entry["id"])
            self.again.add(entry["id"])
        answer = self.sync(ben)
        car = ben.ask("get", collection="cars", key="no. 1")["value"]
        self.check(
            "the server takes them now: car 1 has Ben's 150 horsepower",
            answer["pushed"] == 2 and car["Horsepower"] == 150,
        )

    def kill_in_the_middle_of_a_push(self) -> None:
        self.story.chapter("SIGKILL in the middle of a push")
        cleo, story = self.scene.cleo, self.story
        loaded = cleo.ask("load", table="stocks", rows=10)
        waiting = len(loaded["committed"])
        story.line(f"Cleo loads stocks: {loaded['entities']} rows in {waiting} transactions")
        before = self._server_head()
        held = cleo.try_to("sync", hold_push=HELD_PUSH)
        on_server = self._server_head() - before
        story.line(
            f"Cleo syncs: the server has {on_server} of them, and its answer to push "
            f"{HELD_PUSH} is on the way"
        )
        status = cleo.kill()
        story.line(f"kill -9: Cleo's process is gone (ended by signal {-status})")
        self.check("the kill fell into an unfinished push", "held" in held and status == -9)
        self.scene.ada.ask("edit", changes=[{"in": "airports", "key": "00V", "delete": True}])
        story.line("Meanwhile Ada deletes airport 00V")
        self.sync(self.scene.ada)
        found = cleo.start()
        story.line(
            f"Cleo's process {found['pid']} opens the database: {found['pending']} transactions "
            f"wait, {found['inflight']} of them are in flight: sent, or just about to be"
        )
        settled = waiting - found["pending"]
        self.check(
            f"{settled} were settled before the kill; the server has {on_server - settled} more, "
            "and Cleo does not know it",
            0 < settled < on_server <= settled + found["inflight"] < waiting,
        )
        answer = self.sync(cleo)
        grown = self._server_head() - before - 1  # Ada's deletion is one
        self.check(
            f"the same batches were sent again and counted once: {waiting} transactions, "
            f"{grown} new commits on the server",
            grown == waiting and answer["pushed"] == found["pending"],
        )

    def come_to_rest(self) -> None:
        self.story.chapter("All devices sync until there is nothing left to do")
        for _ in range(QUIET_ROUNDS_MAX):
            answers = [self.sync(device) for device in self._devices]
            if not any(answer["pulled"] or answer["pushed"] for answer in answers):
                break
        self.check(
            "a cycle with nothing to do is one request",
            all(answer["requests"] == 1 for answer in answers),
        )

    def compare(self) -> None:
        self.story.chapter("Is everything the same everywhere?")
        rows = []
        discarded: set[str] = set()
        for device in self._devices:
            status = device.ask("status")
            entries = device.ask("discarded")["discarded"]
            discarded |= {entry["id"] for entry in entries}
            print_ = device.ask("fingerprint")
            counts = [status["cursor"], status["pending"], len(entries)]
            rows.append([device.name, *_columns(print_, *counts)])
            device.stop()
        ended = self.scene.server.stop()
        self.check("the server ended by SIGTERM with exit code 0", ended == 0)
        path = self.scene.server.data / directory_name(DB_ID)
        with Database.open(path, create=False) as database:
            columns = _columns(fingerprint(database), database.sequence, "-", "-")
            accepted = _accepted(database)
        rows.insert(0, ["server", *columns])
        self._account(accepted, discarded)
        heads = ["who", "entities", "commit", "waiting", "withdrawn", "faults", "sha256 begins"]
        self.story.table("At the end", heads, [[*row[:6], row[6][:16]] for row in rows])
        self.check(
            "server and devices are byte for byte the same, and no record is damaged",
            len({(row[1], row[2], row[6]) for row in rows}) == 1
            and all(row[5] == 0 for row in rows)
            and all(row[3] == 0 for row in rows[1:]),
        )
        self.story.detail(f"sha256 {rows[0][6]}")

    def _account(self, accepted: set[str], discarded: set[str]) -> None:
        """Every transaction whose commit returned must be somewhere."""
        committed = [identity for device in self._devices for identity in device.committed]
        places = (accepted, self.done, discarded, self.again)
        self.check(
            f"{len(committed)} transactions were committed: {len(accepted)} are on the server, "
            f"each once; {len(self.done)} did what was done already; {len(discarded)} listed as "
            f"withdrawn; {len(self.again)} committed again, as new ones",
            set(committed) == set().union(*places)
            and len(committed) == sum(len(place) for place in places),
        )

    # ------------------------------------------------------------ helpers

    @property
    def _devices(self) -> list[DeviceProcess]:
        return self.scene.devices

    def _server_head(self) -> int:
        """The server's newest commit, from the answer to a handshake."""
        request = HandshakeRequest(
            major=PROTOCOL_MAJOR,
            minor=PROTOCOL_MINOR,
            db_id=DB_ID,
            device_id=bytes(16),
            history=None,
            cursor=0,
            client="entidb-demo",
        )
        with HttpTransport(self.scene.server.url, token=self.scene.token) as transport:
            return transport.handshake(request).head


def _columns(print_: Answer, commit: int, waiting: object, withdrawn: object) -> list[Any]:
    faults = len(print_["faults"])
    return [print_["entities"], commit, waiting, withdrawn, faults, print_["sha256"]]


def _accepted(database: Database) -> set[str]:
    """Ids of the transactions the server remembers as accepted (R14)."""
    with database.storage.snapshot() as snapshot:
        keys = snapshot.scan_keys(ACCEPTED, end_of(ACCEPTED))
    return {key[len(ACCEPTED) :].hex() for key in keys}
