"""Run a study: decoding configurations on tasks, models and seeds, unattended.

Every finished sample is written to disk immediately, and the same command resumes an interrupted run.
`s2d2-lmeval report` reads the results. For a packaged study, give its name instead of a file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import Print, add_shared, nonempty, real, whole
from s2d2_lmeval.studies import packaged

if TYPE_CHECKING:
    from rich.console import Console

    from s2d2_lmeval.studies.planning import Plan

SUMMARY = "run a study: many decoding configurations, resumable"

SOME_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "study",
        type=Path,
        metavar="STUDY.yaml",
        help=f"what to run (docs/studies.md): a file, or a packaged study: {', '.join(packaged.names())}",
    )
    parser.add_argument("--schema", action=Print, const=_schema, help="print a JSON schema of study files, and stop")
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="results (default: out/NAME)")
    named: dict[str, Any] = {"type": nonempty, "metavar": "NAME"}
    count: dict[str, Any] = {"type": whole(), "metavar": "N"}
    parser.add_argument("--model", **named, help="one model, instead of the study's")
    parser.add_argument("--task", **named, action="append", help="only this task of the study; may be repeated")
    parser.add_argument("--decoder", **named, help="only configurations of this decoder, and of ar")
    parser.add_argument("--limit", **count, help="documents per task")
    parser.add_argument("--batch_size", **count, help="requests in flight")
    parser.add_argument("--repeats", **count, help="timings of each configuration, in turn")
    files = "folder with the benchmark files, for machines without a connection"
    parser.add_argument("--data_dir", type=nonempty, metavar="DIR", help=files)
    allow = "allow tasks that run model-written code"
    parser.add_argument("--confirm_run_unsafe_code", action="store_true", help=allow)
    where = "where such code runs: process, bwrap, docker, docker:IMAGE (docs/sandbox.md)"
    parser.add_argument("--sandbox", metavar="MODE", help=where)
    parser.add_argument(
        "--anew", action="store_true", help="start over in a folder with results of another code version"
    )
    plan = "check what can be checked offline, show the points, and stop"
    parser.add_argument("--plan", "--dry_run", action="store_true", help=plan)
    add_shared(parser, "--threads")
    parser.add_argument("--backend", choices=("local", "ray"), default="local", help="where points run")
    parser.add_argument(
        "--ray_address", metavar="ADDRESS", help="address of a running cluster (default: a new local one)"
    )
    for name, default in (("--num_gpus", 0), ("--num_cpus", 1)):
        what = "GPUs per point, with Ray (default: %(default)s)"
        parser.add_argument(name, type=real(0, 1_000_000), default=default, help=what)


def _schema() -> str:
    from s2d2_lmeval.studies.study import schema

    return json.dumps(schema(), ensure_ascii=False, indent=1)


def run(args: argparse.Namespace) -> int:
    """Plan, run, and report the outcome."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars; there is a table
    if args.plan:  # a plan is made of what is on this machine; these are read when the libraries are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    from rich.text import Text

    from s2d2_lmeval.cli.console import begin
    from s2d2_lmeval.cli.console.display import Display
    from s2d2_lmeval.harness.upstream import ADVICE, holds_token
    from s2d2_lmeval.studies.planning import Plan
    from s2d2_lmeval.studies.search import search
    from s2d2_lmeval.studies.study import read_study
    from s2d2_lmeval.studies.sweep import COMPLETE, FAILED, LocalBackend, RayBackend, Sweep
    from s2d2_lmeval.tasks.sandbox import modes

    modes.choose(args.sandbox)
    console = begin(args.threads)
    overrides: dict[str, Any] = {name: getattr(args, name) for name in ("limit", "batch_size", "repeats", "data_dir")}
    path = packaged.find(args.study)
    study = read_study(path, {**overrides, "models": [args.model] if args.model else None})
    study = study.part(args.task, args.decoder)
    if any(map(holds_token, study.models.values())):
        console.print(ADVICE, soft_wrap=True)
    folder = args.output or Path("out") / study.name
    # Code that the embedded model writes runs without confirmation, as everywhere.
    unsafe_code = args.confirm_run_unsafe_code or (packaged.is_packaged(path) and args.model is None)
    with console.status("reading tasks"):
        plan = Plan(study, folder, unsafe_code=unsafe_code, anew=args.anew, preview=args.plan)
    if args.plan:
        _show_plan(console, plan)
        return 0
    on_ray = {"address": args.ray_address, "num_gpus": args.num_gpus, "num_cpus": args.num_cpus}
    backend = RayBackend(**on_ray) if args.backend == "ray" else LocalBackend()
    sweep = Sweep(plan, backend, search)
    # A batch system's end is an interruption like any other.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Display(console, sweep):
            counts = sweep.run()
    except KeyboardInterrupt:
        console.print(f"interrupted; what was finished is in {folder}, and the same command resumes", markup=False)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        backend.close()
    for progress in sweep.points.values():
        if progress.unreadable:
            console.print(
                f"{progress.job.label}: {progress.unreadable} unreadable lines in {progress.job.path} were "
                "skipped, and their samples decoded again.",
                markup=False,
            )
        if progress.state == FAILED:
            console.print(Text.assemble(("failed ", "red"), f"{progress.job.label}: {progress.error}"))
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
