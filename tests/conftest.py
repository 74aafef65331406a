"""Settings for the whole suite. Fixtures live beside the tests that use them."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

if os.environ.get("ENTIDB_TEST_STORE") == "sqlite":
    # Before any test imports it: every store in memory is one on sqlite3 then.
    from tests.storage.sqlite_store import take_the_place_of_memory

    take_the_place_of_memory()

# A loaded machine is slow, not wrong: no deadline, and no health check that measures time.
settings.register_profile(
    "entidb", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("entidb")
