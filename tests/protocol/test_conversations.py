"""The protocol's conversations: this project's device says what they say, and they can fail."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.sync.apply.image import StagesImages
from tests.protocol.player import CONVERSATIONS, Mismatch, Player, conversations

ROOT = Path(__file__).parent.parent.parent
ALL = conversations()


@pytest.mark.parametrize("conversation", ALL, ids=[row["name"] for row in ALL])
def test_the_device_keeps_to_the_conversation(conversation: dict[str, Any]) -> None:
    Player(conversation).play()


def test_the_conversations_are_those_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location(
        "make_conversations", ROOT / "scripts/make_conversations.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build() == CONVERSATIONS.read_text("utf-8")


def test_each_conversation_has_a_name_of_its_own_and_ends_by_looking_or_by_syncing() -> None:
    assert len({row["name"] for row in ALL}) == len(ALL)
    assert {row["steps"][-1]["do"] for row in ALL} == {"holds", "sync"}


def _named(name: str) -> dict[str, Any]:
    [row] = [row for row in ALL if row["name"] == name]
    return copy.deepcopy(row)


def _exchanges(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    syncs = [step for step in conversation["steps"] if step["do"] == "sync"]
    return [row for step in syncs for row in step["exchanges"]]


def test_a_batch_that_is_sent_again_with_another_id_is_noticed() -> None:
    conversation = _named("a lost answer")
    again = [row for row in _exchanges(conversation) if row["request"] == "push"][1]
    again["must"]["transactions"][0][0] = {"is": "time of t1"}
    with pytest.raises(Mismatch, match="before"):
        Player(conversation).play()


def test_another_base_version_is_noticed() -> None:
    conversation = _named("the client wins")
    _exchanges(conversation)[-1]["must"]["transactions"][0][2][0][2] = 1
    with pytest.raises(Mismatch, match="is 2, not 1"):
        Player(conversation).play()


def test_a_request_that_does_not_come_is_noticed() -> None:
    conversation = _named("nothing to do")
    conversation["steps"][-2]["exchanges"] *= 2
    with pytest.raises(Mismatch, match="1 exchanges were left"):
        Player(conversation).play()


def test_a_request_too_many_is_noticed() -> None:
    conversation = _named("nothing to do")
    conversation["steps"][-2]["exchanges"] = []
    with pytest.raises(Mismatch, match="one request too many"):
        Player(conversation).play()


@pytest.mark.parametrize("name", ["what differs is put right", "written since and not compared"])
def test_another_digest_is_noticed(name: str) -> None:
    conversation = _named(name)
    [step] = [step for step in conversation["steps"] if step["do"] == "compare"]
    # The server has something else now than what the script says that the device finds.
    step["exchanges"][2]["answer"]["blocks"][0][2] = {"hex": "00" * 16}
    step["exchanges"][3:] = []
    with pytest.raises(Mismatch, match="one request too many"):
        Player(conversation).play()


def test_another_difference_is_noticed() -> None:
    conversation = _named("what differs is put right")
    [step] = [step for step in conversation["steps"] if step["do"] == "compare"]
    step["differs"][0][2] = "missing"
    with pytest.raises(Mismatch, match="differences are"):
        Player(conversation).play()


def test_another_state_is_noticed() -> None:
    conversation = _named("both deleted")
    conversation["steps"][-1]["entities"] = {"notes": {"00" * 16: {"hex": "a0"}}}
    with pytest.raises(Mismatch, match="entities are"):
        Player(conversation).play()


def test_a_segment_that_nothing_has_named_is_noticed() -> None:
    conversation = _named("an image")
    [row] = [row for row in _exchanges(conversation) if row["request"] == "segments"]
    row["files"] = dict(list(row["files"].items())[:1])
    with pytest.raises(Mismatch, match=r"GET .* which nothing has named"):
        Player(conversation).play()


def test_a_device_that_leaves_out_a_segment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_image = StagesImages.begin_image

    def begin(self: StagesImages, manifest: Any, *names: Any) -> Any:
        return begin_image(self, replace(manifest, segments=manifest.segments[1:]), *names)

    monkeypatch.setattr(StagesImages, "begin_image", begin)
    with pytest.raises(Mismatch, match="one request too many"):  # no conflict is seen
        Player(_named("an image")).play()


def test_a_push_that_does_not_wait_for_the_pull_beside_it_is_noticed() -> None:
    """A client that takes a round without verdicts for one that was decided."""
    conversation = _named("a round behind the head")
    syncs = [step for step in conversation["steps"] if step["do"] == "sync"]
    syncs[-1]["exchanges"].pop()
    with pytest.raises(Mismatch, match="one request too many: /v1/push"):
        Player(conversation).play()


def test_a_round_whose_pull_is_behind_its_push_is_noticed() -> None:
    conversation = _named("a round with nothing new")
    [row] = [row for row in _exchanges(conversation) if row["request"] == "sync"]
    row["must"]["pull"]["cursor"] = 0
    with pytest.raises(Mismatch, match="cursor is 1, not 0"):
        Player(conversation).play()
