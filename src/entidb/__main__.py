"""``python -m entidb`` is the command line."""

from __future__ import annotations

import sys

from entidb.cli import main

if __name__ == "__main__":
    sys.exit(main())
