"""What Spiffy saves on the toy: ``python -m benchmarks.spiffy_savings`` prints the tables of docs/spiffy.md.

Graphs are calibrated on prompts of the training corpora and measured on held-out problems, which share no prompt with
them. Every line decodes the same problems, and is checked to write the same tokens as its base decoder.
``--make-default-graphs`` writes the graphs that come with the package instead.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console

from recipes.toy.problems import training_stream
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.spiffy.graph import DraftGraph, Pairs
from s2d2_lmeval.model import BlockDiffusionModel, load
from s2d2_lmeval.studies.calibrate import RankedStep, calibrate, trace
from s2d2_lmeval.toy import CORPORA, Problem, checkpoint_path, held_out

BLOCK_LENGTH, NEW_TOKENS = 16, 96
CALIBRATION_PROMPTS = {"static": 16, "dynamic": 120}
"""Of each corpus. The toy is so sure of itself that most of its blocks come out of one dynamic step, which is no state
to count; a model that works harder needs no more prompts for one decoder than for another.
"""
DEPTH = 6
DEFAULT_NODES = 16
BASES: dict[str, dict[str, Any]] = {"static": {}, "dynamic": {"confidence_threshold": 0.9}}
SHARED = {"block_length": BLOCK_LENGTH, "max_new_tokens": NEW_TOKENS}
DEFAULT_GRAPHS = checkpoint_path().parent / "draft_graphs"


@dataclass(frozen=True)
class Line:
    """A way of decoding, summed over problems: forwards as requests see them, steps, states drafted and accepted,
    queries of all forwards, those that steps without a cache would bring (the whole text up to the block's end), and
    prompt tokens taken from another prompt's keys.
    """

    name: str
    forwards: int
    steps: int
    drafted: int
    accepted: int
    queries: int
    uncached: int
    reused: int
    outputs: list[list[int]]

    @property
    def saved(self) -> float:
        """Share of the base decoder's steps that needed no forward."""
        return self.accepted / self.steps


def prompt_of(tokenizer: Any, problem: Problem) -> list[int]:
    """The problem as a chat message, as the tasks ask it."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def open_toy() -> tuple[BlockDiffusionModel, Any]:
    """The toy in float32, and its tokenizer."""
    import torch
    from transformers import PreTrainedTokenizerFast

    model = load("toy", dtype=torch.float32, device="cpu", max_batch=8)
    return model, PreTrainedTokenizerFast.from_pretrained(checkpoint_path())


def calibration_prompts(tokenizer: Any, base: str) -> list[list[int]]:
    """Prompts of all corpora in turn, none of them held out."""
    streams = [islice(training_stream(name, seed=7), CALIBRATION_PROMPTS[base]) for name in CORPORA]
    return [prompt_of(tokenizer, problem) for problems in zip(*streams, strict=True) for problem in problems]


def options_of(model: BlockDiffusionModel, tokenizer: Any, base: str, **more: Any) -> dict[str, Any]:
    """Options of ``base`` under spiffy."""
    stops = tuple(dict.fromkeys((*model.facts.stop_token_ids, tokenizer.eos_token_id)))
    return {"decoder": "spiffy", "base": base, "stop_token_ids": stops, **SHARED, **BASES[base], **more}


def calibrated(
    model: BlockDiffusionModel, tokenizer: Any, base: str, traces: Path, nodes: int, score: str = "own", **more: Any
) -> DraftGraph:
    """A graph from traces on the calibration prompts."""
    config = model.config(options_of(model, tokenizer, base, **more))
    prompts = calibration_prompts(tokenizer, base)
    return calibrate(model, config, prompts, nodes=nodes, depth=DEPTH, traces=traces, source="toy", score=score)


def random_graph(nodes: int, seed: int) -> DraftGraph:
    """A connected graph of random sets of up to :data:`DEPTH` of the first places, tokens among the two best."""
    rng = random.Random(seed)
    sets: list[Pairs] = []
    while len(sets) < nodes:
        below = rng.choice([pairs for pairs in ((), *sets) if len(pairs) < DEPTH])
        free = [place for place in range(BLOCK_LENGTH) if place not in dict(below)]
        pairs = tuple(sorted((*below, (rng.choice(free), rng.randrange(2)))))
        if pairs not in sets:
            sets.append(pairs)
    return DraftGraph.of(sets, BLOCK_LENGTH)


def measure(model: BlockDiffusionModel, name: str, options: Mapping[str, Any], prompts: Sequence[list[int]]) -> Line:
    """Decode ``prompts``."""
    model.trace.reset()
    answers = model.generate(prompts, options)
    totals = model.trace.totals()
    return Line(
        name=name,
        forwards=_sum(answers, "nfe"),
        steps=_sum(answers, "steps") or sum(len(answer.steps) for answer in answers),
        drafted=_sum(answers, "states_drafted"),
        accepted=_sum(answers, "states_accepted"),
        queries=int(totals["queries"]),
        uncached=sum(step.start + len(step.tokens) for answer in answers for step in answer.steps),
        reused=int(totals["reused_tokens"]),
        outputs=[answer.canvas for answer in answers],
    )


def _sum(answers: Iterable[Generation], name: str) -> int:
    return int(sum(answer.stats.get(name, 0) for answer in answers))


def with_graph(
    model: BlockDiffusionModel,
    name: str,
    options: Mapping[str, Any],
    graph: DraftGraph,
    prompts: Sequence[list[int]],
    nodes: int | None = None,
) -> Line:
    """Decode ``prompts`` by ``graph``: all of its nodes, or the best ``nodes`` at each time."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.json"
        # Measured for what it is: no warning that it was made for something else.
        replace(graph, model={}, decoding={}).save(path)
        return measure(
            model, name, {**options, "draft_graph": str(path), "draft_nodes": nodes or len(graph.nodes)}, prompts
        )


def check_same(base: Line, lines: Iterable[Line]) -> None:
    """Every line must have written what the base decoder did.

    Raises:
        AssertionError: naming the line that did not.
    """
    for line in lines:
        if line.outputs != base.outputs:
            raise AssertionError(f"{line.name} wrote something else than {base.name}.")


def by_graph(
    model: BlockDiffusionModel, tokenizer: Any, base: str, traces: Path, problems: int, nodes: Sequence[int]
) -> Iterator[str]:
    """Rows of the table: share of steps saved by each graph on each corpus."""
    options = options_of(model, tokenizer, base)
    plain = {**{name: value for name, value in options.items() if name != "base"}, "decoder": base}
    graphs: dict[str, DraftGraph] = {}
    for count in nodes:
        graphs[f"calibrated, {count} nodes"] = calibrated(model, tokenizer, base, traces, count)
        graphs[f"calibrated by the published score, {count} nodes"] = calibrated(
            model, tokenizer, base, traces, count, "parents"
        )
    graphs[f"chain of best tokens, {DEPTH} nodes"] = DraftGraph.chain(BLOCK_LENGTH, DEPTH)
    for seed in range(3):
        graphs[f"random {seed + 1}, {nodes[-1]} nodes"] = random_graph(nodes[-1], seed)
    prompts = {name: [prompt_of(tokenizer, one) for one in held_out(name)[:problems]] for name in CORPORA}
    bases = {name: measure(model, base, plain, asked) for name, asked in prompts.items()}
    yield f"| {base} itself | " + " | ".join(f"{line.forwards}" for line in bases.values()) + " | 1.00 |"
    widest = f"calibrated, {nodes[-1]} nodes"
    graphs[f"{widest}, the best {nodes[0]} at each time"] = graphs[widest]
    for title, graph in graphs.items():
        most = nodes[0] if title.endswith("at each time") else None
        lines = {name: with_graph(model, title, options, graph, asked, most) for name, asked in prompts.items()}
        for name, line in lines.items():
            check_same(bases[name], [line])
        cells = " | ".join(f"{line.forwards} ({line.saved:.0%})" for line in lines.values())
        ratio = np.sum([line.forwards for line in bases.values()]) / np.sum([line.forwards for line in lines.values()])
        yield f"| {title} | {cells} | {ratio:.2f} |"


def by_part(
    model: BlockDiffusionModel, tokenizer: Any, bases: Sequence[str], folder: Path, problems: int, nodes: int
) -> Iterator[str]:
    """Rows of the table: what threshold, schedule, prefix caching and drafts each add, all corpora together."""
    asked = [prompt_of(tokenizer, one) for name in CORPORA for one in held_out(name)[:problems]]
    first: Line | None = None
    for base in bases:
        graph = calibrated(model, tokenizer, base, folder / f"{base}.jsonl", nodes)
        for schedule in ("reference", "fused"):
            options = options_of(model, tokenizer, base, schedule=schedule)
            plain = {**{name: value for name, value in options.items() if name != "base"}, "decoder": base}
            alone = measure(model, f"{base}, {schedule}", plain, asked)
            drafted = with_graph(model, f"{base}, {schedule}, spiffy", options, graph, asked)
            check_same(alone, [drafted])
            first = first or alone
            for line in (alone, drafted):
                yield (
                    f"| {line.name} | {line.forwards} | {first.forwards / line.forwards:.2f} | "
                    f"{line.queries / line.forwards:.1f} | {line.uncached / line.steps:.1f} | {line.reused} |"
                )


def limits(
    model: BlockDiffusionModel, tokenizer: Any, bases: Iterable[str], folder: Path, problems: int
) -> Iterator[str]:
    """Rows of the table: what drafts of states could save at most, and how well their rank foretells a state."""
    asked = [prompt_of(tokenizer, one) for name in CORPORA for one in held_out(name)[:problems]]
    for base in bases:
        config = model.config(options_of(model, tokenizer, base))
        found: Counter[str] = Counter()
        for steps in trace(model, config, asked, folder / f"{base}.held_out.jsonl"):
            blocks = [list(of) for _, of in groupby(steps, key=lambda step: step.start)]
            for number, block in enumerate(blocks):
                found["steps"] += len(block)
                # A block's first forward leaves a distribution, from which the second drafts what the third would be
                # for; after the last comes the next block's first.
                found["savable"] += max(len(block) - 2 + (number + 1 < len(blocks)), 0) if len(block) > 1 else 0
                found += sum((_foretold(*pair) for pair in pairwise(block)), Counter())
        best, shares = found["steps"] - found["savable"], ("order", "tokens", "both")
        yield (
            f"| {base} | {found['steps']} | {found['savable']} | {found['steps'] / best:.2f} | "
            + " | ".join(f"{found[name] / found['next']:.0%}" for name in shares)
            + " |"
        )


def _foretold(before: RankedStep, after: RankedStep) -> Counter[str]:
    """Whether ``after`` decided the first places by the distribution ``before`` it, their best tokens, and both."""
    decided = [n for n, (old, new) in enumerate(zip(before.tokens, after.tokens, strict=True)) if old != new]
    order = {place: n for n, place in enumerate(before.places)}
    leading = sorted(order[place] for place in decided) == list(range(len(decided)))
    best = all(before.ranks[place][0] == after.tokens[place] for place in decided)
    return Counter(next=1, order=leading, tokens=best, both=leading and best)


def main() -> None:
    """Print the tables, or write the default graphs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=16, help="held-out problems of each corpus (default: 16)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 16], help="sizes of calibrated graphs")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES), help="decoders (default: all)")
    parser.add_argument("--traces", type=Path, help="folder that keeps the calibration traces")
    parser.add_argument("--make-default-graphs", action="store_true", help="write the graphs of the package")
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    model, tokenizer = open_toy()
    with TemporaryDirectory() as temporary:
        folder = args.traces or Path(temporary)
        if args.make_default_graphs:
            for base in BASES:
                graph = calibrated(model, tokenizer, base, folder / f"{base}.jsonl", DEFAULT_NODES)
                graph.save(DEFAULT_GRAPHS / f"{base}.json")
                console.print(f"{DEFAULT_GRAPHS / base}.json: {len(graph.nodes)} nodes", markup=False)
            return
        for base in args.bases:
            console.print(f"\n| {base} | {' | '.join(CORPORA)} | fewer |\n| :-- |{' --: |' * (len(CORPORA) + 1)}")
            for row in by_graph(model, tokenizer, base, folder / f"{base}.jsonl", args.problems, args.nodes):
                console.print(row, markup=False)
        console.print("\n| | forwards | savable | at most | order foretold | tokens foretold | both |")
        console.print(f"| :-- |{' --: |' * 6}")
        for row in limits(model, tokenizer, args.bases, folder, args.problems):
            console.print(row, markup=False)
        headings = ("forwards", "fewer", "queries per forward", "per step without a cache", "prompt tokens reused")
        console.print(f"\n| | {' | '.join(headings)} |\n| :-- |{' --: |' * len(headings)}")
        for row in by_part(model, tokenizer, args.bases, folder, args.problems, args.nodes[-1]):
            console.print(row, markup=False)


if __name__ == "__main__":
    main()
