"""Plays ``tests/vectors/conversations.json`` with this project's device.

The device is a real one: database, engine, HTTP transport and messages. Only the server is a
script, which compares what arrives, byte for byte decoded, and answers what stands there. How a
conversation is read is said in ``docs/protocol.md``, last section.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl
from uuid import UUID

from entidb import cbor
from entidb.db import Database
from entidb.db.outbox import read_discarded, read_pending
from entidb.errors import SyncError, TransportError
from entidb.protocol import encode
from entidb.server.carrying import event_text
from entidb.storage import MemoryStorage
from entidb.sync import RetryConfig, SyncConfig, SyncEngine
from entidb.sync.carried import page_in, question
from entidb.sync.http import HttpTransport
from entidb.sync.transport import HttpResponse, LoopbackClient
from entidb.types import Clock
from tests.support import FakeClock

CONVERSATIONS: Final = Path(__file__).parent.parent / "vectors" / "conversations.json"
SEGMENTS: Final = "/v1/segments/"
CBOR: Final = {"content-type": "application/cbor"}

Json = dict[str, Any]


class Mismatch(AssertionError):
    """The device did something else than the conversation says."""


def conversations() -> list[Json]:
    rows: list[Json] = json.loads(CONVERSATIONS.read_text("utf-8"))["conversations"]
    return rows


@dataclass
class Names:
    """What the script names without knowing it: ids and times that the device chooses."""

    known: dict[str, Any] = field(default_factory=dict)

    def check(self, must: Any, got: Any, where: str) -> None:
        """``got`` is what ``must`` says; what is named for the first time gets its value here."""
        if isinstance(must, Mapping) and set(must) == {"is"}:
            if self.known.setdefault(must["is"], got) != got:
                raise Mismatch(f"{where} is {got}, and was {self.known[must['is']]} before")
        elif isinstance(must, Mapping) and set(must) == {"one of"}:
            if got not in must["one of"]:
                raise Mismatch(f"{where} is {got}, not one of {must['one of']}")
        elif isinstance(must, Mapping) and set(must) == {"at most"}:
            if not all(_inside(one, must["at most"]) for one in got):
                raise Mismatch(f"{where} names {got}, and may name {must['at most']} at most")
        elif isinstance(must, Mapping) and set(must) == {"set"}:
            left = list(got)
            for item in must["set"]:
                found = next((one for one in left if self._fits(item, one)), None)
                if found is None:
                    raise Mismatch(f"{where} is {got}, not {must['set']} in any order")
                left.remove(found)
            if left:
                raise Mismatch(f"{where} has {left} beside {must['set']}")
        elif isinstance(must, Mapping) and set(must) != {"hex"}:
            for key, item in must.items():
                if key not in got:
                    raise Mismatch(f"{where} lacks {key}")
                self.check(item, got[key], f"{where}.{key}")
        elif isinstance(must, list):
            if not isinstance(got, list) or len(got) != len(must):
                raise Mismatch(f"{where} is {got}, not {must}")
            for index, item in enumerate(must):
                self.check(item, got[index], f"{where}[{index}]")
        elif got != must or type(got) is not type(must):
            raise Mismatch(f"{where} is {got}, not {must}")

    def _fits(self, must: Any, got: Any) -> bool:
        try:
            Names(dict(self.known)).check(must, got, "")
        except Mismatch:
            return False
        return True

    def filled(self, item: Any) -> Any:
        """``item`` with the names replaced by what they stand for, and its bytes as bytes."""
        if isinstance(item, Mapping):
            if set(item) == {"is"}:
                return self.filled(self.known[item["is"]])
            if set(item) == {"hex"}:
                return bytes.fromhex(item["hex"])
            return {key: self.filled(value) for key, value in item.items()}
        return [self.filled(value) for value in item] if isinstance(item, list) else item


def _inside(one: list[int], ranges: list[list[int]]) -> bool:
    return any(first <= one[0] and one[1] <= last for first, last in ranges)


def as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list) else value


class ScriptedServer:
    """A ``LoopbackServer`` that knows its part by heart."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self.script: list[Json] = []
        #: Segments that were offered in this cycle, by their names.
        self.files: dict[str, Json] = {}
        #: What a thread of the device's own has done wrong.
        self.mismatch: Mismatch | None = None

    def handle_http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> HttpResponse:
        if path.startswith(SEGMENTS):
            return self._segment(method, path, headers)
        got = as_json(cbor.decode(body))
        if not self.script:
            raise Mismatch(f"one request too many: {path} {got}")
        row = self.script.pop(0)
        while (
            (row.get("optional") or "files" in row)
            and path != f"/v1/{row['request']}"
            and self.script
        ):
            row = self.script.pop(0)
        if (method, path) != ("POST", f"/v1/{row['request']}"):
            raise Mismatch(f"{method} {path} instead of a {row['request']}: {got}")
        if "token" in row and headers.get("authorization") != f"Bearer {row['token']}":
            raise Mismatch(f"{path} came with {headers.get('authorization')}")
        self._names.check(row["must"], got, row["request"])
        if row.get("lost"):
            raise ConnectionResetError("the line was cut")
        headers = {"content-type": row["type"]} if "type" in row else {}
        if "answer" not in row:
            return HttpResponse(row["status"], headers, b"<html></html>")
        # What comes next may be asked for as soon as this is answered.
        if self.script and "files" in self.script[0]:
            self.files |= self.script[0]["files"]
        answer = cbor.encode(self._names.filled(row["answer"]))
        return HttpResponse(row.get("status", 200), CBOR, answer)

    def _segment(self, method: str, path: str, headers: Mapping[str, str]) -> HttpResponse:
        """In any order, in parts or whole, and as often as the device likes."""
        name, _, query = path.removeprefix(SEGMENTS).partition("?")
        file = self.files.get(name)
        if method != "GET" or file is None or "db_id" not in dict(parse_qsl(query)):
            self.mismatch = Mismatch(f"{method} {path}, which nothing has named")
            raise self.mismatch
        if file.get("lost"):
            raise ConnectionResetError("the line was cut")
        if "answer" in file:
            return HttpResponse(file["status"], CBOR, cbor.encode(file["answer"]))
        data = bytes.fromhex(file["hex"])
        first, _, last = headers.get("range", "").removeprefix("bytes=").partition("-")
        if not first:
            return HttpResponse(200, {}, data)
        begin, end = int(first), min(int(last or len(data)) + 1, len(data))
        ranged = {"content-range": f"bytes {begin}-{end - 1}/{len(data)}"}
        return HttpResponse(206, ranged, data[begin:end])


