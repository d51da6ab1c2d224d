"""What the tests here have in common: the tiny SDAR checkpoint and its recorded runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests" / "decoding" / "data"
SDAR = DATA / "sdar_checkpoint"
MASK = 96


def recorded_runs() -> list[dict[str, Any]]:
    """Runs of the published functions: arguments and what came back."""
    return [json.loads(line) for line in (DATA / "sdar_goldens.jsonl").read_text().splitlines()]
