"""Compare ``do_verify_policy=throughput`` with the published policies, tuned, on the toy tasks.

Every published policy gets a grid of its thresholds. On one half of a task's held-out problems the fastest setting of
each policy is picked, among those that answer no fewer problems than always verifying does; on the other half the picks
are compared with ``throughput``, which has nothing to pick.

    python -m benchmarks.policies --clock cpu --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from s2d2_lmeval.model import BlockDiffusionModel, load
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.toy import CORPORA, Problem, checkpoint_path, held_out, score

ALWAYS = "always"
ESTIMATOR = {"token_acceptance_estimator": "soft_clipped_linear_margin"}
SCORED = {**ESTIMATOR, "do_verify_score_type": "difference_static", "score_penalty_coef": 1.0}

GRID: dict[str, list[dict[str, Any]]] = {
    ALWAYS: [{"do_verify_policy": "mask_span_length", "min_ssd_span_length": 1}],
    "mask_span_length": [{"do_verify_policy": "mask_span_length", "min_ssd_span_length": n} for n in (2, 4, 8, 12)],
    "score_threshold": [
        {"do_verify_policy": "score_threshold", "do_verify_score_threshold": float(n), **SCORED} for n in (0, 1, 3, 6)
    ],
    "score_hysteresis": [
        {
            "do_verify_policy": "score_hysteresis",
            "hysteresis_threshold_on": float(on),
            "hysteresis_threshold_off": float(off),
            **SCORED,
        }
        for on, off in ((1, -1), (3, 0), (6, 2))
    ],
    "contextual_bandit_ucb": [{"do_verify_policy": "contextual_bandit_ucb", "ucb_beta": beta} for beta in (0.1, 1.0)],
    "throughput": [{"do_verify_policy": "throughput", **ESTIMATOR}],
}


@dataclass(frozen=True)
class Outcome:
    """What a setting did on some problems: share of right answers, new tokens per forward and per second, share of
    drafts that were verified.
    """

    accuracy: float
    tokens_per_forward: float
    tokens_per_second: float
    routed: float


def decode(
    model: BlockDiffusionModel, tokenizer: Any, problems: Sequence[Problem], options: dict[str, Any], repeats: int
) -> Outcome:
    """Answer ``problems``; of several runs the fastest."""
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    model.generate(prompts, {**options, "max_new_tokens": 1})  # costs are measured once, before
    best: Outcome | None = None
    for _ in range(repeats):
        model.trace.reset()
        started = clock.now()
        answers = model.generate(prompts, {"max_new_tokens": 96, **options})
        seconds = clock.now() - started
        right = sum(
            score(problem, tokenizer.decode(answer.token_ids, skip_special_tokens=True))
            for problem, answer in zip(problems, answers, strict=True)
        )
        totals = model.trace.totals()
        found = Outcome(
            accuracy=right / len(problems),
            tokens_per_forward=totals.get("tokens_per_forward", float("nan")),
            tokens_per_second=totals["new_tokens"] / seconds,
            routed=totals.get("routed", float("nan")),
        )
        if best is None or found.tokens_per_second > best.tokens_per_second:
            best = found
    assert best is not None
    return best


def pick(tuned: Sequence[Outcome], least: float) -> int:
    """The fastest of ``tuned`` that is right often enough; the most often right one where none is."""
    enough = [index for index, one in enumerate(tuned) if one.accuracy >= least]
    if not enough:
        return max(range(len(tuned)), key=lambda index: tuned[index].accuracy)
    return max(enough, key=lambda index: tuned[index].tokens_per_second)


def compare(
    model: BlockDiffusionModel, tokenizer: Any, task: str, limit: int, shared: dict[str, Any], repeats: int
) -> Table:
    """The table of one task."""
    problems = held_out(task)[: 2 * limit]
    tuning, test = problems[::2], problems[1::2]
    always = decode(model, tokenizer, tuning, {**shared, **GRID[ALWAYS][0]}, 1)
    table = Table(title=f"{task}: {len(test)} problems", title_justify="left")
    for column in ("policy", "picked", "right", "tokens/forward", "tokens/s", "verified"):
        table.add_column(column, justify="left" if column in ("policy", "picked") else "right")
    for policy, settings in GRID.items():
        place = 0
        if len(settings) > 1:
            runs = [decode(model, tokenizer, tuning, {**shared, **setting}, 1) for setting in settings]
            place = pick(runs, always.accuracy)
        found = decode(model, tokenizer, test, {**shared, **settings[place]}, repeats)
        own = [
            f"{value:g}" for name, value in settings[place].items() if name.startswith(("min", "do_verify_score_th"))
        ]
        own += [f"{value:g}" for name, value in settings[place].items() if name.startswith(("hyst", "ucb"))]
        table.add_row(
            policy,
            ", ".join(own),
            f"{found.accuracy:.0%}",
            f"{found.tokens_per_forward:.2f}",
            f"{found.tokens_per_second:.0f}",
            f"{found.routed:.0%}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(CORPORA))
    parser.add_argument("--limit", type=int, default=100, help="problems in either half (default: %(default)s)")
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--schedule", default="fused")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=tuple(clock.CLOCKS), default="wall")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(arguments)
    clock.choose(args.clock)
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint_path())
    model = load("toy", max_batch=args.batch)
    stop = [tokenizer.eos_token_id]
    shared = {"decoder": "s2d2", "block_length": args.block_length, "schedule": args.schedule, "stop_token_ids": stop}
    for task in args.tasks.split(","):
        Console(width=100).print(compare(model, tokenizer, task, args.limit, shared, args.repeats))


if __name__ == "__main__":
    main()
