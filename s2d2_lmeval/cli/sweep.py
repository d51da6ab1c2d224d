"""Run a study: decoding configurations on tasks, models and seeds, unattended.

Every finished sample is on disk at once. Interrupted or killed, the same command goes on where it was. What comes out
is read by `s2d2-lmeval report`. Some studies come with the package: give their name in place of a file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import nonempty, real, whole
from s2d2_lmeval.studies import packaged

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from s2d2_lmeval.studies.planning import Plan
    from s2d2_lmeval.studies.sweep import Progress, Sweep

SUMMARY = "run a study: many decoding configurations, resumable"

SOME_FAILED = 1
ROWS_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "study",
        type=Path,
        metavar="STUDY.yaml",
        help=f"what to run (docs/studies.md): a file, or a packaged study: {', '.join(packaged.names())}",
    )
    parser.add_argument("--schema", action=_PrintSchema, help="print a JSON schema of study files, and stop")
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="results (default: out/NAME)")
    parser.add_argument("--model", type=nonempty, metavar="NAME", help="one model, in place of those of the study")
    parser.add_argument(
        "--task", type=nonempty, action="append", metavar="NAME", help="only this task of the study; may be repeated"
    )
    parser.add_argument(
        "--decoder", type=nonempty, metavar="NAME", help="only configurations of this decoder, and of ar"
    )
    parser.add_argument("--limit", type=whole(), metavar="N", help="documents per task")
    parser.add_argument("--batch_size", type=whole(), metavar="N", help="requests in flight")
    parser.add_argument(
        "--data_dir", type=nonempty, metavar="DIR", help="benchmark files, for machines without a connection"
    )
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="allow tasks that run what the model wrote"
    )
    parser.add_argument(
        "--sandbox", metavar="MODE", help="where that runs: process, bwrap, docker, docker:IMAGE (docs/sandbox.md)"
    )
    parser.add_argument("--anew", action="store_true", help="in a folder of another code version: start again in it")
    parser.add_argument(
        "--plan",
        "--dry_run",
        action="store_true",
        help="check what can be checked without a connection, show the points, and stop",
    )
    parser.add_argument("--threads", type=whole(), help="of torch on the CPU")
    parser.add_argument("--backend", choices=("local", "ray"), default="local", help="where points run")
    parser.add_argument("--ray_address", metavar="ADDRESS", help="of a running cluster (default: a new local one)")
    parser.add_argument(
        "--num_gpus", type=real(0, 1_000_000), default=0, help="of a point, with Ray (default: %(default)s)"
    )
    parser.add_argument(
        "--num_cpus", type=real(0, 1_000_000), default=1, help="of a point, with Ray (default: %(default)s)"
    )


class _PrintSchema(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from s2d2_lmeval.studies.study import schema

        print(json.dumps(schema(), ensure_ascii=False, indent=1))
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Plan, run, and say what came of it."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars; there is a table
    if args.plan:  # a plan is made of what is on this machine; these are read when the libraries are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    from rich.text import Text

    from s2d2_lmeval.cli.console import hide_loading_bars, make_console
    from s2d2_lmeval.harness.secrets import ADVICE, holds_token
    from s2d2_lmeval.studies.planning import Plan
    from s2d2_lmeval.studies.search import search
    from s2d2_lmeval.studies.study import read_study
    from s2d2_lmeval.studies.sweep import COMPLETE, FAILED, LocalBackend, RayBackend, Sweep
    from s2d2_lmeval.tasks.sandbox import modes

    modes.choose(args.sandbox)
    console = make_console()
    hide_loading_bars()
    overrides: dict[str, Any] = {"limit": args.limit, "batch_size": args.batch_size, "data_dir": args.data_dir}
    path = packaged.find(args.study)
    study = read_study(path, {**overrides, "models": [args.model] if args.model else None})
    study = study.part(args.task, args.decoder)
    if any(map(holds_token, study.models.values())):
        console.print(ADVICE, soft_wrap=True)
    folder = args.output or Path("out") / study.name
    # What the embedded model writes is run without asking, as everywhere.
    unsafe_code = args.confirm_run_unsafe_code or (packaged.is_packaged(path) and args.model is None)
    with console.status("reading tasks"):
        plan = Plan(study, folder, unsafe_code=unsafe_code, anew=args.anew, preview=args.plan)
    if args.plan:
        _show_plan(console, plan)
        return 0
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    on_ray = {"address": args.ray_address, "num_gpus": args.num_gpus, "num_cpus": args.num_cpus}
    backend = RayBackend(**on_ray) if args.backend == "ray" else LocalBackend()
    sweep = Sweep(plan, backend, search)
    try:
        with Display(console, sweep):
            counts = sweep.run()
    finally:
        backend.close()
    for progress in sweep.points.values():
        if progress.unreadable:
            console.print(
                f"{progress.job.point.label}: {progress.unreadable} unreadable lines in {progress.job.path} were "
                "skipped; what they held has been decoded again.",
                markup=False,
            )
        if progress.state == FAILED:
            console.print(Text.assemble(("failed ", "red"), f"{progress.job.point.label}: {progress.error}"))
    ended = ", ".join(f"{count} {state}" for state, count in counts.items())
    console.print(f"{ended}. Results in {folder}; s2d2-lmeval report {folder}", markup=False)
    return 0 if set(counts) <= {COMPLETE} else SOME_FAILED


def _show_plan(console: Console, plan: Plan) -> None:
    points = plan.study.points()
    known = [point for point in points if point.task.task in plan.settings]
    samples = sum(plan.settings[point.task.task]["samples"] for point in known)
    for point in points:
        options = ", ".join(f"{name}={value}" for name, value in point.options.items())
        console.print(f"{point.label}: {options}", markup=False, soft_wrap=True)
    more = "" if len(known) == len(points) else " and those of tasks that are not on this machine"
    console.print(f"{len(points)} points, {samples} samples{more}.")
    if plan.study.search is not None:
        console.print(f"Then a search of {plan.study.search.trials} trials per model.")
    for sentence in plan.unknown:
        console.print(f"Not checked: {sentence}", markup=False, soft_wrap=True)


class Display:
    """The live table on a terminal; elsewhere a line per point."""

    def __init__(self, console: Console, sweep: Sweep) -> None:
        from rich.live import Live

        self.console, self.sweep = console, sweep
        sweep.watcher = self.changed
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def changed(self, progress: Progress) -> None:
        """A point is further on, or has ended."""
        if self._live is not None:
            self._live.update(self._table())
        elif progress.has_ended:
            points = self.sweep.points.values()
            left = self.sweep.seconds_left
            self.console.print(
                f"{sum(one.has_ended for one in points)}/{len(points)} {progress.state}: {progress.job.point.label}: "
                f"{progress.done} samples, {progress.tokens_per_second:.1f} tokens/s, "
                f"{progress.tokens_per_forward:.2f} tokens/forward" + (f"; {duration(left)} left" if left else ""),
                markup=False,
                soft_wrap=True,
            )

    def _table(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        points = list(self.sweep.points.values())
        table = Table(box=box.SIMPLE_HEAD, title=self.sweep.plan.study.name, title_justify="left", title_style="bold")
        for name in ("", "model", "task", "decoding", "seed"):
            table.add_column(name)
        for name in ("samples", "tokens/s", "tokens/forward"):
            table.add_column(name, justify="right")
        shown = window(points)
        for progress in shown:
            point = progress.job.point
            table.add_row(
                Text(*_STATES[progress.state]),
                *(Text(text) for text in (point.model, point.task.task, point.decoding, str(point.seed))),
                f"{progress.done}/{progress.job.samples}",
                f"{progress.tokens_per_second:.1f}" if progress.seconds else "",
                f"{progress.tokens_per_forward:.2f}" if progress.nfe else "",
            )
        left = self.sweep.seconds_left
        done, samples = sum(one.done for one in points), sum(one.job.samples for one in points)
        ended = sum(one.has_ended for one in points)
        line = f"{ended} of {len(points)} points, {done} of {samples} samples"
        if left is not None and done < samples:
            line += f", {duration(left)} left"
        if len(shown) < len(points):
            line += f"; {len(points) - len(shown)} points not shown"
        return Group(table, Text(line))


_STATES = {"waiting": ("·", "dim"), "running": ("▶", "cyan"), "complete": ("✓", "green"), "failed": ("✗", "red")}


def window(points: list[Progress]) -> list[Progress]:
    """What there is room for: the running point in the middle."""
    if len(points) <= ROWS_SHOWN:
        return points
    active = [place for place, one in enumerate(points) if one.state == "running"]
    ended = [place for place, one in enumerate(points) if one.has_ended]
    middle = active[0] if active else ended[-1] if ended else 0
    first = min(max(0, middle - ROWS_SHOWN // 2), len(points) - ROWS_SHOWN)
    return points[first : first + ROWS_SHOWN]


def duration(seconds: float) -> str:
    """For people: the two largest units."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute} min"
    return f"{minute} min {second} s" if minute else f"{second} s"
