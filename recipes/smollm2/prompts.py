"""The prompts of the recipe: ``python -m recipes.smollm2.prompts --out build/smollm2-prompts.jsonl``.

Questions of GSM8K's training split, prompts of IFEval (but for the first 50, which the demo measures on) and tasks of
MBPP's training split, in turn: two, one, one. From the hub, or from files in a folder (``--data_dir``).
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import chain
from pathlib import Path
from typing import Any

from s2d2_lmeval.tasks.data import load_documents

MEASURED_ON = 50
MBPP_TRAINING = 601
"""First task of MBPP's training split."""


def documents(data_dir: str | None, hub: tuple[str, ...], split: str, *names: str) -> list[dict[str, Any]]:
    """The documents of a benchmark."""
    return [dict(one) for one in load_documents(hub, {split: names}, data_dir)[split]]


def prompts(data_dir: str | None, count: int) -> list[str]:
    """The first ``count`` of them, the same every time."""
    asked = documents(data_dir, ("openai/gsm8k", "main"), "train", "gsm8k/train.jsonl")
    told = documents(data_dir, ("google/IFEval",), "train", "ifeval/input_data.jsonl")[MEASURED_ON:]
    tasks = documents(data_dir, ("google-research-datasets/mbpp", "full"), "train", "mbpp/mbpp.jsonl")
    questions = [one["question"] for one in asked]
    instructions = [one["prompt"] for one in told]
    programs = [
        f"{one['text']} Your code should pass these tests:\n\n" + "\n".join(one["test_list"])
        for one in tasks
        if one["task_id"] >= MBPP_TRAINING
    ]
    rng = random.Random(0)
    for texts in (questions, instructions, programs):
        rng.shuffle(texts)
    turns = zip(questions[::2], questions[1::2], instructions, programs, strict=False)
    return list(chain.from_iterable(turns))[:count]


def main() -> None:
    """Read the command line and write the prompts."""
    parser = argparse.ArgumentParser(prog="python -m recipes.smollm2.prompts", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", metavar="DIR", help="folder with the benchmarks' files")
    parser.add_argument("--count", type=int, default=640)
    parser.add_argument("--out", type=Path, default=Path("build/smollm2-prompts.jsonl"))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": text}) + "\n" for text in prompts(given.data_dir, given.count)]
    given.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
