"""The console's files and what is asked of administration for it; a browser drives the page itself
in ``test_console_in_a_browser``.
"""

from __future__ import annotations

import gzip
import json
import re
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb import cbor
from entidb.protocol import PushRequest
from entidb.server import Grants, SyncServer, create_app, serving
from entidb.server.admin.asking import PREFIX
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office
from entidb.server.admin.opening import office_of
from entidb.server.admin.plain_values import as_json, cut
from entidb.server.admin.routes import answer
from entidb.server.console.serving import POLICY, Console, read_files
from entidb.server.pulse import BEAT_MS, Gauges, Pulse
from tests.server.support import DEVICE, NOW_MS, Client, ManualClock, handshake, pull, push

ROOT = Caller("root", "test")
SHOPKEEPER = Caller("ada", "test", frozenset(["shop"]))
OTHER = b"e" * 16
FILES = read_files()
PROJECT = Path(__file__).parents[2]


# ---------------------------------------------------------------- files


def text_of(name: str) -> str:
    return FILES[name].decode()


def scripts() -> list[str]:
    return [name for name in FILES if name.endswith(".js")]


def test_the_page_is_small_and_every_module_has_one_subject():
    assert sum(map(len, FILES.values())) < 300_000
    for name in scripts():
        assert text_of(name).count("\n") < 400, name
        assert text_of(name).startswith("// "), name


def test_what_the_page_names_is_there_and_is_nowhere_else():
    for found in re.findall(r'(?:href|src)="([^"#]+)"', text_of("index.html")):
        assert found.removeprefix("console/") in FILES
    for name in scripts():
        folder = Path(name).parent
        for found in re.findall(r"(?:from|import\()\s*'([^']+)'", text_of(name)):
            parts: list[str] = []
            for part in (folder / found).parts:
                parts = parts[:-1] if part == ".." else [*parts, part]
            assert "/".join(parts) in FILES, (name, found)
    for name, data in FILES.items():
        without = data.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"http://" not in without and b"https://" not in without, name


def test_no_text_becomes_markup_and_no_style_or_script_stands_in_the_page():
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    for name in scripts():
        assert re.search(forbidden, text_of(name)) is None, name
        assert re.search(r"localStorage|sessionStorage|document\.cookie", text_of(name)) is None
    page = text_of("index.html")
    assert re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", page) is None


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/console", 200, "text/html; charset=utf-8"),
        ("/console/app.js", 200, "text/javascript; charset=utf-8"),
        ("/console/views/overview.js", 200, "text/javascript; charset=utf-8"),
        ("/console/style.css", 200, "text/css; charset=utf-8"),
        ("/console/icon.svg", 200, "image/svg+xml"),
        ("/console/nothing.js", 404, "text/plain; charset=utf-8"),
        ("/console/../serving.py", 404, "text/plain; charset=utf-8"),
        ("/console/index.html", 404, "text/plain; charset=utf-8"),
    ],
)
def test_every_answer_of_the_console_says_what_the_page_may(path: str, status: int, kind: str):
    found = Console().answer(path, {})
    assert (found.status, found.headers["content-type"]) == (status, kind)
    assert found.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY and "default-src 'none'" in POLICY
    assert found.headers["x-content-type-options"] == "nosniff"


def test_the_page_with_a_slash_leads_to_the_page_wherever_it_is_mounted():
    found = Console().answer("/console/", {})
    assert (found.status, found.headers["location"]) == (308, "../console")


