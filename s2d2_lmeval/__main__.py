"""``python -m s2d2_lmeval``: the same as the command ``s2d2-lmeval``."""

from __future__ import annotations

import sys

from s2d2_lmeval.cli import main

if __name__ == "__main__":
    sys.exit(main())
