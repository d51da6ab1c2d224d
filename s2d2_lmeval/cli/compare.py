"""Compare two runs of lm_eval on the same documents: paired differences with intervals, and what differed.

A run is the folder of `--output_path` (the newest results in it count) or one results_….json, made with
`--log_samples`. Differences are the second run's value less the first's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from s2d2_lmeval.cli.values import whole

if TYPE_CHECKING:
    from s2d2_lmeval.studies.compare import Difference

SUMMARY = "paired differences between two runs of lm_eval, and what differed in their settings"
LONGEST_ANSWER = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("first", type=Path, metavar="RUN", help="what the other is compared with")
    parser.add_argument("second", type=Path, metavar="RUN")
    parser.add_argument("--other_prompts", action="store_true", help="compare although the prompts differ")
    parser.add_argument(
        "--show", type=whole(0), default=5, metavar="N", help="documents shown that differ (default: 5)"
    )
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare, and show."""
    from rich.text import Text

    from s2d2_lmeval.cli.console import make_console, printable, table
    from s2d2_lmeval.studies.compare import compare, figures, read_run, what_differed
    from s2d2_lmeval.studies.store import write_whole

    console = make_console()
    first, second = read_run(args.first), read_run(args.second)
    found = compare(first, second, other_prompts=args.other_prompts)
    settings, numbers = what_differed(first, second), figures(first, second)
    console.print(f"first:  {first.path}\nsecond: {second.path}", markup=False, soft_wrap=True)
    if settings:
        console.print(
            table(["setting", "first", "second"], [list(map(printable, one)) for one in settings], texts=range(3))
        )
    else:
        console.print("Their settings are the same.")
    header = ["task", "metric", "first", "second", "difference", "95 % interval", "p", "differ"]
    console.print(table(header, list(map(_line, found)), texts=(0, 1)))
    if numbers:
        lines = [[task, name, f"{one:.2f}", f"{other:.2f}", _ratio(one, other)] for task, name, one, other in numbers]
        console.print(table(["", "decoding", "first", "second", "ratio"], lines, texts=(0, 1)))
    for one in found:
        for document, value, other, answer, others in one.documents[: args.show]:
            head = f"{one.task}, {one.metric}, document {document}: {value:g} and {other:g}"
            console.print(Text(head, "dim"))
            console.print(f"  first:  {_tail(answer)}\n  second: {_tail(others)}", markup=False, soft_wrap=True)
        if len(one.documents) > args.show:
            rest = len(one.documents) - args.show
            console.print(
                Text(f"{one.task}, {one.metric}: {rest} more documents differ; --show {rest + args.show}", "dim")
            )
    if args.output:
        content = {
            "first": str(first.path),
            "second": str(second.path),
            "settings": settings,
            "differences": [asdict(one) for one in found],
            "decoding": numbers,
        }
        write_whole(args.output, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


def _line(one: Difference) -> list[str]:
    scores = [f"{value:.4g}" for value in (one.first, one.second)]
    interval = f"{one.low:+.3f} … {one.high:+.3f}"
    differing = f"{len(one.documents)} of {one.count}"
    return [one.task, one.metric, *scores, f"{one.difference:+.3f}", interval, f"{one.p_value:.2g}", differing]


def _ratio(first: float, second: float) -> str:
    return f"{second / first:.2f}" if first else ""


def _tail(answer: str) -> str:
    """The end of an answer in one line: where a result usually is."""
    from s2d2_lmeval.cli.console import printable

    text = printable(" ".join(answer.split()))
    return text if len(text) <= LONGEST_ANSWER else "… " + text[-LONGEST_ANSWER:]