def test_a_file_is_packed_for_who_takes_it_and_not_sent_again_to_who_has_it():
    console = Console()
    plain = console.answer("/console/app.js", {})
    packed = console.answer("/console/app.js", {"accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    etag = plain.headers["etag"]
    again = console.answer("/console/app.js", {"if-none-match": f'"x", W/{etag}'})
    assert (again.status, again.body) == (304, b"")
    assert console.answer("/console/app.js", {"if-none-match": '"x"'}).status == 200


def test_the_files_are_in_the_wheel(tmp_path: Path):
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(PROJECT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        prefix = "entidb/server/console/static/"
        found = {n.removeprefix(prefix) for n in wheel.namelist() if n.startswith(prefix)}
    assert found == set(FILES)


@pytest.mark.process
@pytest.mark.parametrize("console", [False, True])
def test_a_server_shows_its_console_only_where_it_is_asked_to(console: bool):
    server = SyncServer.in_memory(console=console, access_log=False)
    with server, serving(server) as url, Client(url) as client:
        assert client.request("GET", "/console").status == (200 if console else 404)
        assert client.request("POST", "/console").status == (405 if console else 404)
        overview = json.loads(client.request("GET", PREFIX + "overview").body)
        assert bool(office_of(server).pulse) == console
        assert overview["fleet"]["databases"] == 0


@pytest.mark.process
def test_a_mounted_app_has_its_console_below_its_own_place():
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.testclient import TestClient

    with SyncServer.in_memory(console=True, access_log=False) as server:
        app = create_app(server)
        outer = Starlette(routes=[Mount("/sync", app)], lifespan=app.lifespan)
        with TestClient(outer, base_url="http://localhost") as client:
            assert client.get("/sync/console").status_code == 200
            assert client.get("/sync/console/app.js").status_code == 200
            assert client.get("/sync/v1/admin/overview").status_code == 200


# ---------------------------------------------------------------- what happened lately


class Request:
    """As much of a request as the pulse looks at."""

    def __init__(self, request: Any = None, verdicts: Any = None, **fields: Any) -> None:
        self.path, self.status, self.code, self.subject = "/v1/push", 200, None, "ada"
        self.request, self.verdicts = request, verdicts
        for name, value in fields.items():
            setattr(self, name, value)


class Place:
    """A server in memory with a pulse."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.server = SyncServer.in_memory(console=True, clock=self.clock)
        self.office: Office = office_of(self.server)
        self.pulse = Pulse(self.clock, Gauges(in_flight_bytes=lambda: 7, waiting=lambda: 3))
        self.office.pulse = self.pulse

    def history(self, db_id: str = "shop") -> bytes:
        found: Any = self.server.handle("/v1/handshake", None, handshake(db_id))
        return bytes(found.history)

    def push(self, request: PushRequest, subject: str = "ada") -> Any:
        found: Any = self.server.handle("/v1/push", None, request)
        grants = Grants(subject, {})
        answered = Request(request, found, subject=subject)
        self.server.registry.heard(request, grants, code=None, answer=found)
        self.pulse.answered(answered, 0.004, streamed=False)
        return found

    def ask(self, path: str, caller: Caller = ROOT, **query: str) -> Any:
        status, body = answer(self.office, caller, "GET", PREFIX + path, query, b"")
        return status, json.loads(body)

    def get(self, path: str, caller: Caller = ROOT, **query: str) -> Any:
        status, said = self.ask(path, caller, **query)
        assert status == 200, said
        return said


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.server.close()


def test_figures_are_counted_by_two_seconds_also_those_in_which_nothing_happened(place: Place):
    history = place.history()
    place.push(push(history, 1, 2))
    place.pulse.answered(Request(status=503, code="busy"), 3.0, streamed=False)
    place.clock.advance(3 * BEAT_MS / 1000)
    beats = place.pulse.beats()
    assert [each.requests for each in beats] == [2, 0, 0]
    first = beats[0]
    assert (first.accepted, first.pushes, first.failed) == (2, 1, 1)
    assert (first.half_ms, first.most_ms) == (5.0, 10_000.0)
    assert [each.requests for each in place.pulse.beats(first.at_ms)] == [0, 0]


def test_who_watches_does_not_see_himself_and_a_stream_is_no_slow_answer(place: Place):
    for path in ("/console", "/console/app.js", PREFIX + "overview"):
        place.pulse.answered(Request(path=path), 1.0, streamed=False)
    place.pulse.answered(Request(path="/v1/live"), 300.0, streamed=True)
    place.clock.advance(BEAT_MS / 1000)
    (beat,) = place.pulse.beats()
    assert (beat.requests, beat.most_ms) == (1, 0.0)


def test_no_more_than_five_minutes_and_a_thousand_refusals_are_kept(place: Place):
    place.pulse.answered(Request(), 0.001, streamed=False)
    place.clock.advance(24 * 3600)
    assert len(place.pulse.beats()) == 150
    assert {each.requests for each in place.pulse.beats()} == {0}
    for _ in range(1100):
        place.pulse.answered(Request(handshake(), code="busy"), 0.001, streamed=False)
    assert len(place.pulse.happened(lambda each: True, 5000)) == 1000


def test_a_conflict_is_shown_with_what_the_device_wanted(place: Place):
    history = place.history()
    place.push(push(history, 1, value={"price": 3}))
    refused = PushRequest(
        db_id="shop",
        device_id=OTHER,
        history=history,
        cursor=0,
        collections=["notes"],
        transactions=push(history, 1, value={"price": 4, "raw": b"\0"}).transactions,
    )
    # Another transaction of that id would be the first one's answer.
    import msgspec

    other = msgspec.structs.replace(refused.transactions[0], transaction_id=b"t" * 16)
    place.push(msgspec.structs.replace(refused, transactions=[other]), "ben")
    (found,) = place.get("happened", what="conflict")
    assert (found["subject"], found["device_id"], found["database"]) == ("ben", OTHER.hex(), "shop")
    (touched,) = found["touched"]
    assert touched["value"] == {"price": 4, "raw": {"$bytes": "AA=="}}
    assert touched["collection"] == "notes"
    kinds = [each["what"] for each in place.get("happened")]
    assert kinds == ["conflict", "pushed"]
    story = place.get(f"databases/shop/devices/{OTHER.hex()}")
    assert [each["what"] for each in story["happened"]] == ["conflict"]
    assert place.ask("happened", what="gossip")[0] == 400


def test_a_large_refused_value_is_not_kept(place: Place):
    history = place.history()
    place.push(push(history, 1))
    large = push(history, 1, value="x" * 10_000)
    import msgspec

    other = msgspec.structs.replace(large.transactions[0], transaction_id=b"t" * 16)
    place.push(msgspec.structs.replace(large, transactions=[other]))
    (found,) = place.get("happened", what="conflict,rejected")
    assert found["touched"][0]["kept"] is False
    assert "value" not in found["touched"][0]


def test_an_administrator_of_one_database_sees_nothing_of_others(place: Place):
    for name in ("shop", "bank"):
        place.push(push(place.history(name), 1, db_id=name))
    assert {each["database"] for each in place.get("happened", SHOPKEEPER)} == {"shop"}
    assert {each["database"] for each in place.get("devices", SHOPKEEPER)["rows"]} == {"shop"}
    overview = place.get("overview", SHOPKEEPER)
    assert overview["fleet"]["databases"] == 1
    for path in (
        "databases/bank/collections",
        "databases/bank/entities",
        f"databases/bank/devices/{DEVICE.hex()}",
        "happened",
        "devices",
    ):
        query: dict[str, Any] = {} if "/" in path else {"database": "bank"}
        if path.endswith("entities"):
            query = {"collection": "notes"}
        assert place.ask(path, SHOPKEEPER, **query)[0] == 403, path


# ---------------------------------------------------------------- devices


def test_a_device_falls_behind_and_is_found_by_what_one_knows_of_it(place: Place):
    history = place.history()
    for number in range(1, 4):
        place.push(push(history, number))
    place.server.registry.heard(handshake(), Grants("ada", {}), code=None, client="till/2.1")
    place.server.registry.pulled(pull(history), 0)  # it was put back
    (row,) = place.get("devices", search="ADA till")["rows"]
    assert (row["database"], row["row"]["behind"]) == ("shop", 3)
    assert place.get("devices", search="eve") == {"total": 0, "rows": []}
    assert place.get("devices", database="shop", offset="1") == {"total": 1, "rows": []}
    assert place.get("overview")["fleet"] == {
        "databases": 1,
        "devices": 1,
        "behind": 1,
        "revoked": 0,
        "lag": [0, 1, 0, 0],
    }
    assert place.ask("devices", sort="colour")[0] == 400
    assert place.ask("devices", offset="x")[0] == 400
    assert place.ask("databases/shop/devices/" + OTHER.hex())[0] == 404
    assert place.ask("databases/shop/devices/7")[0] == 400


def test_the_summary_of_devices_is_believed_for_some_seconds(place: Place):
    assert place.get("overview")["fleet"]["databases"] == 0
    place.push(push(place.history(), 1))
    assert place.get("overview")["fleet"]["databases"] == 0
    place.clock.advance(6)
    found = place.get("overview")
    assert found["fleet"]["devices"] == 1
    assert (found["waiting"], found["in_flight_bytes"]) == (3, 7)
    assert found["now_ms"] == NOW_MS + 6000


# ---------------------------------------------------------------- entities


def fill(place: Place, count: int) -> None:
    database = place.server.database("shop")
    with database.transaction() as tx:
        notes = tx.collection("notes")
        for number in range(count):
            notes[uuid.UUID(int=number + 1)] = {"n": number, "kind": ("tea", "coffee")[number % 2]}


def test_entities_are_read_in_pages_filtered_and_sorted(place: Place):
    fill(place, 25)
    assert place.get("databases/shop/collections") == [
        {"name": "notes", "entities": 25, "synced": True}
    ]
    where = json.dumps({"kind": "tea", "n": {">": 3}})
    query: dict[str, Any] = {"collection": "notes", "where": where, "order": "-n", "limit": "4"}
    seen: list[int] = []
    after = ""
    for _ in range(10):
        page = place.get("databases/shop/entities", **query, after=after)
        seen += [row["value"]["n"] for row in page["rows"]]
        after = page["after"] or ""
        if not after:
            break
    assert seen == list(range(24, 3, -2))
    assert page["entities"] == 25


def test_pages_without_an_order_go_on_where_an_entity_was_deleted(place: Place):
    fill(place, 5)
    page = place.get("databases/shop/entities", collection="notes", limit="2")
    database = place.server.database("shop")
    with database.transaction() as tx:
        del tx.collection("notes")[uuid.UUID(page["after"])]
    rest = place.get("databases/shop/entities", collection="notes", after=page["after"])
    assert [row["value"]["n"] for row in rest["rows"]] == [2, 3, 4]
    sorted_: dict[str, Any] = {"collection": "notes", "after": page["after"], "order": "n"}
    assert place.ask("databases/shop/entities", **sorted_)[0] == 400


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({}, 400),
        ({"collection": "nothing"}, 404),
        ({"collection": "notes", "where": "{"}, 400),
        ({"collection": "notes", "where": "[1]"}, 400),
        ({"collection": "notes", "where": '{"n": {"near": 1}}'}, 400),
        ({"collection": "notes", "order": ","}, 400),
        ({"collection": "notes", "after": "x"}, 400),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_with_words(
    place: Place, query: dict[str, Any], status: int
):
    fill(place, 2)
    found, said = place.ask("databases/shop/entities", **query)
    assert found == status and said["message"]


def test_a_large_collection_is_searched_by_an_index_or_not_at_all(place: Place):
    fill(place, 10_001)
    query: dict[str, Any] = {"collection": "notes", "where": '{"n": 7}'}
    status, said = place.ask("databases/shop/entities", **query)
    assert (status, said["code"]) == (400, "no_index")
    assert len(place.get("databases/shop/entities", collection="notes")["rows"]) == 200


def test_one_entity_is_shown_whole_with_its_version(place: Place):
    history = place.history()
    place.push(push(history, 1, value={"title": "x" * 500, "list": [1, 2, {"a": b"\1"}]}))
    identity = str(uuid.UUID(int=1))
    (row,) = place.get("databases/shop/entities", collection="notes")["rows"]
    assert (row["id"], row["whole"], row["value"]["list"]) == (
        identity,
        False,
        {"$more": "list of 3"},
    )
    found = place.get(f"databases/shop/entities/{identity}", collection="notes")
    assert found["value"] == {"title": "x" * 500, "list": [1, 2, {"a": {"$bytes": "AQ=="}}]}
    assert (found["whole"], found["version"], found["device_id"]) == (True, 1, DEVICE.hex())
    missing = f"databases/shop/entities/{uuid.UUID(int=9)}"
    assert place.ask(missing, collection="notes")[0] == 404
    assert place.ask("databases/shop/entities/9", collection="notes")[0] == 400


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"\0\1", {"$bytes": "AAE="}),
        (2**53, {"$int": "9007199254740992"}),
        (2**53 - 1, 2**53 - 1),
        (-(2**60), {"$int": str(-(2**60))}),
        (True, True),
        ({"a": [None, 1.5, b""]}, {"a": [None, 1.5, {"$bytes": ""}]}),
    ],
)
def test_values_become_json_that_loses_nothing(value: Any, shown: Any):
    assert as_json(cbor.decode(cbor.encode(value))) == shown


def test_a_value_in_short_says_that_it_is_cut():
    assert cut({"a": 1, "b": "x"}) == ({"a": 1, "b": "x"}, True)
    assert cut({"a": [1]}) == ({"a": {"$more": "list of 1"}}, False)
    assert cut("x" * 200)[1] is False
    assert cut({str(n): n for n in range(30)})[1] is False
