"""Settings for the whole suite. Fixtures live beside the tests that use them, but for one."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.tools import NOT_RUN, SEARCHED

if os.environ.get("ENTIDB_TEST_STORE") == "sqlite":
    # Before any test imports it: every store in memory is one on sqlite3 then.
    from tests.storage.sqlite_store import take_the_place_of_memory

    take_the_place_of_memory()

if os.environ.get("ENTIDB_TEST_STORE") == "postgres":
    from tests.storage.postgres_store import take_the_place_of_memory

    take_the_place_of_memory()

# A loaded machine is slow, not wrong: no deadline, and no health check that measures time.
settings.register_profile(
    "entidb", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("entidb")


@pytest.fixture
def open_path() -> Iterator[Path]:
    """As ``tmp_path``, for what another user looks at: the directories above those are their
    owner's alone, and another run of pytest closes them again."""
    with tempfile.TemporaryDirectory(prefix="entidb-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("ENTIDB_TEST_STORE"):
        # Another store takes the place of the one in memory; on LMDB they ran without it already.
        again = [item for item in items if is_on_lmdb(item)]
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item not in set(again)]
    if hasattr(config, "workerinput"):
        # Among several processes the long ones come first: one that began at the end would run on
        # beside processes that have nothing left to do.
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def is_on_lmdb(item: pytest.Item) -> bool:
    called = getattr(item, "callspec", None)
    return called is not None and "lmdb" in [str(value) for value in called.params.values()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each thing that was not there, so that nobody takes silence for a pass."""
    missing: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        _, found, what = reason.partition(NOT_RUN)
        if found:
            missing[what] += 1
    for what, count in sorted(missing.items()):
        terminalreporter.write_line(f"{NOT_RUN}{count} tests, because {what}", yellow=True)
    properties = [
        each
        for reports in terminalreporter.stats.values()
        for report in reports
        for each in getattr(report, "user_properties", ())
    ]
    if searched := sorted({str(value) for name, value in properties if name == SEARCHED}):
        terminalreporter.write_line(
            f"planted bugs that the remembered seed does not show any more, so that they took a"
            f" search (python -m tests.planted): {', '.join(searched)}",
            yellow=True,
        )
