"""What a running app measures of itself: counters for Prometheus, and the pulse for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from entidb.server.admin.office import Office
from entidb.server.pulse import Gauges, Pulse
from entidb.server.server import SyncServer

if TYPE_CHECKING:
    from entidb.server.metrics import Metrics


class Measured(Protocol):
    """The app, as far as it is measured."""

    server: SyncServer

    @property
    def in_flight_bytes(self) -> int: ...
    @property
    def waiting(self) -> int: ...


def pulse_of(app: Measured) -> Pulse:
    gauges = Gauges(in_flight_bytes=lambda: app.in_flight_bytes, waiting=lambda: app.waiting)
    return Pulse(app.server.clock, gauges)


def metrics_of(app: Measured, office: Office) -> Metrics:
    from entidb.server.metrics import Metrics

    made = Metrics(
        in_flight_bytes=lambda: app.in_flight_bytes,
        open_databases=lambda: app.server.stores.open_count,
        live=lambda: app.waiting,
        office=office,
    )
    app.server.stores.meter.note = made.grouped
    return made


__all__ = ["metrics_of", "pulse_of"]
