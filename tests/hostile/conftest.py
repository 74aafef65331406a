"""Clients here make up what they have seen, thousands of times; a server that believed one of them
would begin another history (R29), and all the later ones would be refused for that alone. What a
claim that is believed does is in ``tests/server/test_put_back.py``."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def nobody_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entidb.server.proofs.HISTORIES_MAX", 0)
