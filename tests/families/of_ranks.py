"""What every rank of a divided model does in the tests: ``python -m torch.distributed.run … of_ranks.py out folder…``.

Also run by the tests themselves, in one process, for what is to come out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

PROMPTS = [[5, 6, 8, 8], [9, 10, 11], [12] * 9]
OPTIONS: list[dict[str, Any]] = [
    {"decoder": "ar"},
    {"decoder": "s2d2", "do_sample": True},
    {"decoder": "sliding"},
    {"decoder": "sliding", "do_sample": True, "row_budget": "auto"},
]


def stop(index: int, tokens: list[int]) -> int | None:
    """Ends the second answer; only the first rank knows that."""
    return 9 if index == 1 and len(tokens) > 9 and os.environ.get("RANK", "0") == "0" else None


def everything(folder: str, **loading: Any) -> dict[str, Any]:
    """Tokens, statistics and scores of the checkpoint in ``folder``, and the heads of its cache."""
    import s2d2_lmeval

    model = s2d2_lmeval.load(folder, max_batch=2, **loading)
    found: dict[str, Any] = {"heads": [], "memory": s2d2_lmeval.runtime.memory.bytes_per_position(model.hf_model)}
    for options in OPTIONS:
        wanted = {**options, "max_new_tokens": 12, "stop_token_ids": []}
        answers = model.generate(PROMPTS, wanted, stop=stop)
        found["heads"].append(model._runner.cache._layers[0][0].shape[2])
        timed = options.get("row_budget") == "auto"  # its trees follow the clock
        stats = [{} if timed else {**one.stats, "seconds": 0} for one in answers]
        found[str(options)] = [[one.token_ids for one in answers], stats]
    found["scores"] = [round(score, 4) for score, _ in model.score([([5, 6], [7, 8, 9]), ([5, 6], [1])])]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1]) / f"{os.environ['RANK']}.json"
    out.write_text(json.dumps([everything(folder, tp_plan="auto") for folder in sys.argv[2:]]))
