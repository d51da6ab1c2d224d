"""The embedded toy model on its three tasks under lm-evaluation-harness, decoders side by side.

Everything runs through the harness like a real evaluation, on any machine and without the network. At the end it shows
the decoding order of one problem. `s2d2-lmeval sweep demo` evaluates the same configurations task by task, and
writes every answer to disk immediately; here all tasks are decoded together, and only decoding is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import add_shared, nonempty

if TYPE_CHECKING:
    from s2d2_lmeval.model import BlockDiffusionModel
    from s2d2_lmeval.studies.study import Study

SUMMARY = "three toy tasks, several decoders, one table; needs no network"

_TRACED = "s2d2 greedy"
WARM_UP_TOKENS = 16

Line = dict[str, Any]
Columns = dict[str, Callable[[Line], str]]

QUALITY: Columns = {
    "task": lambda row: row["task"].removeprefix("s2d2_toy_"),
    "decoder": lambda row: row["configuration"],
    "accuracy": lambda row: f"{row['accuracy']:.1%}",
    "forwards per answer": lambda row: f"{row['nfe']:.1f}",
    "tokens per forward": lambda row: f"{row['tokens_per_forward']:.2f}",
    "accepted": lambda row: "" if row["acceptance"] is None else f"{row['acceptance']:.0%}",
}


def speed_columns(first: str) -> Columns:
    """Columns of a table that compares everything with the configuration ``first``."""
    return {
        "decoder": lambda row: row["configuration"],
        "tokens per forward": lambda row: f"{row['tokens_per_forward']:.2f}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
        f"speed-up over {first}": lambda row: f"{row['speedup']:.2f}x",
        "seconds": lambda row: f"{row['seconds']:.1f}",
        f"answers as {first}": lambda row: f"{row['equal']} of {row['documents']}",
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model", type=nonempty, default="toy", metavar="PATH", help="checkpoint to use instead of the embedded one"
    )
    add_shared(parser, "--limit", "--rows")
    few = "torch's threads on a CPU (default: %(default)s; more do not help a model this small)"
    add_shared(parser, "--threads", default=1, help=few)
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the tables as files")


def run(args: argparse.Namespace) -> int:
    """Evaluate every configuration, then show and write the tables."""
    from s2d2_lmeval.cli.checkpoints import open_model
    from s2d2_lmeval.cli.console import begin

    console = begin(args.threads)
    study = packaged_study("demo")
    engine, tokenizer, _ = open_model(args.model, {"max_batch": args.rows})
    # So that the first one measured does not pay for what all use.
    prompt = list(tokenizer("Question:")["input_ids"])
    for options in study.decoding.values():
        engine.generate([prompt] * engine.max_batch, {**options, "max_new_tokens": WARM_UP_TOKENS})
    started = time.perf_counter()
    rows, speeds, environment = evaluations(console, study.decoding, args)
    by_task = [row for task in toy_tasks() for row in rows if row["task"] == task]
    tables = [
        ("Answers of each decoder", QUALITY, by_task, 2),
        ("Speed, all tasks together", speed_columns(speeds[0]["configuration"]), speeds, 1),
    ]
    content = {"configurations": study.decoding, "tasks": rows, "speed": speeds, "environment": environment}
    show_and_write(console, args, "Demo: the embedded toy model", tables, content, started)
    console.print()
    _trace(console, engine, tokenizer, study.decoding[_TRACED])
    return 0


def packaged_study(name: str) -> Study:
    """A packaged study."""
    from s2d2_lmeval.studies import packaged
    from s2d2_lmeval.studies.study import read_study

    return read_study(packaged.find(name))


def toy_tasks() -> list[str]:
    """The tasks of the embedded model."""
    return [task.task for task in packaged_study("demo").tasks]


def evaluations(
    console: Any, configurations: Mapping[str, Mapping[str, Any]], args: argparse.Namespace
) -> tuple[list[Line], list[Line], dict[str, Any]]:
    """One line per configuration and task, one per configuration over all tasks, and the environment."""
    tasks, expected = toy_tasks(), None
    rows: list[Line] = []
    lines: list[Line] = []
    for number, (name, options) in enumerate(configurations.items(), 1):
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        console.print(f"[bold]{number}/{len(configurations)} {name}[/bold]  --model s2d2 --model_args {given}")
        results = evaluate(args.model, options, tasks, limit=args.limit, rows=args.rows)
        rows += [of_task(name, task, results) for task in tasks]
        answers = [text for task in tasks for text in texts(results["samples"][task])]
        expected = expected or answers
        equal = sum(map(str.__eq__, answers, expected))
        line = together(name, results["config"]["s2d2"]["totals"], lines[0] if lines else None)
        accuracy = sum(row["accuracy"] for row in rows[-len(tasks) :]) / len(tasks)
        lines.append({**line, "accuracy": accuracy, "equal": equal, "documents": len(expected)})
    return rows, lines, dict(results["config"]["s2d2"]["environment"])


def evaluate(model: str, options: Mapping[str, Any], tasks: Sequence[str], *, limit: int, rows: int) -> dict[str, Any]:
    """The harness's results of one configuration on ``tasks``; `lm_eval --model s2d2 …` in Python."""
    import logging

    from lm_eval import simple_evaluate

    from s2d2_lmeval.studies.tasks import task_manager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("lm_eval.s2d2").setLevel(logging.WARNING)
    results = simple_evaluate(
        model="s2d2",
        model_args={"pretrained": model, **options},
        tasks=list(tasks),
        task_manager=task_manager(None, (), tasks),
        batch_size=rows,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=True,
    )
    assert results is not None
    return dict(results)


