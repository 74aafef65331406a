"""Counters for Prometheus, on a registry of their own. Only loaded when ``metrics`` is on."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from entidb.errors import ERROR_TABLE, REASONS
from entidb.protocol import PATHS, PushResponse, Verdict
from entidb.server.admin.office import Office
from entidb.server.wire import HttpResponse

_VERDICTS = {verdict.value: verdict.name.lower() for verdict in Verdict}
#: Other paths count as one: a name from the network must not become a label.
_PATHS = frozenset((*PATHS, "/healthz", "/readyz", "/v1/info", "/metrics"))
#: Codes of refusals that are told apart; a code may come from a program's own hook.
_CODES = frozenset((*ERROR_TABLE, *REASONS.values()))
_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    def __init__(
        self,
        *,
        in_flight_bytes: Callable[[], int],
        open_databases: Callable[[], int],
        live: Callable[[], int],
        office: Office,
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "entidb_requests", "Requests answered", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "entidb_request_seconds",
            "Time from the head of a request to the end of its answer",
            ["path"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._transactions = Counter(
            "entidb_transactions", "Pushed transactions decided", ["verdict"], registry=registry
        )
        self._refused = Counter(
            "entidb_refused",
            "Requests refused, by the code of the error",
            ["code"],
            registry=registry,
        )
        Gauge(
            "entidb_backup_age_seconds",
            "Age of the oldest of the newest verified backups; 0 without a schedule",
            registry=registry,
        ).set_function(lambda: _backup_age_s(office))
        Gauge(
            "entidb_backups_late", "Databases whose backup is late", registry=registry
        ).set_function(lambda: len(office.late_backups))
        Gauge(
            "entidb_tasks", "Administrative tasks that wait or run", registry=registry
        ).set_function(lambda: sum(each.ended_ms is None for each in office.tasks.all()))
        Gauge(
            "entidb_revoked", "Devices, subjects and tokens that are locked out", registry=registry
        ).set_function(lambda: len(office.control.decided.revoked))
        Gauge(
            "entidb_in_flight_bytes", "Bodies and answers in memory", registry=registry
        ).set_function(in_flight_bytes)
        Gauge("entidb_open_databases", "Databases open now", registry=registry).set_function(
            open_databases
        )
        Gauge("entidb_live", "Devices that wait for news now", registry=registry).set_function(live)

    def answered(self, path: str, status: int, seconds: float, code: str | None) -> None:
        if code is not None:
            self._refused.labels(code if code in _CODES else "other").inc()
        label = path if path in _PATHS else "other"
        self._requests.labels(label, str(status)).inc()
        self._seconds.labels(label).observe(seconds)

    def pushed(self, answer: PushResponse) -> None:
        for result in answer.results:
            self._transactions.labels(_VERDICTS[result.verdict]).inc()

    def response(self) -> HttpResponse:
        return HttpResponse(
            200, {"content-type": CONTENT_TYPE_LATEST}, generate_latest(self._registry)
        )


def _backup_age_s(office: Office) -> float:
    oldest = office.oldest_backup_ms
    return 0.0 if oldest is None else max(0.0, (office.clock.now_ms() - oldest) / 1000)
