"""The embedded toy model on its three tasks under lm-evaluation-harness, decoders side by side.

Everything runs through the harness as a real evaluation does, on any machine and without the network. The last thing
shown is the decoding order of one problem. `s2d2-lmeval sweep demo` evaluates the same configurations task by task, and
writes every answer to disk at once; here all tasks are decoded together, and the time is that of decoding alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import nonempty, whole

if TYPE_CHECKING:
    from rich.table import Table

    from s2d2_lmeval.model import BlockDiffusionModel
    from s2d2_lmeval.studies.study import Study

SUMMARY = "three toy tasks, several decoders, one table; needs no network"

_TRACED = "s2d2 greedy"
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """One configuration on one task.

    ``nfe`` is the mean number of forwards per document, ``tokens_per_forward`` all new tokens over all forwards,
    ``acceptance`` the share of drafted tokens that the verifier accepted (None without a verifier).
    """

    configuration: str
    task: str
    documents: int
    accuracy: float
    nfe: float
    new_tokens: float
    tokens_per_forward: float
    acceptance: float | None


@dataclass(frozen=True)
class Speed:
    """One configuration on all tasks together; ``speedup`` is tokens per second over those of the first
    configuration, ``equal`` the number of ``documents`` answered with the very text of the first.
    """

    configuration: str
    tokens_per_second: float
    speedup: float
    tokens_per_forward: float
    seconds: float
    equal: int
    documents: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model", type=nonempty, default="toy", metavar="PATH", help="another checkpoint than the embedded one"
    )
    parser.add_argument("--limit", type=whole(), default=100, help="documents per task (default: %(default)s)")
    parser.add_argument("--rows", type=whole(), default=8, help="requests in flight (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=whole(),
        default=1,
        help="torch's threads on a CPU (default: %(default)s; a model this small gains nothing from more)",
    )
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the tables as files")


def run(args: argparse.Namespace) -> int:
    """Evaluate every configuration, then show and write the tables."""
    import torch

    from s2d2_lmeval.cli.checkpoints import open_model
    from s2d2_lmeval.cli.console import hide_loading_bars, make_console
    from s2d2_lmeval.studies.report.tables import in_markdown

    console = make_console()
    hide_loading_bars()
    torch.set_num_threads(args.threads)
    study = packaged_study("demo")
    engine, tokenizer, _ = open_model(args.model, {"max_batch": args.rows})
    warm_up(engine, tokenizer, study.decoding.values())
    rows: list[Row] = []
    totals: dict[str, Mapping[str, float]] = {}
    answers: dict[str, list[str]] = {}
    environment: Mapping[str, Any] = {}
    started = time.perf_counter()
    for name, results, answers[name] in evaluations(console, study.decoding, args):
        about = results["config"]["s2d2"]
        totals[name], environment = about["totals"], about["environment"]
        rows += [_row(name, task, results) for task in toy_tasks()]
    speeds = compare(totals, answers)
    quality, speed = quality_cells(rows), speed_cells(speeds)
    console.print()
    console.print(framed("What the decoders answer", *quality, texts=2, sections=True))
    console.print(framed("How fast, all tasks together", *speed, texts=1))
    everything = {
        "configurations": dict(study.decoding),
        "tasks": [asdict(row) for row in rows],
        "speed": [asdict(speed) for speed in speeds],
        "environment": dict(environment),
    }
    tables = [in_markdown(*quality, texts=2), in_markdown(*speed)]
    write(console, args, "Demo: the embedded toy model", tables, everything, started)
    console.print()
    _trace(console, engine, tokenizer, study.decoding[_TRACED])
    return 0


def packaged_study(name: str) -> Study:
    """A study that comes with the package."""
    from s2d2_lmeval.studies import packaged
    from s2d2_lmeval.studies.study import read_study

    return read_study(packaged.find(name))


def toy_tasks() -> list[str]:
    """The tasks of the embedded model."""
    return [task.task for task in packaged_study("demo").tasks]


def warm_up(engine: BlockDiffusionModel, tokenizer: Any, configurations: Iterable[Mapping[str, Any]]) -> None:
    """Decode a little with every configuration, so that the first one measured does not pay for what all use."""
    prompt = list(tokenizer("Question:")["input_ids"])
    for options in configurations:
        engine.generate([prompt] * engine.max_batch, {**options, "max_new_tokens": WARM_UP_TOKENS})


def evaluations(
    console: Any, configurations: Mapping[str, Mapping[str, Any]], args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Of every configuration its name, the harness's results on the toy's tasks, and all answers."""
    tasks = toy_tasks()
    for number, (name, options) in enumerate(configurations.items(), 1):
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        console.print(f"[bold]{number}/{len(configurations)} {name}[/bold]  --model s2d2 --model_args {given}")
        results = evaluate(args.model, options, tasks, limit=args.limit, rows=args.rows)
        yield name, results, [text for task in tasks for text in texts(results["samples"][task])]


