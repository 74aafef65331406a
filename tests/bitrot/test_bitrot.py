"""What one flipped bit in a database file can do: be found, and nothing else.

LMDB has no checksums. Ours stand on every record, and ``verify`` compares what the pages say of
each other. The bits are drawn from a seed, over the whole file and over the few bytes that LMDB
itself goes by; ``ENTIDB_BITROT_FLIPS`` is how many of each, in each of the two databases.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import entidb
from entidb.errors import FormatError
from entidb.storage.lmdb.closed_file import check_data_file
from entidb.storage.lmdb.pages import closed_file_faults
from tests.bitrot.content import build
from tests.bitrot.flips import anywhere, flip, in_headers, in_structure
from tests.bitrot.probe import LOOKS, look_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each look happens in a forked process"),
]

SEED = int(os.environ.get("ENTIDB_BITROT_SEED", "20"))
FLIPS = int(os.environ.get("ENTIDB_BITROT_FLIPS", "100"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(entidb.__file__).parents[1])}
Choice = Callable[[Path, random.Random, int], list[int]]
Found = dict[str, Any]


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    server, device = build(tmp_path_factory.mktemp("bitrot"), SEED)
    return {"server": server, "device": device}


def look_with_flips(
    path: Path,
    choose: Choice,
    *,
    without: str = "nothing",
    count: int = FLIPS,
    looks: Sequence[str] = LOOKS,
) -> tuple[Found, list[Found]]:
    """What the sound database gives, and what it gives with each of the bits flipped."""
    bits = choose(path / "data.mdb", random.Random(f"{SEED} {path.name} {choose.__name__}"), count)
    words = [str(path), without, ",".join(looks), *map(str, bits)]
    command = [sys.executable, "-m", "tests.bitrot.probe", *words]
    output = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=ENVIRONMENT, check=True, capture_output=True
    )
    found = [json.loads(line) for line in output.stdout.splitlines()]
    assert [entry["bit"] for entry in found] == bits
    return look_at(path, None, looks), found


def is_reported(found: Found) -> bool:
    """Reading said so, or ``verify`` did: of the file before it is opened, or afterwards."""
    verified = found["verify"].get("value") or "error" in found["verify"]
    return bool("error" in found["read"] or found["unopened"] or verified)


def has_changed(found: Found, sound: Found) -> bool:
    return bool(found["read"].get("value") != sound["read"]["value"])


def wrongly_sent(found: Found, sound: Found) -> list[str]:
    """Names of what a peer got and the sound database would not have sent."""
    right = sound["sent"]["sent"]
    return [key for key, sent in found["sent"].get("sent", {}).items() if sent != right.get(key)]


@pytest.mark.parametrize(("choose", "without"), [
    (anywhere, "nothing"), (in_structure, "nothing"), (in_structure, "look"),
])  # fmt: skip
@pytest.mark.parametrize("side", ["server", "device"])
def test_a_flipped_bit_is_reported_and_never_reaches_a_peer(
    databases: dict[str, Path], side: str, choose: Choice, without: str
) -> None:
    sound, found = look_with_flips(databases[side], choose, without=without)
    assert sound["verify"]["value"] == [] and len(sound["sent"]["sent"]) > 20
    harmed = 0
    for entry in found:
        for look in ("read", "verify", "sent"):
            assert "surprise" not in entry[look], entry
            # LMDB follows a length that leads out of the file, and that is the end of a process
            # that reads there. So a file is looked at before it is mapped.
            assert "died" not in entry[look] or (without == "look" and entry["unopened"]), entry
        if has_changed(entry, sound):
            harmed += 1
            assert is_reported(entry), entry["bit"]
        assert not wrongly_sent(entry, sound), entry["bit"]
        if len(entry["sent"].get("sent", {})) < len(sound["sent"]["sent"]):
            assert "error" in entry["sent"] or is_reported(entry), entry["bit"]
    # Otherwise the bits all fell on empty room, and nothing was shown.
    assert harmed > len(found) / 10


def test_a_flipped_bit_of_a_header_is_seen_before_opening_or_does_nothing(
    databases: dict[str, Path], tmp_path: Path
) -> None:
    """Above all the commit numbers: the wrong one would bring back the commit before the last."""
    path = databases["server"]
    copy = tmp_path / "data.mdb"
    shutil.copy(path / "data.mdb", copy)
    unseen = []
    for bit in in_headers(copy):
        flip(copy, bit)
        if not is_refused(copy) and not closed_file_faults(str(copy)):
            unseen.append(bit)
        flip(copy, bit)
    assert copy.read_bytes() == (path / "data.mdb").read_bytes()
    assert len(unseen) < len(in_headers(copy)) / 2  # the others stand in fields nobody reads
    sound, found = look_with_flips(path, lambda data, source, count: source.sample(unseen, count))
    for entry in found:
        refused = "error" in entry["read"] and "error" in entry["sent"]  # LMDB looks at some
        same = entry["read"] == sound["read"] and entry["sent"] == sound["sent"]
        assert same or (refused and not entry["sent"]["sent"]), entry["bit"]


def is_refused(data: Path) -> bool:
    with data.open("rb") as file, contextlib.suppress(FormatError):
        check_data_file(file.fileno(), str(data))
        return False
    return True


def test_without_checksums_wrong_bytes_would_reach_a_peer(databases: dict[str, Path]) -> None:
    sound, found = look_with_flips(databases["server"], anywhere, without="checksums", count=60)
    assert any(wrongly_sent(entry, sound) for entry in found)


def test_without_the_walk_over_the_pages_verify_would_miss_harm(
    databases: dict[str, Path],
) -> None:
    # Most harm is noticed by what a wrong page then holds; one bit in two hundred is not.
    for part in range(10):

        def choose(data: Path, source: random.Random, count: int, part: int = part) -> list[int]:
            return in_structure(data, source, 10 * count)[part * count :][:count]

        device = databases["device"]
        sound, read = look_with_flips(device, choose, without="pages", looks=("read",))
        harmed = [entry["bit"] for entry in read if has_changed(entry, sound)]
        # What reads as it should is no harm that verify could miss.
        _, found = look_with_flips(
            device, lambda *_, bits=harmed: bits, without="pages", looks=("verify",)
        )
        # A look that died told nobody anything either.
        missed = [
            entry
            for entry in found
            if not entry["verify"].get("value") and "error" not in entry["verify"]
        ]
        if missed:
            return
    pytest.fail(f"of {10 * FLIPS} flipped bits verify missed none")