class Player:
    """One conversation, from its first step to its last."""

    def __init__(self, conversation: Json, clock: Clock | None = None) -> None:
        self._setup: Json = conversation["device"]
        self._steps: list[Json] = conversation["steps"]
        self._clock = clock or FakeClock()
        self._storage = MemoryStorage()
        self._names = Names()
        self._server = ScriptedServer(self._names)
        self._scope = self._setup["collections"]
        self._tokens_used = 0
        self._start()
        self._names.known["device"] = as_json(self._db.device_id)

    def play(self) -> None:
        for number, step in enumerate(self._steps):
            try:
                getattr(self, f"_do_{step['do']}")(step)
            except Mismatch as error:
                raise Mismatch(f"step {number} ({step['do']}): {error}") from error

    def _start(self) -> None:
        self._db = Database(self._storage, clock=self._clock)
        transport = HttpTransport(
            "http://localhost",
            token=self._token if self._setup["tokens"] else None,
            client=LoopbackClient(self._server),
        )
        config = SyncConfig(
            db_id=self._setup["db_id"],
            default_policy=self._setup["policy"],
            collections=self._scope and tuple(self._scope),
            retry=RetryConfig.none(),
        )
        self._engine = SyncEngine(config, transport, self._db, clock=self._clock)

    def _token(self, refresh: bool) -> str:
        """As a provider does: from memory, and a fresh one only when it is asked for."""
        self._tokens_used += refresh
        token: str = self._setup["tokens"][self._tokens_used]
        return token

    def _do_restart(self, step: Json) -> None:
        """The process dies; what was not durable is gone with its objects."""
        self._engine.transport.close()
        self._start()

    def _do_commit(self, step: Json) -> None:
        with self._db.transaction() as tx:
            for name, entity, payload in step["operations"]:
                key = UUID(entity["hex"])
                if payload is None:
                    del tx.collection(name)[key]
                else:
                    tx.collection(name)[key] = cbor.decode(bytes.fromhex(payload["hex"]))

    def _do_sync(self, step: Json) -> None:
        self._go_through(step, self._engine.sync)

    def _do_compare(self, step: Json) -> None:
        found = []

        def compare() -> None:
            result = self._engine.verify_with_server(repair=step["repair"])
            found.extend([[d.collection, as_json(d.id_bytes), d.kind] for d in result.differences])

        self._go_through(step | {"ends": "synced"}, compare)
        if found != step["differs"]:
            raise Mismatch(f"differences are {found}, not {step['differs']}")

    def _go_through(self, step: Json, go: Callable[[], object]) -> None:
        self._server.script = list(step["exchanges"])
        self._server.files = {}
        if self._server.script and "files" in self._server.script[0]:
            self._server.files = self._server.script[0]["files"]
        try:
            go()
            ended = "synced"
        except Mismatch as error:
            raise self._server.mismatch or error from None
        except TransportError:
            ended = "no_answer"
        except SyncError as error:
            ended = error.code
        if self._server.mismatch is not None:
            raise self._server.mismatch
        if ended != step["ends"]:
            raise Mismatch(f"it ended with {ended}, not {step['ends']}")
        if not all(row.get("optional") or "files" in row for row in self._server.script):
            raise Mismatch(
                f"{len(self._server.script)} exchanges were left, first a "
                f"{self._server.script[0]['request']}"
            )

    def _do_page(self, step: Json) -> None:
        """A stream is opened here as far as the device is now, and brings this page."""
        asked = self._engine.asks_pages()
        if asked is None or question(asked) is None:
            raise Mismatch("the device opens no stream with pages")
        self._names.check(step["must"], as_json(cbor.decode(encode(asked))), "pages")
        history, body = self._names.filled(step["history"]), self._names.filled(step["page"])
        text = event_text(history, step["begins"], step["head"], cbor.encode(body))
        said = page_in(asked, text.split(b"data: ")[1].decode().strip())
        if said is None or said[0] != step["head"]:
            raise Mismatch(f"the event was read as {said}")
        self._engine.page_came(said[1])

    def _do_choose(self, step: Json) -> None:
        self._engine.reset(step["keep"])

    def _do_widen(self, step: Json) -> None:
        self._scope = step["collections"]
        self._do_restart(step)

    def _do_holds(self, step: Json) -> None:
        for part in ("entities", "pending", "discarded"):
            got = getattr(self, f"_{part}")()
            if got != step[part]:
                raise Mismatch(f"{part} are {got}, not {step[part]}")

    def _entities(self) -> Json:
        found = {}
        with self._db.snapshot() as snapshot:
            for name in snapshot.collections():
                items = snapshot.collection(name).items()
                rows = {key.hex: as_json(cbor.encode(value)) for key, value in items}
                if rows:
                    found[name] = rows
        return found

    def _pending(self) -> list[Any]:
        with self._db.view() as view:
            names = {number: info.name for number, info in view.catalogue.by_number.items()}
            return [
                [
                    [names[o.collection], as_json(o.entity_id), as_json(o.payload)]
                    for o in transaction.operations
                ]
                for transaction in read_pending(view.snapshot)
            ]

    def _discarded(self) -> list[Any]:
        with self._db.view() as view:
            return [
                {"code": one.code, "operations": as_json(one.operations)}
                for one in read_discarded(view.snapshot)
            ]
