"""Programs that some tests need and not every machine has: such a test is left out, and the end of
the run says so in one line (``conftest``)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

#: How the reason of a test begins that was left out because something is not installed.
NOT_RUN = "not run: "
#: A property of the tests of planted bugs for which no seed was remembered that shows them.
SEARCHED = "searched for a seed"


def program(name: str) -> Path:
    """Where the program ``name`` is. Leaves the test out where there is none."""
    # Debian keeps servers where only root looks by itself.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
    if found is None:
        pytest.skip(f"{NOT_RUN}{name} is not installed")
    return Path(found)


def package(name: str) -> None:
    """Leaves the test out where the package ``name`` is not installed."""
    pytest.importorskip(name, reason=f"{NOT_RUN}{name} is not installed")
