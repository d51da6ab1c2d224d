"""A real model under lm-evaluation-harness, one token per forward and by its own drafts: ``make demo-real``.

``ar`` is the plain checkpoint; ``sliding`` on the same weights drafts by lookups in the text alone, or by the adapter.
All give the same answers, which is checked; in float32, where equal arithmetic is equal numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from s2d2_lmeval.cli.demo import texts, together
from s2d2_lmeval.errors import S2D2Error
from s2d2_lmeval.studies.report.tables import cells, in_markdown

ADAPTER = Path(__file__).parent / "adapter"
TASKS = {"s2d2_gsm8k": "exact_match,none", "s2d2_ifeval": "prompt_level_strict_acc,none"}
COLUMNS = {
    "task": lambda one: one["task"].removeprefix("s2d2_"),
    "decoder": lambda one: one["configuration"],
    "score": lambda one: f"{one['score']:.1%}",
    "tokens per forward": lambda one: f"{one['tokens_per_forward']:.2f}",
    "tokens/s": lambda one: f"{one['tokens_per_second']:.0f}",
    "seconds": lambda one: f"{one['seconds']:.0f}",
    "answers as ar": lambda one: f"{one['equal']} of {one['documents']}",
}


def configurations(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> ``--model_args`` besides the checkpoint."""
    sliding = {"decoder": "sliding", "row_budget": given.row_budget}
    return {
        "ar": {"decoder": "ar"},
        "sliding, lookups": sliding,
        "sliding, adapter": {**sliding, "draft_adapter": str(given.adapter)},
    }


def evaluate(task: str, options: Mapping[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """The harness's results of one configuration."""
    from lm_eval import simple_evaluate

    from s2d2_lmeval.studies.tasks import task_manager

    results = simple_evaluate(
        model="s2d2",
        model_args={"pretrained": str(given.model), "dtype": "float32", **options},
        tasks=[task],
        task_manager=task_manager(given.data_dir, (), [task]),
        batch_size=given.rows,
        limit=given.limit,
        gen_kwargs=f"max_gen_toks={given.max_new_tokens}",
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    return dict(results)


def measured(task: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each configuration on a task."""
    lines: list[dict[str, Any]] = []
    expected: list[str] = []
    for name, options in configurations(given).items():
        results = evaluate(task, options, given)
        answers = texts(results["samples"][task])
        expected = expected or answers
        line = together(name, results["config"]["s2d2"]["totals"], lines[0] if lines else None)
        equal = sum(map(str.__eq__, answers, expected))
        about = {"task": task, "score": results["results"][task][TASKS[task]]}
        lines.append({**line, **about, "equal": equal, "documents": len(answers)})
        print(in_markdown(*cells(COLUMNS, lines[-1:]), 2).splitlines()[-1], flush=True)
    return lines


def tried(task: str, given: argparse.Namespace) -> list[dict[str, Any]] | str:
    """The lines of a task, or why it cannot be run here."""
    try:
        return measured(task, given)
    except S2D2Error as error:
        return str(error)


def parser_of(name: str, about: str) -> argparse.ArgumentParser:
    """A command line with what every measurement of the recipe takes."""
    parser = argparse.ArgumentParser(prog=f"python -m recipes.smollm2.{name}", description=about.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("build/smollm2"), help="what recipes.smollm2.unpack wrote")
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--data_dir", metavar="DIR", help="folder with the benchmarks' files; else the hub")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def main() -> None:
    """Read the command line, evaluate, write the table."""
    parser = parser_of("demo", __doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--limit", type=int, default=50, help="documents per task")
    parser.add_argument("--rows", type=int, default=8, help="requests in flight")
    parser.add_argument("--row_budget", type=int, default=32, help="queries per request and forward")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("out/demo-real"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in ("lm_eval", "lm_eval.s2d2"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = {task: tried(task, given) for task in given.tasks}
    lines = [line for of_task in found.values() if not isinstance(of_task, str) for line in of_task]
    left_out = [f"{task} is left out: {said}" for task, said in found.items() if isinstance(said, str)]
    given.output.mkdir(parents=True, exist_ok=True)
    table = in_markdown(*cells(COLUMNS, lines), 2)
    (given.output / "results.md").write_text("\n\n".join([table, *left_out]) + "\n", encoding="utf-8")
    (given.output / "results.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(["", table, *left_out, f"written to {given.output}"]))
    if not lines or any(one["equal"] < one["documents"] for one in lines):
        raise SystemExit("nothing was measured, or answers differ from those of ar")


if __name__ == "__main__":
    main()
