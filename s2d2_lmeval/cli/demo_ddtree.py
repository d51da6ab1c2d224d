"""The embedded toy model in its autoregressive mode with its drafter: ar, dflash, and ddtree at several budgets.

All of them answer alike; what differs is how many forwards of the target that takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2d2_lmeval.cli.values import nonempty, real, whole

SUMMARY = "drafts for an autoregressive target: ar, dflash and ddtree side by side; needs no network"

BUDGETS = ("16", "32", "64")


def configurations(budgets: Sequence[str], seed_chain: bool) -> dict[str, dict[str, Any]]:
    """Name in the table -> ``--model_args``. The first one is what answers are compared with."""
    seeded = {"tree_seed_chain": True} if seed_chain else {}
    trees = {
        f"ddtree {budget}": {"decoder": "ddtree", "tree_budget": budget if budget == "auto" else int(budget), **seeded}
        for budget in budgets
    }
    return {"ar": {"decoder": "ar"}, "dflash": {"decoder": "dflash"}, **trees}


@dataclass(frozen=True)
class Measured:
    """One configuration on all tasks together.

    ``acceptance_length`` tokens per round with a draft, the target's own included (None without drafts);
    ``without_bonus`` the accepted drafts of them; milliseconds per forward, all rows in it together.
    """

    configuration: str
    accuracy: float
    tokens_per_target_forward: float
    acceptance_length: float | None
    without_bonus: float | None
    target_milliseconds: float
    drafter_milliseconds: float | None
    tokens_per_second: float
    equal: int
    documents: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model", type=nonempty, default="toy", metavar="PATH", help="another target than the embedded model"
    )
    parser.add_argument(
        "--draft", type=nonempty, default="toy", metavar="PATH", help="another drafter than the embedded one"
    )
    parser.add_argument("--limit", type=whole(), default=100, help="documents per task (default: %(default)s)")
    parser.add_argument("--rows", type=whole(), default=8, help="requests in flight (default: %(default)s)")
    parser.add_argument(
        "--budgets", nargs="+", default=BUDGETS, metavar="N", help="nodes of trees, or auto (default: 16 32 64)"
    )
    parser.add_argument("--seed_chain", action="store_true", help="trees hold the arg-max chain whatever it is worth")
    parser.add_argument(
        "--temperature", type=real(0, 1000), default=0.0, help="sample at this temperature (default: arg-max)"
    )
    parser.add_argument("--threads", type=whole(), default=1, help="torch's threads on a CPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/demo-ddtree"), help="folder for the table as files")


def run(args: argparse.Namespace) -> int:
    """Evaluate every configuration, then show and write the table."""
    import torch

    from s2d2_lmeval.cli.console import hide_loading_bars, make_console
    from s2d2_lmeval.cli.demo import evaluations, framed, toy_tasks, write
    from s2d2_lmeval.studies.report.tables import in_markdown

    console = make_console()
    hide_loading_bars()
    torch.set_num_threads(args.threads)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {}
    measured: list[Measured] = []
    expected: list[str] = []
    environment: Mapping[str, Any] = {}
    started = time.perf_counter()
    chosen = configurations(args.budgets, args.seed_chain)
    given = {name: {"draft": args.draft, **options, **sampling} for name, options in chosen.items()}
    for name, results, answers in evaluations(console, given, args):
        expected = expected or answers
        scores = [results["results"][task]["accuracy,none"] for task in toy_tasks()]
        about = results["config"]["s2d2"]
        environment = about["environment"]
        equal = sum(one == other for one, other in zip(answers, expected, strict=True))
        measured.append(measure(name, sum(scores) / len(scores), about["totals"], equal, len(answers)))
    header, cells = table_cells(measured)
    console.print()
    console.print(framed("Drafts for an autoregressive target, all tasks together", header, cells, texts=1))
    everything = {"configurations": chosen, "measured": [asdict(one) for one in measured]}
    everything["environment"] = dict(environment)
    write(console, args, "Demo: drafts for the toy model", [in_markdown(header, cells)], everything, started)
    return 0


def measure(name: str, accuracy: float, totals: Mapping[str, float], equal: int, documents: int) -> Measured:
    """One line of the table from a run's totals. Without drafts every forward is the target's."""
    drafts = totals.get("drafter_forwards", 0)
    targets, steps = totals.get("target_forwards", totals["nfe"]), totals.get("target_steps", totals["forwards"])
    return Measured(
        configuration=name,
        accuracy=accuracy,
        tokens_per_target_forward=totals["new_tokens"] / targets,
        acceptance_length=totals.get("acceptance_length"),
        without_bonus=totals.get("acceptance_length_without_bonus"),
        target_milliseconds=1000 * totals.get("target_seconds", totals["seconds"]) / steps,
        drafter_milliseconds=1000 * totals["drafter_seconds"] / totals["drafter_steps"] if drafts else None,
        tokens_per_second=totals["tokens_per_second"],
        equal=equal,
        documents=documents,
    )


def table_cells(measured: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, a line per configuration."""
    first = measured[0].configuration
    header = ["decoder", "accuracy", "tokens per target forward", "acceptance length", "without bonus"]
    header += ["target ms", "drafter ms", "tokens/s", f"answers as {first}"]

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return header, [
        [
            *(one.configuration, f"{one.accuracy:.1%}", f"{one.tokens_per_target_forward:.2f}"),
            *(shown(one.acceptance_length), shown(one.without_bonus), f"{one.target_milliseconds:.1f}"),
            "" if one.drafter_milliseconds is None else f"{one.drafter_milliseconds:.1f}",
            *(f"{one.tokens_per_second:.0f}", f"{one.equal} of {one.documents}"),
        ]
        for one in measured
    ]
