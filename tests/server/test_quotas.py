"""Quotas of requests: who floods waits, and nobody else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from entidb.errors import ServerBusyError
from entidb.protocol import ErrorResponse
from entidb.server import ServerConfig, SyncServer, mint_token, quotas, serving
from entidb.server.quotas import Quotas, Rate, quotas_of
from tests.server.support import SECRET, Client, ManualClock, handshake


def test_who_keeps_to_the_rate_is_never_told_to_wait():
    rate = Rate(5.0)
    assert all(rate.missing_s("ada", second / 5) == 0 for second in range(1000))


def test_a_burst_is_let_through_and_then_the_rate_counts():
    rate = Rate(5.0)
    assert [rate.missing_s("ada", 0.0) for _ in range(10)] == [0.0] * 10
    assert rate.missing_s("ada", 0.0) == pytest.approx(0.2)
    # Who comes back when he was told to is let in; who does not has lost nothing by asking.
    assert rate.missing_s("ada", 0.1) == pytest.approx(0.1)
    assert rate.missing_s("ada", 0.2) == 0.0
    assert rate.missing_s("ada", 0.2) > 0


def test_in_the_long_run_a_flood_gets_what_the_rate_says():
    rate = Rate(50.0)
    let_in = sum(rate.missing_s("ada", tick / 1000) == 0 for tick in range(100_000))
    assert 5_000 <= let_in <= 5_000 + 100


def test_others_are_not_touched():
    rate = Rate(1.0)
    while not rate.missing_s("eve", 0.0):
        pass
    assert rate.missing_s("ada", 0.0) == 0.0


def test_the_memory_of_who_asks_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quotas, "_BUCKETS_MAX", 100)
    rate = Rate(1.0)
    for number in range(10_000):
        rate.missing_s(str(number), 0.0)
    assert len(rate._buckets) == 100


def test_without_a_quota_nothing_is_counted():
    config = ServerConfig(data_dir=None, insecure_no_auth=True)
    assert quotas_of(config, ManualClock()) is None


def test_a_database_is_counted_whoever_asks():
    config = ServerConfig(data_dir=None, insecure_no_auth=True, database_requests_per_s=1.0)
    found = quotas_of(config, ManualClock())
    assert isinstance(found, Quotas)
    for number in range(10):
        found.take(str(number), "shop")
    with pytest.raises(ServerBusyError, match="database") as caught:
        found.take("ada", "shop")
    assert (caught.value.code, caught.value.retry_after) == ("rate_limited", 1.0)
    found.take("ada", "catalog")


def test_a_server_in_process_has_quotas_too():
    with SyncServer.in_memory(subject_requests_per_s=1.0, clock=ManualClock()) as server:
        answers = [server.handle("/v1/handshake", None, handshake()) for _ in range(11)]
    assert not any(isinstance(each, ErrorResponse) for each in answers[:10])
    last = answers[10]
    assert isinstance(last, ErrorResponse)
    assert (last.code, last.retryable) == ("rate_limited", True)


@pytest.mark.process
def test_over_http_it_is_429_and_says_when_to_come_again(tmp_path: Path):
    (tmp_path / "secret").write_bytes(SECRET)
    config = ServerConfig(
        data_dir=tmp_path / "data",
        jwt_secret_file=tmp_path / "secret",
        subject_requests_per_s=0.01,
    )
    tokens = [mint_token(SECRET, subject=name, databases=["shop"]) for name in ("eve", "ada")]
    with serving(config) as url, Client(url, tokens[0]) as eve, Client(url, tokens[1]) as ada:
        found = [eve.send(handshake()) for _ in range(11)]
        assert [each.status for each in found] == [200] * 10 + [429]
        assert 0 < int(found[-1].headers["retry-after"]) <= 100
        assert ada.send(handshake()).status == 200