def texts(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answer to each document; the harness lists a document once per filter."""
    return list({sample["doc_id"]: sample["resps"][0][0] for sample in samples}.values())


def of_task(name: str, task: str, results: Mapping[str, Any]) -> Line:
    """A configuration on a task: means per document, tokens over forwards, and acceptance (None without a verifier)."""
    stats = results["config"]["s2d2"]["tasks"][task]
    requests = int(stats["requests"])
    return {
        "configuration": name,
        "task": task,
        "documents": requests,
        "accuracy": results["results"][task]["accuracy,none"],
        **{count: stats[count] / requests for count in ("nfe", "new_tokens")},
        "tokens_per_forward": stats["tokens_per_forward"],
        "acceptance": stats.get("acceptance"),
    }


def together(name: str, totals: Mapping[str, float], first: Line | None = None) -> Line:
    """A configuration on all tasks, from a run's totals; ``speedup`` is over the line ``first``.

    ``acceptance_length``: tokens per round with a draft, including the target's own (None without drafts, when every
    forward is the target's); ``without_bonus``: only the accepted drafts; milliseconds are per forward of all rows.
    """
    rate, drafts = totals["tokens_per_second"], totals.get("drafter_forwards", 0)
    targets, steps = totals.get("target_forwards", totals["nfe"]), totals.get("target_steps", totals["forwards"])
    base = first["tokens_per_second"] if first else rate
    return {
        "configuration": name,
        "tokens_per_second": rate,
        "speedup": rate / base if base else 0.0,
        "tokens_per_forward": totals["tokens_per_forward"],
        "seconds": totals["seconds"],
        "tokens_per_target_forward": totals["new_tokens"] / targets,
        "acceptance_length": totals.get("acceptance_length"),
        "without_bonus": totals.get("acceptance_length_without_bonus"),
        "target_milliseconds": 1000 * totals.get("target_seconds", totals["seconds"]) / steps,
        "drafter_milliseconds": 1000 * totals["drafter_seconds"] / totals["drafter_steps"] if drafts else None,
    }


def show_and_write(
    console: Any,
    args: argparse.Namespace,
    title: str,
    tables: Sequence[tuple[str, Columns, Sequence[Line], int]],
    content: Mapping[str, Any],
    begun: float,
) -> None:
    """Show tables (title, columns, lines, number of text columns), and write results.md and results.json."""
    from s2d2_lmeval.cli.console import table
    from s2d2_lmeval.studies.report.tables import cells, in_markdown

    parts = [f"# {title}"]
    console.print()
    for name, columns, entries, words in tables:
        header, lines = cells(columns, entries)
        console.print(table(header, lines, title=name, texts=range(words), sections=words > 1))
        parts.append(in_markdown(header, lines, words))
    parts.append("\n".join(f"- {name}: {value}" for name, value in content["environment"].items()))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (args.output / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"{args.limit} documents per task, {args.rows} requests in flight, {time.perf_counter() - begun:.0f} s in "
        f"all. Written to {args.output}/results.md and {args.output}/results.json."
    )


def _trace(console: Any, engine: BlockDiffusionModel, tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Decode one problem again, and draw it."""
    from s2d2_lmeval.cli.console import printable
    from s2d2_lmeval.cli.generate import Answer
    from s2d2_lmeval.toy import held_out

    prompt = held_out("arithmetic")[0].prompt
    config = engine.config({**options, "max_new_tokens": 64})
    answer = Answer(engine, tokenizer, config, list(tokenizer(prompt)["input_ids"]))
    console.print(f"[bold]One problem, decoded by {_TRACED}[/bold]")
    console.print(prompt, markup=False, style="dim")
    console.print(printable(answer.text.strip("\n")), markup=False)
    new, forwards = (int(answer.generation.stats[name]) for name in ("new_tokens", "nfe"))
    console.print(f"[dim]{new} tokens in {forwards} forwards; one line per forward, one cell per token")
    console.print()
    answer.draw(console)
