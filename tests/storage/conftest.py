"""What several tests of stores share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage.postgres_cluster import Cluster, cluster


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """One PostgreSQL server for all tests of a process."""
    with cluster() as made:
        yield made
