"""A server of several processes: every worker serves every database, news and decisions of one
reach the others, and a worker that is killed takes nothing with it but its connections.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from entidb.errors import ConfigError, DatabaseLockedError
from entidb.protocol import PullResponse, PushResponse, Verdict
from entidb.server import ServerConfig, SyncServer, mint_token, serve, serving
from entidb.server.admin.local import LocalRequest, ask
from entidb.server.admin.office import NoOthers
from entidb.server.admin.opening import office_of
from entidb.server.directory import ASIDE, DataDirectory
from entidb.server.workers import family as families
from entidb.server.workers import parent
from entidb.server.workers.family import Family
from entidb.server.workers.parent import Parent, _Child
from entidb.server.workers.seats import Seats
from entidb.server.workers.team import Team
from entidb.storage.locks import HeldError
from tests.server.support import SECRET, Client, pull, push
from tests.server.test_live import Events
from tests.tools import PATIENT, free_port, package

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers need Linux"),
]

WAIT_S = 120.0
SERVE = [sys.executable, "-m", "entidb", "serve", "--port", "0", "--insecure-no-auth"]
PROGRAM = """
import json, sys
from entidb.server import ServerConfig, serve
settings = json.loads(sys.argv[2])
serve(ServerConfig(data_dir=sys.argv[1], **settings), port=0, ready_file=sys.argv[3])
print("stopped", flush=True)
"""
APP = """
import os
from entidb.server import ServerConfig, create_app
app = create_app(
    ServerConfig(data_dir=os.environ["DATA"], insecure_no_auth=True, metrics=True)
)
"""


def environment(**more: str) -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    return {**os.environ, "PYTHONPATH": source, "PYTHONUNBUFFERED": "1", **more}


def until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


class Served:
    """A running server: its parent, where it is, and what it writes."""

    def __init__(self, process: subprocess.Popen[bytes], place: Path, url: str) -> None:
        self.process = process
        self.place = place
        self.data = place / "data"
        self.url = url
        self._opened: list[Client | Events] = []

    def close(self) -> None:
        for each in self._opened:
            each.close()

    def log(self) -> str:
        return (self.place / "log").read_text()

    def workers(self) -> list[int]:
        """The processes that serve, as the system knows them."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        found = [task.joinpath("children").read_text().split() for task in tasks.iterdir()]
        pids = {int(pid) for each in found for pid in each}
        seats = {path.name.partition("-")[0] for path in self.seats()}
        return sorted(pid for pid in pids if str(pid) in seats)

    def chairman(self) -> int:
        """The process that does what only one may do; 0 while it is not known."""
        with contextlib.suppress(OSError):
            note = (self.data / "entidb-workers" / "chair").read_text().split()
            return int(note[1].partition("-")[0]) if len(note) == 2 else 0
        return 0

    def kill_one(self) -> None:
        """Kill a worker, and wait for another one to take its place."""
        victim = until(lambda: len(self.workers()) == 2 and self.workers()[0], "two serve")
        os.kill(victim, signal.SIGKILL)
        until(
            lambda: victim not in self.workers() and len(self.workers()) == 2,
            "another one takes its place",
        )

    def seats(self) -> list[Path]:
        return list((self.data / "entidb-workers").glob("*.sock"))

    def clients(self, token: str | None = None) -> list[Client]:
        """One for each of two workers."""
        found: dict[str, Client] = {}

        def look() -> bool:
            client = Client(self.url, token)
            answer = client.request("GET", "/v1/info")
            name = answer.headers["x-request-id"].partition("-")[0]
            if name in found:
                client.close()
            else:
                found[name] = client
                self._opened.append(client)
            return len(found) == 2

        until(look, "a second worker answers")
        return list(found.values())

    def events(self, number: int, token: str | None = None) -> Events:
        """A stream of the worker that is number so and so of those asked."""
        seen: list[str] = []

        def look() -> Events | None:
            stream = Events(self.url, token)
            name = (stream.response.getheader("x-request-id") or "").partition("-")[0]
            if name not in seen:
                seen.append(name)
            if len(seen) == 2 and seen.index(name) == number:
                self._opened.append(stream)
                return stream
            stream.close()
            return None

        found = until(look, "a stream of that worker")
        assert isinstance(found, Events)
        return found


