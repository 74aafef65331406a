"""``scripts/prove``: chunks, going on after an interruption, and stopping at a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entidb.testing import batch, prove
from entidb.testing.batch import parse_range
from entidb.testing.prove import main, missing, read_chunks
from tests.planted import BUGS, planted


@pytest.fixture(autouse=True)
def _one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "commit_id", lambda: "abc123")


def run(out: Path, seeds: str, *more: str) -> int:
    return main(["--seeds", seeds, "--chunk", "2", "--out", str(out), *more])


def test_each_chunk_is_a_line_and_the_totals_are_a_table(tmp_path, capsys):
    out = tmp_path / "proof.jsonl"
    assert run(out, "0:5") == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["first"], line["end"]) for line in lines] == [(0, 2), (2, 4), (4, 5)]
    events = sum(line["events"] for line in lines)
    printed = capsys.readouterr().out
    assert f"| abc123 | 5 | {events:,} |" in printed
    assert "| SAME-SEED | 3 |" in printed
    assert "| `restore_twice` | " in printed


def test_a_proof_goes_on_where_it_was_cut_off(tmp_path, capsys):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(whole, "0:4")
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text(lines[0] + lines[1][:40])
    assert run(cut, "0:4") == 0
    assert "1 chunks done, 1 to do" in capsys.readouterr().out
    assert [(c.events, c.checks) for c in read_chunks(cut)] == [
        (c.events, c.checks) for c in read_chunks(whole)
    ]
    before = cut.read_text()
    assert run(cut, "0:4") == 0
    assert cut.read_text() == before


def test_an_interruption_keeps_the_chunks_that_are_through(tmp_path, monkeypatch, capsys):
    out = tmp_path / "proof.jsonl"
    real = batch.run_seeds

    def interrupted(part, **options):
        if part.start == 2:
            raise KeyboardInterrupt
        return real(part, **options)

    monkeypatch.setattr(batch, "run_seeds", interrupted)
    assert run(out, "0:4") == 130
    assert [(c.first, c.end) for c in read_chunks(out)] == [(0, 2)]


def test_it_stops_at_a_failure_unless_told_to_go_on(tmp_path, capsys):
    out = tmp_path / "proof.jsonl"
    with planted(BUGS["withdrawn-not-listed"]):
        assert run(out, "0:20") == 1
        stopped = read_chunks(out)
        assert stopped[-1].failures
        assert stopped[-1].end < 20
        assert "replay: python -m entidb.testing --seed" in capsys.readouterr().out
        assert run(out, "0:20") == 1
        assert read_chunks(out) == stopped
        assert run(out, "0:20", "--go-on") == 1
    assert read_chunks(out)[-1].end == 20


def test_several_processes_come_to_the_same(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(one, "0:2")
    run(two, "0:2", "--jobs", "2")
    first, second = read_chunks(one)[0], read_chunks(two)[0]
    assert (first.events, first.faults, first.checks) == (
        second.events,
        second.faults,
        second.checks,
    )


def test_a_proof_is_about_one_commit(tmp_path, monkeypatch, capsys):
    out = tmp_path / "proof.jsonl"
    run(out, "0:2")
    monkeypatch.setattr(prove, "commit_id", lambda: "def456")
    assert run(out, "0:4") == 2
    assert "give another --out" in capsys.readouterr().err


def test_gaps_are_what_is_missing(tmp_path):
    out = tmp_path / "proof.jsonl"
    run(out, "2:4")
    assert list(missing(read_chunks(out), parse_range("0:7"), 2)) == [
        range(2),
        range(4, 6),
        range(6, 7),
    ]


def test_what_is_no_proof_is_refused(tmp_path, capsys):
    out = tmp_path / "proof.jsonl"
    out.write_text("[1, 2]\n")
    assert run(out, "0:2") == 2
    assert run(tmp_path / "other.jsonl", "5:2") == 2


def test_the_commit_is_named():
    assert prove.commit_id()