def evaluate(model: str, options: Mapping[str, Any], tasks: Sequence[str], *, limit: int, rows: int) -> dict[str, Any]:
    """The harness's results of one configuration on ``tasks``; `lm_eval --model s2d2 …` in Python."""
    import logging

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from s2d2_lmeval.harness.packaged import include_path, register

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("lm_eval.s2d2").setLevel(logging.WARNING)
    register()
    results = simple_evaluate(
        model="s2d2",
        model_args={"pretrained": model, **options},
        tasks=list(tasks),
        task_manager=TaskManager(
            include_path=str(include_path()),
            # Reading the harness's own tasks takes seconds.
            include_defaults=not all(name.startswith("s2d2_") for name in tasks),
        ),
        batch_size=rows,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=True,
    )
    assert results is not None
    return dict(results)


def texts(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was answered to each document; the harness lists a document once per filter."""
    return list({sample["doc_id"]: sample["resps"][0][0] for sample in samples}.values())


def _row(name: str, task: str, results: Mapping[str, Any]) -> Row:
    scores, stats = results["results"][task], results["config"]["s2d2"]["tasks"][task]
    requests = int(stats["requests"])
    return Row(
        configuration=name,
        task=task,
        documents=requests,
        accuracy=scores["accuracy,none"],
        nfe=stats["nfe"] / requests,
        new_tokens=stats["new_tokens"] / requests,
        tokens_per_forward=stats["tokens_per_forward"],
        acceptance=stats.get("acceptance"),
    )


def compare(totals: Mapping[str, Mapping[str, float]], answers: Mapping[str, Sequence[str]]) -> list[Speed]:
    """Speeds and answers of all configurations, relative to the first."""
    base = next(iter(totals.values()))["tokens_per_second"]
    expected = next(iter(answers.values()))
    return [
        Speed(
            configuration=name,
            tokens_per_second=sums["tokens_per_second"],
            speedup=sums["tokens_per_second"] / base if base else 0.0,
            tokens_per_forward=sums["tokens_per_forward"],
            seconds=sums["seconds"],
            equal=sum(one == other for one, other in zip(answers[name], expected, strict=True)),
            documents=len(expected),
        )
        for name, sums in totals.items()
    ]


def quality_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a line per configuration and task."""
    header = ["task", "decoder", "accuracy", "forwards per answer", "tokens per forward", "accepted"]
    cells = []
    for task in dict.fromkeys(row.task for row in rows):
        for row in rows:
            if row.task == task:
                accepted = "" if row.acceptance is None else f"{row.acceptance:.0%}"
                cells.append(
                    [
                        *(row.task.removeprefix("s2d2_toy_"), row.configuration, f"{row.accuracy:.1%}"),
                        *(f"{row.nfe:.1f}", f"{row.tokens_per_forward:.2f}", accepted),
                    ]
                )
    return header, cells


def speed_cells(speeds: Sequence[Speed]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a line per configuration, all tasks together."""
    first = speeds[0].configuration
    header = ["decoder", "tokens per forward", "tokens/s", f"speed-up over {first}", "seconds", f"answers as {first}"]
    return header, [
        [
            *(speed.configuration, f"{speed.tokens_per_forward:.2f}", f"{speed.tokens_per_second:.0f}"),
            *(f"{speed.speedup:.2f}x", f"{speed.seconds:.1f}", f"{speed.equal} of {speed.documents}"),
        ]
        for speed in speeds
    ]


def framed(
    title: str, header: Sequence[str], cells: Sequence[Sequence[str]], *, texts: int, sections: bool = False
) -> Table:
    """A table for the terminal; the first ``texts`` columns hold text, the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column < texts else "right")
    for index, line in enumerate(cells):
        last = sections and index + 1 < len(cells) and cells[index + 1][0] != line[0]
        repeated = sections and index > 0 and cells[index - 1][0] == line[0]
        table.add_row(*(["", *line[1:]] if repeated else line), end_section=last)
    return table


def write(
    console: Any, args: argparse.Namespace, title: str, tables: Sequence[str], content: Mapping[str, Any], begun: float
) -> None:
    """Leave results.md and results.json in the folder of results, and say so."""
    args.output.mkdir(parents=True, exist_ok=True)
    about = "\n".join(f"- {name}: {value}" for name, value in content["environment"].items())
    (args.output / "results.md").write_text("\n\n".join([f"# {title}", *tables, about]) + "\n", encoding="utf-8")
    (args.output / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"{args.limit} documents per task, {args.rows} requests in flight, {time.perf_counter() - begun:.0f} s in "
        f"all. Written to {args.output}/results.md and {args.output}/results.json."
    )


def _trace(console: Any, engine: BlockDiffusionModel, tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Decode one problem once more, and draw it."""
    from s2d2_lmeval.cli.console import printable
    from s2d2_lmeval.cli.generate import draw
    from s2d2_lmeval.toy import held_out

    problem = held_out("arithmetic")[0]
    prompt = list(tokenizer(problem.prompt)["input_ids"])
    config = engine.config({**options, "max_new_tokens": 64})
    generation = engine.generate([prompt], config)[0]
    console.print(f"[bold]One problem, decoded by {_TRACED}[/bold]")
    console.print(problem.prompt, markup=False, style="dim")
    console.print(printable(tokenizer.decode(generation.token_ids, skip_special_tokens=True).strip("\n")), markup=False)
    stats = generation.stats
    console.print(
        f"[dim]{int(stats['new_tokens'])} tokens in {int(stats['nfe'])} forwards; a line per forward, a cell per token"
    )
    console.print()
    draw(console, generation, tokenizer, engine, config, len(prompt))
