"""Counters for Prometheus, on a registry of their own. Only loaded when ``metrics`` is on."""

from __future__ import annotations

import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from msgspec import Struct
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

from entidb.errors import ERROR_TABLE, REASONS
from entidb.protocol import PATHS, PushResponse, Verdict
from entidb.server.admin.callers import Caller
from entidb.server.admin.databases import rows as database_rows
from entidb.server.admin.fleet import summary
from entidb.server.admin.office import Office
from entidb.server.admin.summary import LAGS
from entidb.server.segments.serving import SEGMENTS_PATH
from entidb.server.wire import ServerResponse

_VERDICTS = {verdict.value: verdict.name.lower() for verdict in Verdict}
#: Other paths count as one: a name from the network must not become a label.
_PATHS = frozenset((*PATHS, "/healthz", "/readyz", "/v1/info", "/metrics"))
#: Codes of refusals that are told apart; a code may come from a program's own hook.
_CODES = frozenset((*ERROR_TABLE, *REASONS.values()))
_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
#: Of all processes of a server the highest, and not the sum: each of them says the same.
_SAME = frozenset(
    (
        "entidb_backup_age_seconds",
        "entidb_backups_late",
        "entidb_revoked",
        "entidb_databases",
        "entidb_devices",
        "entidb_store_bytes",
        "entidb_disk_free_bytes",
    )
)
#: Classes of databases: by so many entities at most. Names of databases are no labels: there may be
#: thousands of them, and whom they belong to is not for everybody who may look at metrics.
_SIZES = (1_000, 100_000)
_CLASSES = (*map(str, _SIZES), "more")
_GROUPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
#: How far behind devices are: a label for each number of ``Summary.lag``.
_LAGS = (*map(str, LAGS), "more")
_GAUGE = "gauge"
_EVERYBODY = Caller("the server", "local")


class Series(Struct, array_like=True):
    """One metric as one process has it: samples by name and labels."""

    name: str
    says: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


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
        self._entities_of = office.registry.entities
        #: What the other processes of this server have counted.
        self.others: Callable[[], list[list[Series]]] = list
        #: What this process has counted, kept for the others before anybody sees it.
        self.told: Callable[[], list[Series]] = self.series
        self._requests = Counter(
            "entidb_requests", "Requests answered", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "entidb_request_seconds",
            "Time from the head of a request to the end of its answer",
            ["path", "entities"],
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
        ).set_function(lambda: len(office.control.revoked()))
        self._group_pushes = Histogram(
            "entidb_group_pushes", "Pushes in one storage commit", buckets=_GROUPS,
            registry=registry,
        )  # fmt: skip
        self._group_seconds = Histogram(
            "entidb_group_seconds",
            "Time until a group of pushes was decided and on the disk",
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._carried = Counter(
            "entidb_carried_pages", "Pages sent with the news of them", registry=registry
        )
        _count_store(office, registry)
        Gauge(
            "entidb_in_flight_bytes", "Bodies and answers in memory", registry=registry
        ).set_function(in_flight_bytes)
        Gauge("entidb_open_databases", "Databases open now", registry=registry).set_function(
            open_databases
        )
        Gauge("entidb_live", "Devices that wait for news now", registry=registry).set_function(live)

    def refused(self, code: str) -> None:
        """Something was refused, maybe before it was a request."""
        self._refused.labels(code if code in _CODES else "other").inc()

    def answered(
        self, path: str, status: int, seconds: float, code: str | None, db_id: str | None
    ) -> None:
        if code is not None:
            self.refused(code)
        label = path if path in _PATHS else "other"
        if path.startswith(SEGMENTS_PATH):
            label = SEGMENTS_PATH
        self._requests.labels(label, str(status)).inc()
        self._seconds.labels(label, self._class(db_id)).observe(seconds)

    def _class(self, db_id: str | None) -> str:
        if db_id is None:
            return "none"
        entities = self._entities_of(db_id)
        return "unknown" if entities is None else _CLASSES[bisect_left(_SIZES, entities)]

    def pushed(self, answer: PushResponse) -> None:
        for result in answer.results:
            self._transactions.labels(_VERDICTS[result.verdict]).inc()

    def carried(self) -> None:
        """A page went with its news."""
        self._carried.inc()

    def grouped(self, pushes: int, seconds: float) -> None:
        """A group of pushes was decided, and is on the disk."""
        self._group_pushes.observe(pushes)
        self._group_seconds.observe(seconds)

    def series(self) -> list[Series]:
        """What this process has counted."""
        return [
            Series(
                each.name,
                each.documentation,
                each.type,
                [(sample.name, sample.labels, sample.value) for sample in each.samples],
            )
            for each in self._registry.collect()
        ]

    def response(self) -> ServerResponse:
        others, mine, registry = self.others(), self.told(), self._registry
        if others:
            registry = CollectorRegistry(auto_describe=False)
            registry.register(_Together(summed([mine, *others])))
        return ServerResponse(200, {"content-type": CONTENT_TYPE_LATEST}, generate_latest(registry))


def summed(parts: Iterable[list[Series]]) -> list[Series]:
    """What several processes have counted, together."""
    found: dict[str, Series] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for part in parts:
        for each in part:
            found.setdefault(each.name, each)
            into = values.setdefault(each.name, {})
            for name, labels, value in each.samples:
                key = name, tuple(sorted(labels.items()))
                known = into.get(key)
                if known is None:
                    into[key] = value
                elif name.endswith("_created"):
                    into[key] = min(known, value)
                else:
                    into[key] = max(known, value) if name in _SAME else known + value
    return [
        Series(
            name,
            each.says,
            each.kind,
            [(sample, dict(labels), value) for (sample, labels), value in values[name].items()],
        )
        for name, each in found.items()
    ]


def lasting(series: list[Series]) -> list[Series]:
    """What still counts when its process has ended."""
    return [each for each in series if each.kind != _GAUGE]


class _Together:
    """A collector of what was summed up."""

    def __init__(self, series: list[Series]) -> None:
        self._series = series

    def collect(self) -> Iterator[Metric]:
        for each in self._series:
            metric = Metric(each.name, each.says, each.kind)
            for name, labels, value in each.samples:
                metric.add_sample(name, labels, value)
            yield metric


def _backup_age_s(office: Office) -> float:
    oldest = office.oldest_backup_ms
    return 0.0 if oldest is None else max(0.0, (office.clock.now_ms() - oldest) / 1000)


def _count_store(office: Office, registry: CollectorRegistry) -> None:
    """Gauges of what lies on the disk, and of whom it is for."""
    devices = Gauge(
        "entidb_devices",
        "Devices by commits that they are behind: up to so many",
        ["behind"],
        registry=registry,
    )
    for number, label in enumerate(_LAGS):
        devices.labels(label).set_function(partial(_devices, office, number))
    Gauge(
        "entidb_databases", "Databases that there are, open or not", registry=registry
    ).set_function(lambda: summary(office, _EVERYBODY).databases)
    Gauge(
        "entidb_store_bytes", "Bytes of all databases on the disk", registry=registry
    ).set_function(lambda: sum(row.bytes for row in database_rows(office, _EVERYBODY)))
    root = office.place.root
    if root is not None:
        # Where nobody knows how much is free, nobody is told that it is nothing.
        Gauge(
            "entidb_disk_free_bytes", "Bytes free for the databases", registry=registry
        ).set_function(partial(_free_bytes, root))


def _devices(office: Office, number: int) -> float:
    return summary(office, _EVERYBODY).lag[number]


def _free_bytes(root: Path) -> float:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return 0.0  # /readyz says that the disk does not answer
