"""See :mod:`recipes.toy.problems`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from recipes.toy.problems import MAKE, made_held_out
from s2d2_lmeval.toy import checkpoint_path

if __name__ == "__main__":
    written: Path = checkpoint_path().with_name("held_out.jsonl")
    problems = [problem for name in MAKE for problem in made_held_out(name)]
    written.write_text(
        "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in problems), encoding="utf-8"
    )
