"""``python -m scripts.patroni_rig``."""

import sys

from scripts.patroni_rig.rounds import main

if __name__ == "__main__":
    sys.exit(main())
