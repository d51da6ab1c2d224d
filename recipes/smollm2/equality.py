"""Whether drafts of the adapter ever change an answer: ``python -m recipes.smollm2.equality``.

Questions of GSM8K's test split and, for a quarter, the prompts of IFEval that the adapter was not trained on; ``ar`` of
the plain checkpoint decodes them once, and ``sliding`` with the adapter must give the same tokens: greedily and
sampled, eight requests in flight and one, in float32, and in bfloat16 with ``exact``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from recipes.smollm2.demo import parser_of
from recipes.smollm2.prompts import MEASURED_ON, documents
from s2d2_lmeval.model import BlockDiffusionModel, load
from s2d2_lmeval.studies.report.tables import in_markdown

LOADED: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16, "exact": True},
}
DRAWN: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 7}}
IN_FLIGHT = (8, 1)


def prompts(model: Path, data_dir: str | None, count: int) -> list[list[int]]:
    """Token ids of the first ``count`` prompts, in the chat template."""
    told = documents(data_dir, ("google/IFEval",), "train", "ifeval/input_data.jsonl")[:MEASURED_ON][: count // 4]
    asked = documents(data_dir, ("openai/gsm8k", "main"), "test", "gsm8k/test.jsonl")[: count - len(told)]
    texts = [one["question"] for one in asked] + [one["prompt"] for one in told]
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]


def answers(model: BlockDiffusionModel, asked: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
    """Token ids of the answers."""
    return [one.token_ids for one in model.generate(asked, options)]


def compared(given: argparse.Namespace, loading: str, drawing: str, asked: list[list[int]]) -> list[list[str]]:
    """The lines of the table for a type of weights and a way to draw."""
    options = {**DRAWN[drawing], "max_new_tokens": given.max_new_tokens}
    plain = load(str(given.model), device="cpu", max_batch=IN_FLIGHT[0], **LOADED[loading])
    expected, lines = answers(plain, asked, {**options, "decoder": "ar"}), []
    for rows in IN_FLIGHT:
        drafting = load(
            str(given.model), device="cpu", max_batch=rows, draft_adapter=str(given.adapter), **LOADED[loading]
        )
        found = answers(drafting, asked, {**options, "decoder": "sliding", "row_budget": 32})
        equal = sum(map(list.__eq__, found, expected))
        lines.append([loading, drawing, str(rows), str(sum(map(len, found))), f"{equal} of {len(asked)}"])
        print(" | ".join(lines[-1]), flush=True)
    return lines


def main() -> None:
    """Read the command line, decode, write the table."""
    parser = parser_of("equality", __doc__)
    parser.add_argument("--weights", nargs="+", default=list(LOADED), choices=list(LOADED))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    disable_progress_bar()
    asked = prompts(given.model, given.data_dir, given.prompts)
    lines = [
        line for loading in given.weights for drawing in DRAWN for line in compared(given, loading, drawing, asked)
    ]
    print("\n" + in_markdown(["weights", "tokens", "in flight", "new tokens", "as `ar`"], lines, 2))
    if any(not line[-1].startswith(f"{len(asked)} ") for line in lines):
        raise SystemExit("answers differ from those of ar")


if __name__ == "__main__":
    main()
