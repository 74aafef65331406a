"""An applier and an engine that let other threads act between their steps, for the simulator.

Threads of an application may commit, or change the scope, between any two storage commits of a
cycle. The real applier holds the writer's lock only inside a step, so what happens before a step
covers everything that can happen in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from entidb.db.adopt import adopt_step
from entidb.db.replica import Stage
from entidb.protocol import Manifest, PullRequest, PullResponse, PushResponse
from entidb.sync import (
    DatabaseApplier,
    RebaseReport,
    RetryConfig,
    SyncConfig,
    SyncCycleResult,
    SyncEngine,
    SyncTransport,
)
from entidb.sync.apply.seam import BatchLimits, Look, OpenSegment, PushBatch, Settled
from entidb.sync.drive import Courier
from entidb.sync.exchange import Connection
from entidb.sync.segment_files import SegmentFiles
from entidb.testing.knobs import Knobs


def configured(knobs: Knobs, db_id: str) -> SyncConfig:
    """What the engine of a device is set to in a run."""
    return SyncConfig(
        db_id=db_id,
        push_operations_max=knobs.push_operations_max,
        push_bytes_max=knobs.push_bytes_max,
        pull_operations_max=knobs.pull_operations_max,
        pull_bytes_max=knobs.pull_bytes_max,
        rounds_max=knobs.rounds_max,
        retry=RetryConfig(attempts_max=knobs.attempts, delay_initial_s=0.2, delay_max_s=5.0),
    )


class BetweenApplier(DatabaseApplier):
    """The real applier; ``between`` is called before each of its steps in a cycle and may do what
    another thread could, ``takes`` with each page that it takes in, and what it answers."""

    def __init__(
        self,
        *rest: Any,
        between: Callable[[], None],
        takes: Callable[[PullRequest, PullResponse], None],
        adopt_rows: int,
        files: SegmentFiles,
        chunk_rows: int,
        **options: Any,
    ) -> None:
        super().__init__(*rest, **options)
        self._between = between
        self._takes = takes
        self._adopt_rows = adopt_rows
        self._files = files
        self._chunk_rows = chunk_rows

    def adopt(self) -> bool:
        """In such small commits that groups meet their ends."""
        return adopt_step(self.database, keeps=self._overruled_max > 0, rows=self._adopt_rows)

    def look(self) -> Look:
        self._between()
        return super().look()

    def prepare(self, limits: BatchLimits) -> PushBatch | None:
        self._between()
        return super().prepare(limits)

    def prepare_after(self, batch: PushBatch, limits: BatchLimits) -> PushBatch | None:
        self._between()
        return super().prepare_after(batch, limits)

    def settle(
        self,
        batch: PushBatch,
        response: PushResponse,
        limits: BatchLimits | None,
        following: PushBatch | None = None,
    ) -> Settled:
        self._between()
        return super().settle(batch, response, limits, following)

    def apply(self, request: PullRequest, response: PullResponse) -> RebaseReport:
        self._between()
        self._takes(request, response)
        return super().apply(request, response)

    def stage_page(
        self, request: PullRequest, response: PullResponse, full: list[str] | None
    ) -> Stage:
        self._between()
        self._takes(request, response)
        return super().stage_page(request, response, full)

    def begin_image(
        self, manifest: Manifest, full: list[str] | None, names: list[str] | None
    ) -> Stage:
        self._between()
        return super().begin_image(manifest, full, names)

    def stage_segment(self, opened: OpenSegment) -> Stage:
        self._between()
        return super().stage_segment(opened)

    def publish(self) -> RebaseReport:
        self._between()
        return super().publish()

    def restart_stage(self, *, full: bool) -> None:
        self._between()
        super().restart_stage(full=full)


class BetweenEngine(SyncEngine):
    """The real engine over a courier that does not wait; ``between`` is called between two steps
    of a cycle, and may cancel it."""

    def __init__(
        self,
        config: SyncConfig,
        courier: Courier,
        applier: DatabaseApplier,
        *,
        between: Callable[[], None],
        **options: Any,
    ) -> None:
        self._between = between
        # It is driven from outside, and never sends by itself.
        super().__init__(config, cast(SyncTransport, courier), applier, **options)

    def _make_courier(self) -> Courier:
        return cast(Courier, self.transport)

    def _check_cancelled(self) -> None:
        self._between()
        super()._check_cancelled()

    @property
    def connection(self) -> Connection:
        return self._attempts.connection

    @property
    def cycle_result(self) -> SyncCycleResult:
        """What the newest cycle has done."""
        assert self._attempts.cycle is not None
        return self._attempts.cycle.result

    def tidy_at_most(self, steps: int) -> None:
        self._attempts.tidy_steps = steps


__all__ = ["BetweenApplier", "BetweenEngine", "configured"]