@contextlib.contextmanager
def started(command: list[str], place: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=place, env=environment(**more), stdout=subprocess.PIPE, stderr=log
        )
    with process:
        try:
            yield process
        finally:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            left = children.read_text().split() if process.poll() is None else []
            if process.poll() is None:
                process.kill()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def served(place: Path, **settings: Any) -> Iterator[Served]:
    """Two workers in processes of their own, ended at the latest at the end of the block."""
    if "jwt_secret_file" not in settings:
        settings["insecure_no_auth"] = True
    settings = {"workers": 2, "metrics": True, **settings}
    ready = place / "ready"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-c", PROGRAM, str(place / "data"), json.dumps(settings), str(ready)]
    with started(command, place) as process:
        until(lambda: ready.exists() or process.poll() is not None, "it serves")
        assert process.poll() is None, (place / "log").read_text()
        with contextlib.closing(Served(process, place, ready.read_text().strip())) as server:
            yield server


def there(data: Path, db_id: str) -> set[int]:
    """What is stored in the database, by a look at the closed one."""
    found: list[int] = []
    with SyncServer(ServerConfig(data_dir=data, insecure_no_auth=True)) as server:
        database = server.database(db_id)
        history, cursor, more = database.history, 0, True
        assert history is not None
        while more:
            request = pull(history, db_id=db_id, cursor=cursor)
            page = server.handle("/v1/pull", None, request)
            assert isinstance(page, PullResponse)
            found += [
                int.from_bytes(operation.entity_id, "big")
                for commit in page.commits
                for operation in commit.operations
            ]
            cursor, more = page.cursor, page.has_more
        assert database.verify() == []
    assert len(found) == len(set(found))
    return set(found)


def test_two_workers_serve_every_database_and_read_what_the_other_wrote(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        first, second = server.clients()
        for db_id in ("shop", "stock"):
            history = first.history(db_id)
            assert second.history(db_id) == history
            first.send(push(history, 1, db_id=db_id)).message(PushResponse)
            second.send(push(history, 2, db_id=db_id)).message(PushResponse)
            for client in (first, second):
                page = client.send(pull(history, db_id=db_id)).message(PullResponse)
                assert [commit.version for commit in page.commits] == [1, 2]
                # At the end of it, and so without touching the disk, until the other one writes.
                idle = client.send(pull(history, db_id=db_id, cursor=2)).message(PullResponse)
                assert idle.head == 2
            first.send(push(history, 3, db_id=db_id)).message(PushResponse)
            page = second.send(pull(history, db_id=db_id, cursor=2)).message(PullResponse)
            assert [commit.version for commit in page.commits] == [3]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT_S) == 0
        assert server.process.stdout is not None
        assert server.process.stdout.read() == b"stopped\n"
        assert not (server.data / "entidb-workers").exists()
        assert not (server.data / "entidb-server.lock").exists()


def test_what_was_acknowledged_is_there_once_though_workers_are_killed(tmp_path: Path) -> None:
    """Five devices push to one database and five each to their own, over new connections where
    theirs has ended; three times a worker is killed. What had no answer is sent again (R14)."""
    with served(tmp_path, access_log=False) as server:
        names = ["shop"] * 5 + [f"own-{number}" for number in range(5)]
        acknowledged: dict[str, set[int]] = {name: set() for name in names}
        again = 0
        stop = threading.Event()

        def send(db_id: str, entity: int) -> bool:
            with Client(server.url) as client:
                answer = client.send(push(client.history(db_id), entity, db_id=db_id))
                if answer.status != 200:
                    return False
                (result,) = answer.message(PushResponse).results
                assert result.verdict == Verdict.ACCEPTED, result
                return True

        def device(number: int, db_id: str) -> None:
            nonlocal again
            for entity in range(number * 100_000, number * 100_000 + 99_999):
                while not stop.is_set():
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        if send(db_id, entity):
                            acknowledged[db_id].add(entity)
                            break
                    again += 1
                    time.sleep(0.02)
                if stop.is_set():
                    return

        def go_on() -> None:
            before = {name: len(found) for name, found in acknowledged.items()}
            until(
                lambda: all(len(acknowledged[name]) > before[name] for name in names),
                "all devices go on",
            )

        devices = [
            threading.Thread(target=device, args=pair, daemon=True) for pair in enumerate(names, 1)
        ]
        for each in devices:
            each.start()
        for _ in range(3):
            server.kill_one()
            go_on()
        stop.set()
        for each in devices:
            each.join(WAIT_S)
        assert server.log().count("has ended by signal 9; another takes its place") == 3
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT_S) == 0
    for name, found in acknowledged.items():
        assert found
        assert found <= there(server.data, name)


