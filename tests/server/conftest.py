"""What several tests of servers share."""

from __future__ import annotations

from tests.storage.conftest import postgres

__all__ = ["postgres"]
