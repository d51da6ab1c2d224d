"""The embedded toy model in its autoregressive mode with its drafter: ar, dflash, and ddtree at several budgets.

All give the same answers; they differ in the number of target forwards.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2d2_lmeval.cli.values import add_shared, nonempty, real

SUMMARY = "drafts for an autoregressive target: ar, dflash and ddtree side by side; needs no network"

BUDGETS = ("16", "32", "64")


def configurations(budgets: Sequence[str], seed_chain: bool) -> dict[str, dict[str, Any]]:
    """Name in the table -> ``--model_args``. Answers are compared with those of the first."""
    seeded = {"tree_seed_chain": True} if seed_chain else {}
    trees = {
        f"ddtree {budget}": {"decoder": "ddtree", "tree_budget": budget if budget == "auto" else int(budget), **seeded}
        for budget in budgets
    }
    return {"ar": {"decoder": "ar"}, "dflash": {"decoder": "dflash"}, **trees}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    for name, other in (("--model", "target than the embedded model"), ("--draft", "drafter than the embedded one")):
        parser.add_argument(name, type=nonempty, default="toy", metavar="PATH", help=f"another {other}")
    add_shared(parser, "--limit", "--rows")
    parser.add_argument(
        "--budgets", nargs="+", default=BUDGETS, metavar="N", help="nodes of trees, or auto (default: 16 32 64)"
    )
    parser.add_argument("--seed_chain", action="store_true", help="always include the argmax chain in the tree")
    parser.add_argument(
        "--temperature", type=real(0, 1000), default=0.0, help="sample at this temperature (default: argmax)"
    )
    add_shared(parser, "--threads", default=1, help="torch's threads on a CPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/demo-ddtree"), help="folder for the table as files")


def run(args: argparse.Namespace) -> int:
    """Evaluate every configuration, then show and write the table."""
    from s2d2_lmeval.cli.console import begin
    from s2d2_lmeval.cli.demo import evaluations, show_and_write

    console = begin(args.threads)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {}
    started = time.perf_counter()
    chosen = configurations(args.budgets, args.seed_chain)
    given = {name: {"draft": args.draft, **options, **sampling} for name, options in chosen.items()}
    _, measured, environment = evaluations(console, given, args)
    title, first = "Drafts for an autoregressive target, all tasks together", measured[0]["configuration"]
    content = {"configurations": chosen, "measured": measured, "environment": environment}
    tables = [(title, columns(first), measured, 1)]
    show_and_write(console, args, "Demo: drafts for the toy model", tables, content, started)
    return 0


def columns(first: str) -> dict[str, Any]:
    """Columns of the table, which compares answers with those of the configuration ``first``."""
    from s2d2_lmeval.studies.report.tables import shown

    return {
        "decoder": lambda one: one["configuration"],
        "accuracy": lambda one: f"{one['accuracy']:.1%}",
        "tokens per target forward": lambda one: f"{one['tokens_per_target_forward']:.2f}",
        "acceptance length": lambda one: shown(one["acceptance_length"], ".2f"),
        "without bonus": lambda one: shown(one["without_bonus"], ".2f"),
        "target ms": lambda one: f"{one['target_milliseconds']:.1f}",
        "drafter ms": lambda one: shown(one["drafter_milliseconds"], ".1f"),
        "tokens/s": lambda one: f"{one['tokens_per_second']:.0f}",
        f"answers as {first}": lambda one: f"{one['equal']} of {one['documents']}",
    }