def test_a_stream_of_one_worker_hears_of_a_push_to_the_other(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        pusher = server.clients()[0]
        history = pusher.history()
        streams = [server.events(0), server.events(1)]
        for stream in streams:
            assert stream.next()
        pusher.send(push(history, 1)).message(PushResponse)
        for stream in streams:
            event = stream.next()
            assert event is not None
            assert event["data"] == "1"
        # Who waits does not hold up the end of any of them.
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            last = stream.next()
            assert last is not None
            assert last["data"] == "shutdown"
        assert server.process.wait(WAIT_S) == 0


def test_a_stream_hears_of_a_database_that_its_worker_has_closed(tmp_path: Path) -> None:
    with served(tmp_path, databases_open_max=1) as server:
        first, second = server.clients()
        history = first.history()
        streams = [server.events(0), server.events(1)]
        for stream in streams:
            assert stream.next()
        # Both open another one, and with that close this one.
        for client in (first, second):
            client.history("other")
        first.send(push(history, 1)).message(PushResponse)
        for stream in streams:
            event = stream.next()
            assert event is not None
            assert event["data"] == "1"


def test_a_revocation_holds_in_all_workers_and_ends_the_streams_of_all(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    token = mint_token(SECRET, subject="till", databases={"shop": "rw"})
    admin = mint_token(SECRET, subject="boss", databases={}, claims={"admin": True})
    with served(tmp_path, jwt_secret_file=str(secret)) as server:
        clients = server.clients(token)
        history = clients[0].history()
        streams = [server.events(0, token), server.events(1, token)]
        for stream in streams:
            assert stream.next()
        boss = server.clients(admin)[0]
        body = json.dumps({"kind": "subject", "name": "till"}).encode()
        answer = boss.request("POST", "/v1/admin/revoked", body, content_type="application/json")
        assert answer.status == 200, answer.body
        for client in clients:
            refused = client.send(pull(history))
            assert refused.code == "forbidden"
            assert refused.error.details["reason"] == "revoked"
        for stream in streams:
            event = stream.next()
            assert event is not None
            assert "revoked" in event["data"]
            assert stream.next() is None


def admin(client: Client, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    answer = client.request(method, "/v1/admin/" + path, data, content_type="application/json")
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


def test_every_worker_answers_for_all_of_them_what_administration_asks(tmp_path: Path) -> None:
    with served(tmp_path, backup_dir=str(tmp_path / "backups")) as server:
        first, second = server.clients()
        history = first.history()
        for number, client in enumerate((first, second, second), 1):
            client.send(push(history, number)).message(PushResponse)
        for client in (first, second):
            (row,) = admin(client, "GET", "databases")
            assert row["open"]
            (device,) = admin(client, "GET", "databases/shop/devices")
            assert device["device"]["accepted"] == 3
            assert device["device"]["requests"] == 4
        # A task is one of the server, whichever worker is asked.
        task = admin(first, "POST", "databases/shop/backup")
        number = task["id"]
        until(lambda: is_done(first, number), "the backup is made")
        assert is_done(second, number)
        said = [entry["action"] for entry in admin(second, "GET", "audit")]
        assert said.count("backup") == 1


def test_a_database_is_renamed_compacted_and_deleted_though_every_worker_has_it_open(
    tmp_path: Path,
) -> None:
    with served(tmp_path) as server:
        first, second = server.clients()
        history = first.history()
        for number, client in enumerate((first, second), 1):
            client.send(push(history, number)).message(PushResponse)
        admin(second, "POST", "databases/shop/rename", {"to": "store"})
        for client in (first, second):
            page = client.send(pull(history, db_id="store")).message(PullResponse)
            assert [commit.version for commit in page.commits] == [1, 2]
            assert client.send(pull(history)).code == "history_changed"
        task = admin(first, "POST", "databases/store/compact", {})
        until(lambda: is_done(second, task["id"]), "it is compacted")
        for number, client in enumerate((first, second), 3):
            client.send(push(history, number, db_id="store")).message(PushResponse)
        admin(first, "DELETE", "databases/store", {"confirm": "store"})
        for client in (first, second):
            assert client.send(pull(history, db_id="store")).code == "history_changed"


def test_a_person_is_erased_though_every_worker_has_the_database_open(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        clients = first, second = server.clients()
        history = first.history()
        for number, client in enumerate(clients, 1):
            value = {"name": "ada-of-marylebone"}
            client.send(push(history, number, value=value)).message(PushResponse)
        second.send(push(history, 3, value={"name": "other"})).message(PushResponse)
        wanted = {"collections": {"notes": {"name": "ada-of-marylebone"}}}
        seen = admin(second, "POST", "databases/shop/erase/preview", wanted)
        assert seen["entities"] == 2
        confirmed = {**wanted, "confirm": seen["confirm"]}
        task = admin(first, "POST", "databases/shop/erase", confirmed)
        until(lambda: is_done(second, task["id"]), "it is erased")
        for client in clients:
            # The other worker hears a moment later that the database may be opened again.
            until(partial(pulls_to, client, history, 4), "it is open again")
        files = [path for path in server.data.rglob("*") if path.is_file()]
        assert [path for path in files if b"ada-of-marylebone" in path.read_bytes()] == []
        assert admin(second, "GET", "databases/shop")["entities"] == 1


def pulls_to(client: Client, history: bytes, head: int) -> bool:
    answer = client.send(pull(history, cursor=head))
    if answer.status == 503:
        assert answer.code == "busy"
        return False
    page = answer.message(PullResponse)
    assert page.cursor == page.head == head
    return True


def is_done(client: Client, task: int) -> bool:
    return bool(admin(client, "GET", f"tasks/{task}").get("state") == "done")


def counters(client: Client) -> dict[str, float]:
    text = client.request("GET", "/metrics").body.decode()
    lines = re.findall(r"^([a-z_]+(?:\{[^}]*\})?) ([0-9.e+]+)$", text, flags=re.MULTILINE)
    return {name: float(value) for name, value in lines}


def has_counted(client: Client, name: str, number: float) -> bool:
    return counters(client)[name] == number


def test_metrics_and_health_speak_for_all_workers_also_for_one_that_was_killed(
    tmp_path: Path,
) -> None:
    with served(tmp_path) as server:
        clients = server.clients()
        history = clients[0].history()
        for number in range(1, 11):
            clients[number % 2].send(push(history, number)).message(PushResponse)
        accepted = 'entidb_transactions_total{verdict="accepted"}'
        pushes = 'entidb_requests_total{path="/v1/push",status="200"}'
        for client in clients:
            found = counters(client)
            assert found[accepted] == 10
            # Counted when its answer has left, which the client may have read before that.
            until(partial(has_counted, client, pushes, 10), "all requests count")
            assert found["entidb_open_databases"] == 2
            assert json.loads(client.request("GET", "/healthz").body)["workers"] == 2
            assert client.request("GET", "/readyz").status == 200
        # What somebody has seen is not gone with who is killed at once after it.
        for number in range(11, 14):
            clients = server.clients()
            clients[number % 2].send(push(history, number)).message(PushResponse)
            assert counters(clients[0])[accepted] == number
            server.kill_one()
            assert counters(server.clients()[0])[accepted] == number


def test_the_socket_of_administration_is_another_workers_when_its_owner_is_killed(
    tmp_path: Path,
) -> None:
    with served(tmp_path) as server:
        server.clients()[0].history()

        first = until(server.chairman, "one has the chair")
        assert (server.data / "entidb-admin.sock").exists()
        os.kill(first, signal.SIGKILL)
        until(lambda: server.chairman() not in (0, first), "another one has it")
        door = server.data / "entidb-admin.sock"

        def answered() -> bool:
            with contextlib.suppress(OSError, ValueError):
                answer = ask(str(server.data), LocalRequest("GET", "/v1/admin/databases"))
                return answer.status == 200 and b"shop" in bytes(answer.body)
            return False

        until(answered, "it answers at the socket")
        assert door.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="nothing says who is stopped")
def test_a_worker_on_duty_that_is_stopped_is_killed_and_another_is_on_duty(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        server.clients()[0].history()
        first = until(server.chairman, "one has the chair")
        os.kill(first, signal.SIGSTOP)
        until(lambda: server.chairman() not in (0, first), "another one has it")
        until(lambda: len(server.workers()) == 2 and first not in server.workers(), "two serve")
        assert f"worker {first} has been stopped" in server.log()


def test_a_worker_that_is_stopped_for_a_moment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    states, killed = iter([True] * 9 + [False] + [True] * 10), list[tuple[int, int]]()
    made = Parent(1, lambda number, ready: None, announce=lambda: None, grace_s=0.0)
    made._children[3] = _Child(4711, 3, 0)
    monkeypatch.setattr(parent, "_LOOK_S", 0.0)
    monkeypatch.setattr(parent, "_is_stopped", lambda pid: next(states))
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    for look in range(20):
        assert not killed, look
        made._look_at_stopped()
    assert killed == [(4711, signal.SIGKILL)]


def test_backups_are_made_by_one_worker_and_by_another_when_that_is_killed(tmp_path: Path) -> None:
    place = tmp_path / "backups" / "shop.entidb"
    settings = {"backup_every_s": 1.0, "backup_keep": 100, "purge_interval_s": 1.0}
    with served(tmp_path, backup_dir=str(tmp_path / "backups"), **settings) as server:

        def made() -> list[int]:
            """When, in milliseconds."""
            found = [json.loads(path.read_bytes()) for path in place.glob("*.json")]
            return sorted(each["made_ms"] for each in found)

        for client in server.clients():
            client.history()
        until(lambda: len(made()) >= 2, "two are made")
        first = server.chairman()
        assert first
        os.kill(first, signal.SIGKILL)
        before = len(made())
        until(lambda: len(made()) >= before + 2, "they go on")
        assert server.chairman() not in (0, first)
        # A second worker that makes them would make one where the first has just made one.
        times = made()
        assert all(later - earlier >= 1000 for earlier, later in pairwise(times))


class OffDuty(NoOthers):
    """The others of a process that has not got the chair."""

    def on_duty(self) -> bool:
        return False


def test_a_worker_whose_directory_was_moved_says_so_once_and_without_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Looking:
        _stop = threading.Event()
        looks = 0

        def _tick(self) -> None:
            self.looks += 1
            if self.looks == 4:
                self._stop.set()
            open(tmp_path / "moved" / "chair").close()

    with caplog.at_level(logging.WARNING, "entidb.server"):
        Team._run(cast(Team, Looking()))
    (record,) = caplog.records
    assert record.exc_info is None and "are not seen" in record.getMessage()
    assert str(tmp_path / "moved" / "chair") in record.getMessage()


def test_a_worker_that_is_not_on_duty_makes_no_backup_and_removes_nothing(tmp_path: Path) -> None:
    config = ServerConfig(
        data_dir=tmp_path / "data",
        insecure_no_auth=True,
        backup_dir=tmp_path / "backups",
        backup_every_s=60.0,
    )
    with SyncServer(config) as server:
        server.database("shop")
        office = office_of(server)
        old = tmp_path / "data" / ASIDE / "gone.entidb.1"
        old.mkdir(parents=True)
        office.others = OffDuty()
        server.housekeep()
        assert office.tasks.all() == []
        assert office.oldest_backup_ms is not None  # what it says of backups is known here too
        assert old.exists()
        office.others = NoOthers()
        server.housekeep()
        assert [each.kind for each in office.tasks.all()] == ["backup"]
        assert not old.exists()


def test_a_second_server_of_the_directory_is_refused_and_names_the_parent(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        for more in ([], ["--workers", "2"]):
            second = subprocess.run(
                [*SERVE, str(server.data), *more],
                env=environment(),
                capture_output=True,
                text=True,
                timeout=WAIT_S,
                check=False,
            )
            assert second.returncode == 8, second.stderr
            assert f"is served by process {server.process.pid} already" in second.stderr
        assert len(server.workers()) == 2


def test_the_workers_end_with_their_parent_and_a_server_that_follows_waits_for_them(
    tmp_path: Path,
) -> None:
    with served(tmp_path) as server:
        client = server.clients()[0]
        history = client.history()
        client.send(push(history, 1)).message(PushResponse)
        workers = server.workers()
        server.process.kill()
        server.process.wait()
        with served(tmp_path) as second:
            until(lambda: not any(is_running(pid) for pid in workers), "the workers have ended")
            page = second.clients()[0].send(pull(history)).message(PullResponse)
            assert [commit.version for commit in page.commits] == [1]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_hangup_reaches_every_worker(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.log().count("SIGHUP: nothing to read again") == 2, "both have said so")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(WAIT_S) == 0


def test_a_worker_that_takes_anothers_place_has_the_keys_that_were_read_last(
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    newer = b"another correct horse, and a better battery"
    with served(tmp_path, jwt_secret_file=str(secret)) as server:
        secret.write_bytes(newer)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.log().count("SIGHUP: keys") == 2, "both have read them")
        server.kill_one()
        server.kill_one()
        token = mint_token(newer, subject="till", databases={"shop": "rw"})
        for client in server.clients(token):
            client.history()


def test_workers_that_end_before_they_serve_are_not_started_without_end(tmp_path: Path) -> None:
    program = PROGRAM.replace(
        "serve(", "import os, entidb.server.run as run\nrun._work = lambda *a: os._exit(7)\nserve("
    )
    command = [sys.executable, "-c", program, str(tmp_path / "data")]
    command += [json.dumps({"workers": 2, "insecure_no_auth": True}), str(tmp_path / "ready")]
    with started(command, tmp_path) as process:
        assert process.wait(WAIT_S) == 1
    assert (
        "the workers end before they serve, the last one with exit code 7"
        in (tmp_path / "log").read_text()
    )


# ---------------------------------------------------------------- programs that start the processes


def app_served(
    place: Path, command: list[str], port: int
) -> contextlib.AbstractContextManager[Any]:
    (place / "shop_app.py").write_text(APP)

    @contextlib.contextmanager
    def run() -> Iterator[Served]:
        url = f"http://127.0.0.1:{port}"
        with (
            started([sys.executable, "-m", *command], place, DATA=str(place / "data")) as process,
            contextlib.closing(Served(process, place, url)) as server,
        ):

            def both() -> bool:
                assert process.poll() is None, server.log()
                return len(server.seats()) == 2

            until(both, "both serve")
            yield server

    return run()


@pytest.mark.parametrize("manager", ["uvicorn", "gunicorn", "gunicorn --preload"])
def test_the_processes_of_one_parent_are_one_server(tmp_path: Path, manager: str) -> None:
    port = free_port()
    command = ["uvicorn", "shop_app:app", "--workers", "2", "--port", str(port)]
    if manager.startswith("gunicorn"):
        package("gunicorn")
        command = [*manager.split(), "shop_app:app", "--workers", "2"]
        command += [
            "--bind",
            f"127.0.0.1:{port}",
            "--worker-class",
            "uvicorn.workers.UvicornWorker",
        ]
    command += PATIENT[manager.split()[0]]
    with app_served(tmp_path, command, port) as server:
        first, second = server.clients()
        history = first.history()
        first.send(push(history, 1)).message(PushResponse)
        second.send(push(history, 2)).message(PushResponse)
        for client in (first, second):
            page = client.send(pull(history)).message(PullResponse)
            assert [commit.version for commit in page.commits] == [1, 2]
            assert counters(client)['entidb_transactions_total{verdict="accepted"}'] == 2
        with pytest.raises(DatabaseLockedError, match=f"served by process {server.process.pid} "):
            SyncServer(ServerConfig(data_dir=server.data, insecure_no_auth=True))
        with pytest.raises(DatabaseLockedError, match=f"served by process {server.process.pid} "):
            SyncServer(ServerConfig(data_dir=server.data, insecure_no_auth=True, workers=2))
        server.kill_one()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT_S) in (0, -signal.SIGTERM)
    assert there(server.data, "shop") == {1, 2}


# ---------------------------------------------------------------- what is refused


def test_workers_share_a_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers share what is on a disk"):
        ServerConfig(data_dir=None, insecure_no_auth=True, workers=2)
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True, workers=2)
    with pytest.raises(ConfigError, match="take serve for several workers"), serving(config):
        pass
    with SyncServer(config) as own, pytest.raises(ConfigError, match="has a server of its own"):
        serve(own)


def test_where_a_database_is_open_in_one_process_only_workers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "can_share", lambda: False)
    monkeypatch.setattr("entidb.server.run.can_share", lambda: False)
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True, workers=2)
    for start in (SyncServer, serve):
        with pytest.raises(ConfigError, match="several workers need Linux"):
            start(config)


def test_a_directory_is_one_familys_as_long_as_one_of_it_is_there(tmp_path: Path) -> None:
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    mine, other = Family.of(os.getppid()), Family.of(1)
    first, second = DataDirectory.take(config, mine), DataDirectory.take(config, mine)
    for family in (other, None):
        with pytest.raises(DatabaseLockedError):
            DataDirectory.take(config, family)
    first.release()
    first.release()
    with pytest.raises(DatabaseLockedError):
        DataDirectory.take(config, other)
    DataDirectory.take(config, mine).release()
    second.release()
    DataDirectory.take(config, other).release()
    DataDirectory.take(config).release()


# ---------------------------------------------------------------- seats


def test_a_seat_is_held_as_long_as_its_process_has_it_and_one_has_the_chair(tmp_path: Path) -> None:
    first, second = Seats(str(tmp_path)), Seats(str(tmp_path))
    assert first.others() == [second.name]
    assert first.take_chair()
    assert not second.take_chair()
    assert second.chairman() == first.name
    first.leave()
    assert (second.others(), second.gone(), second.chairman()) == ([], [first.name], None)
    assert second.take_chair()
    second.clear(first.name)
    assert second.gone() == []
    second.leave()


def test_a_database_that_one_keeps_closed_is_closed_for_those_who_come_later(
    tmp_path: Path,
) -> None:
    first = Seats(str(tmp_path))
    lock = first.keep_closed("shop.entidb")
    second = Seats(str(tmp_path))
    assert second.is_kept_closed("shop.entidb")
    assert not second.is_kept_closed("other.entidb")
    with pytest.raises(HeldError):
        second.keep_closed("shop.entidb")
    lock.release()  # as when its process is killed: what it left says nothing any more
    assert not second.is_kept_closed("shop.entidb")
    first.let_open("shop.entidb", second.keep_closed("shop.entidb"))
    assert not second.is_kept_closed("shop.entidb")
    first.leave()
    second.leave()


def test_of_several_that_would_look_for_old_tombstones_one_does(tmp_path: Path) -> None:
    first, second = Seats(str(tmp_path)), Seats(str(tmp_path))
    assert first.is_first("shop.entidb", 3600.0)
    assert not second.is_first("shop.entidb", 3600.0)
    assert not first.is_first("shop.entidb", 3600.0)
    assert second.is_first("other.entidb", 3600.0)
    assert second.is_first("shop.entidb", 0.0)
    first.leave()
    second.leave()
