"""The embedded toy model on its three tasks under lm-evaluation-harness, decoders side by side.

Everything runs through the harness as a real evaluation does, on any machine and without the network. The last thing
shown is the decoding order of one problem.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import nonempty, whole

if TYPE_CHECKING:
    from rich.table import Table

    from s2d2_lmeval.model import BlockDiffusionModel

SUMMARY = "three toy tasks, several decoders, one table; needs no network"

TASKS = ("s2d2_toy_arithmetic", "s2d2_toy_programs", "s2d2_toy_instructions")
BLOCK_LENGTH = 16
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ar": {"decoder": "ar"},
    "sliding": {"decoder": "sliding"},
    "sliding auto": {"decoder": "sliding", "row_budget": "auto"},
    "dynamic": {"decoder": "dynamic", "block_length": BLOCK_LENGTH, "confidence_threshold": 0.9},
    "s2d2": {"decoder": "s2d2", "block_length": BLOCK_LENGTH},
    "s2d2 greedy": {"decoder": "s2d2", "block_length": BLOCK_LENGTH, "acceptance": "greedy"},
    "s2d2 lookahead": {"decoder": "s2d2", "block_length": BLOCK_LENGTH, "schedule": "lookahead"},
}
"""Name in the table -> ``--model_args``. The first one is what speed and answers are compared with."""

_TRACED = "s2d2 greedy"


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

    console = make_console()
    hide_loading_bars()
    torch.set_num_threads(args.threads)
    engine, tokenizer, _ = open_model(args.model, {"max_batch": args.rows})
    warm_up(engine, tokenizer)
    rows: list[Row] = []
    totals: dict[str, Mapping[str, float]] = {}
    answers: dict[str, list[str]] = {}
    environment: Mapping[str, Any] = {}
    started = time.perf_counter()
    for number, (name, options) in enumerate(CONFIGURATIONS.items(), 1):
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        console.print(f"[bold]{number}/{len(CONFIGURATIONS)} {name}[/bold]  --model s2d2 --model_args {given}")
        results = evaluate(args.model, options, TASKS, limit=args.limit, rows=args.rows)
        about = results["config"]["s2d2"]
        totals[name], environment = about["totals"], about["environment"]
        answers[name] = [text for task in TASKS for text in texts(results["samples"][task])]
        rows += [_row(name, task, results) for task in TASKS]
    speeds = compare(totals, answers)
    console.print()
    console.print(quality_table(rows))
    console.print(speed_table(speeds))
    _write(args.output, rows, speeds, environment)
    console.print(
        f"{args.limit} documents per task, {args.rows} requests in flight, {time.perf_counter() - started:.0f} s in "
        f"all. Written to {args.output}/results.md and {args.output}/results.json."
    )
    console.print()
    _trace(console, engine, tokenizer)
    return 0


def warm_up(engine: BlockDiffusionModel, tokenizer: Any) -> None:
    """Decode a little with every configuration, so that the first one measured does not pay for what all use."""
    prompt = list(tokenizer("Question:")["input_ids"])
    for options in CONFIGURATIONS.values():
        engine.generate([prompt] * engine.max_batch, {**options, "max_new_tokens": BLOCK_LENGTH})


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


def quality_table(rows: Sequence[Row]) -> Table:
    """For the terminal; a rule between tasks."""
    header, cells = quality_cells(rows)
    return framed("What the decoders answer", header, cells, texts=2, sections=True)


def speed_table(speeds: Sequence[Speed]) -> Table:
    """For the terminal."""
    header, cells = speed_cells(speeds)
    return framed("How fast, all tasks together", header, cells, texts=1)


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


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]], texts: int) -> str:
    """The same as a Markdown table."""
    rule = [":--" if column < texts else "--:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))


def _write(folder: Path, rows: Sequence[Row], speeds: Sequence[Speed], environment: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Demo: the embedded toy model",
        markdown(*quality_cells(rows), texts=2),
        markdown(*speed_cells(speeds), texts=1),
        "\n".join(f"- {name}: {value}" for name, value in environment.items()),
    ]
    (folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    everything = {
        "configurations": CONFIGURATIONS,
        "tasks": [asdict(row) for row in rows],
        "speed": [asdict(speed) for speed in speeds],
        "environment": dict(environment),
    }
    (folder / "results.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def _trace(console: Any, engine: BlockDiffusionModel, tokenizer: Any) -> None:
    """Decode one problem once more, and draw it."""
    from s2d2_lmeval.cli.console import printable
    from s2d2_lmeval.cli.generate import draw
    from s2d2_lmeval.toy import held_out

    problem = held_out("arithmetic")[0]
    prompt = list(tokenizer(problem.prompt)["input_ids"])
    config = engine.config({**CONFIGURATIONS[_TRACED], "max_new_tokens": 64})
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
