"""Calibrate a draft graph for the decoder `spiffy`: trace its base decoder on some prompts, count, choose.

20 to 50 prompts are enough, from any text similar to the task. The graph is for one model and one decoding setting:
pass the options that you will decode with.

examples:
  s2d2-lmeval calibrate --model_args pretrained=toy,base=static,block_length=8 --tasks s2d2_toy_arithmetic \\
      --nodes 8 --depth 4 --output graph.json
  s2d2-lmeval eval --model_args pretrained=toy,decoder=spiffy,base=static,block_length=8,draft_graph=graph.json \\
      --tasks s2d2_toy_programs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from s2d2_lmeval.cli.values import add_shared, nonempty, parse_options
from s2d2_lmeval.errors import ConfigError, shown

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree

    from s2d2_lmeval.decoding.spiffy.graph import DraftGraph

SUMMARY = "calibrate a draft graph for spiffy, from traces of its base decoder"

_ORDINALS = ("best", "2nd", "3rd", "4th")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    model_args = "pretrained=… and the decoding options, as for eval; base=… names the decoder to accelerate"
    parser.add_argument("--model_args", type=nonempty, required=True, metavar="NAME=VALUE,…", help=model_args)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--tasks", metavar="LIST", help="take prompts of these tasks of the harness, in equal parts")
    file = 'a text file with one prompt per line, or .jsonl with "prompt"'
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help=file)
    for name, default, letter, what in (
        ("--limit", 48, "N", "prompts"), ("--nodes", 16, "D", "nodes of the graph"), ("--depth", 4, "N", "steps ahead")
    ):  # fmt: skip
        parser.add_argument(name, type=int, default=default, metavar=letter, help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--score",
        choices=("own", "parents"),
        default="own",
        help="how to rank states: by their own count, or by that plus their direct parents', as published "
        "(default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=Path("draft_graph.json"), help="default: %(default)s")
    traces = "keeps the traces, to resume from (default: OUTPUT.traces.jsonl)"
    parser.add_argument("--traces", type=Path, metavar="FILE", help=traces)
    add_shared(parser, "--chat", help="put prompts into the chat template (default: if the tokenizer has one)")


def run(args: argparse.Namespace) -> int:
    """Load, trace, count, choose, show, save."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from s2d2_lmeval.cli.checkpoints import encode, open_model
    from s2d2_lmeval.cli.console import begin
    from s2d2_lmeval.cli.prompts import read_prompts, task_prompts
    from s2d2_lmeval.prompts import with_stops
    from s2d2_lmeval.studies.calibrate import calibrate

    for given, high in (("nodes", 4096), ("depth", 64), ("limit", 1_000_000)):
        if not 1 <= (value := getattr(args, given)) <= high:
            raise ConfigError(f"--{given} {shown(value)} is not from 1 to {high}.")
    console = begin()
    options = {"decoder": "spiffy", "max_batch": 8, **parse_options(args.model_args.split(","))}
    source = options.pop("pretrained", None)
    if source is None:
        raise ConfigError("--model_args names no checkpoint; write pretrained=….")
    texts = read_prompts(args.prompts, args.limit) if args.prompts else task_prompts(args.tasks, args.limit)
    model, tokenizer, decoding = open_model(str(source), options)
    config = with_stops(model.config(decoding), decoding, tokenizer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"tracing {config.base}", total=len(texts))
        graph = calibrate(
            model,
            config,
            [encode(tokenizer, text, chat=args.chat) for text in texts],
            nodes=args.nodes,
            depth=args.depth,
            traces=args.traces or args.output.with_name(args.output.name + ".traces.jsonl"),
            source=str(source),
            score=args.score,
            on_traced=lambda: progress.advance(bar),
        )
    if not graph.nodes:
        raise ConfigError("Every block was finished in one step, so there are no states to draft. Nothing was written.")
    graph.save(args.output)
    for part in show(graph):
        console.print(part)
    console.print(f"written to {args.output}; use it with decoder=spiffy,base={config.base},draft_graph={args.output}")
    return 0


def show(graph: DraftGraph) -> list[RenderableType]:
    """A table of the nodes and a picture of the graph."""
    from s2d2_lmeval.cli.console import table

    about = graph.calibration
    saved, states = 0, int(about.get("states", 0))
    header = ["node", "places decided", "from", "came true", "of", "rate", "saved per step so far"]
    lines = []
    for number, node in enumerate(graph.nodes, 1):
        saved += node.count
        origin = ", ".join("now" if parent == 0 else str(parent) for parent in node.parents)
        rates = [f"{node.count / max(node.chances, 1):.0%}", f"{saved / max(states, 1):.2f}"]
        lines.append([str(number), _name(node.pairs), origin, str(node.count), str(node.chances), *rates])
    facts = f"{about.get('prompts', '?')} prompts, {states} states of blocks of {graph.block_length}"
    return [table(header, lines, texts=(1, 2), title="Draft graph"), picture(graph), facts]


def picture(graph: DraftGraph) -> Tree:
    """The graph as a tree: every node below the parent that it most often follows, with a bar for its hit rate."""
    from rich.tree import Tree

    root = Tree("[bold]now[/]")
    branches: dict[int, Tree] = {0: root}
    # Parents have fewer pairs.
    for number, node in sorted(enumerate(graph.nodes, 1), key=lambda item: len(item[1].pairs)):
        drawn = max(node.parents, key=lambda parent: (len(graph.nodes[parent - 1].pairs) if parent else 0, -parent))
        others = [parent for parent in node.parents if parent != drawn]
        rate = node.count / max(node.chances, 1)
        before = dict(graph.nodes[drawn - 1].pairs) if drawn else {}
        added = tuple(pair for pair in node.pairs if pair[0] not in before)
        also = f" [dim](also from {', '.join('now' if n == 0 else str(n) for n in others)})[/]" if others else ""
        label = f"{number}  {_name(added)}  [cyan]{'▇' * max(round(12 * rate), 1)}[/] {rate:.0%}{also}"
        branches[number] = branches[drawn].add(label)
    return root


def _name(pairs: tuple[tuple[int, int], ...]) -> str:
    """Positions by rank of confidence from 1, with the rank of the token if it is not the best."""
    return " ".join(
        f"{place + 1}" + (f"({_ORDINALS[token] if token < 4 else f'{token + 1}th'})" if token else "")
        for place, token in pairs
    )
