"""Calibrating a draft graph: which states of a block follow which, counted in traces of the base decoder.

1. trace   decode prompts with the base decoder, and log each state with the ranks of places and tokens by the
           distribution that led to it
2. count   from every state on, what the next 1, 2, …, ``depth`` steps decided, as sets of (position rank, vocabulary
           rank)
3. choose  nodes one by one: the highest score among those that the current state or a chosen node leads to (Spiffy,
           arXiv 2509.18085, Algorithm 2)

Traces go to a file as prompts finish, so an interrupted run resumes, and other graphs reuse the same traces.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from s2d2_lmeval.decoding.decoder import Decoder
from s2d2_lmeval.decoding.engine import Engine
from s2d2_lmeval.decoding.generation import Generation, Step
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.spiffy.decoder import EditingSpiffy, Spiffy, SubblockSpiffy
from s2d2_lmeval.decoding.spiffy.graph import ROOT, DraftGraph, Node, Pairs, signature
from s2d2_lmeval.decoding.steps import StepTables
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.families import Facts
from s2d2_lmeval.model import BlockDiffusionModel

VOCABULARY_RANKS = 4
"""Tokens logged per place: drafts beyond the fourth-best token are hardly ever reached."""


@dataclass(frozen=True)
class RankedStep(Step):
    """A step with what its distribution says about the next: ``places`` (B) of the block, the one that would be
    decided first to begin with, and the best ``ranks`` (B, :data:`VOCABULARY_RANKS`) of each place.
    """

    places: list[int] = field(default_factory=list)
    ranks: list[list[int]] = field(default_factory=list)


class _Logging(Spiffy):
    """Drafts nothing, so every step is a forward of the base decoder; logs the ranks of each step."""

    least_ranks = VOCABULARY_RANKS

    @classmethod
    def graph_of(cls, config: DecodingConfig, facts: Facts) -> DraftGraph:
        return DraftGraph((), config.block_length)

    def settle(self, table: np.ndarray | None) -> np.ndarray:
        self._first_places, self._best = self.tables.places.cpu().numpy(), self.tables.tokens.cpu().numpy()
        return super().settle(table)

    def _record(self, slots: np.ndarray, step: StepTables[np.ndarray], kind: str) -> None:
        super()._record(slots, step, kind)
        for slot in slots.tolist():
            steps = self.rows.progress[slot].steps
            places, ranks = self._first_places[slot].tolist(), self._best[slot].tolist()
            steps[-1] = RankedStep(**vars(steps[-1]), places=places, ranks=ranks)


class _LoggingEdits(EditingSpiffy, _Logging):
    """The same for decoders that edit decided tokens."""


class _LoggingSubblocks(SubblockSpiffy, _Logging):
    """The same for sub-blocks."""


class _LoggingEngine(Engine):
    def decoder_class(self) -> type[Decoder[Any]]:
        return {"block": _Logging, "editing": _LoggingEdits, "subblock": _LoggingSubblocks}[self.facts.scheme]


class _LoggingModel(BlockDiffusionModel):
    engine_class = _LoggingEngine


class TraceFile:
    """A file of traces, one prompt per line, after a line that describes what was traced.

    Raises:
        ConfigError: for a file of another model, decoder or set of options.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self.path = path
        self.traces: dict[str, list[RankedStep]] = {}
        heading = json.dumps(subject, sort_keys=True)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(heading + "\n")
        first, *lines = path.read_text().splitlines(keepends=True) or [""]
        if first.strip() != heading:
            raise ConfigError(
                f"{path} holds traces of another model or decoder. Give another --traces file, or remove this one."
            )
        if lines and not lines[-1].endswith("\n"):  # the previous run was interrupted while writing
            lines = lines[:-1]
            path.write_text("".join([first, *lines]))
        for line in lines:
            entry = json.loads(line)
            self.traces[entry["prompt"]] = [RankedStep(**step) for step in entry["steps"]]

    def add(self, name: str, steps: Iterable[Step]) -> None:
        """Take the trace of the prompt ``name``."""
        self.traces[name] = [step for step in steps if isinstance(step, RankedStep)]
        with self.path.open("a") as file:
            file.write(json.dumps({"prompt": name, "steps": [asdict(step) for step in self.traces[name]]}) + "\n")


def trace(
    model: BlockDiffusionModel,
    config: DecodingConfig,
    prompts: Sequence[Sequence[int]],
    path: Path,
    on_traced: Callable[[], None] = lambda: None,
) -> list[list[RankedStep]]:
    """Traces of the base decoder on ``prompts``; those already in ``path`` are not run again.

    Args:
        config: of the decoder ``spiffy``, whose base decoder is traced.
        on_traced: called for each prompt as it finishes.
    """
    if config.decoder != "spiffy":
        raise ConfigError(
            f"decoder={config.decoder}: calibrate with decoder=spiffy and base={config.decoder}, which traces "
            f"{config.decoder} itself."
        )
    about, decoding = signature(config, model.facts)
    run = {"block_length": config.block_length, "seed": config.seed, "tokens": config.max_new_tokens}
    file = TraceFile(path, {**about, **decoding, **run})
    names = [hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=12).hexdigest() for ids in prompts]
    missing = [n for n, name in enumerate(names) if name not in file.traces]

    def finished(index: int, answer: Generation) -> None:
        file.add(names[missing[index]], answer.steps)
        on_traced()

    for _ in range(len(names) - len(missing)):
        on_traced()
    if missing:
        logging = _LoggingModel(
            model.hf_model,
            model.facts,
            attention=model.attention,
            fused=model.fused,
            max_batch=model.max_batch,
            max_context=model.max_context,
        )
        # Nothing is drafted, so no costs are needed.
        options = config.replace(draft_nodes=0)
        logging.generate([prompts[n] for n in missing], options, seeds=missing, on_finished=finished)
    return [file.traces[name] for name in names]


@dataclass
class Counts:
    """What followed the states of traces.

    ``states`` how often each set of pairs was reached, ``parents`` from which sets (the empty one is the current state)
    how often, ``anchors`` how many states had so many masks.
    """

    states: Counter[Pairs]
    parents: defaultdict[Pairs, Counter[Pairs]]
    anchors: Counter[int]

    def chances(self, pairs: Pairs) -> int:
        """States from which ``pairs`` could have been reached."""
        reach = pairs[-1][0] + 1
        return sum(count for masks, count in self.anchors.items() if masks >= reach)


def count(traces: Iterable[Sequence[RankedStep]], depth: int, mask_token_id: int) -> Counts:
    """Count the states up to ``depth`` steps ahead of every state that a block went through."""
    counts = Counts(Counter(), defaultdict(Counter), Counter())
    for steps in traces:
        for number, anchor in enumerate(steps):
            masks = anchor.tokens.count(mask_token_id)
            if not masks:
                continue
            counts.anchors[masks] += 1
            before: Pairs = ()
            for pairs in _followers(anchor, steps[number + 1 : number + 1 + depth], mask_token_id):
                counts.states[pairs] += 1
                counts.parents[pairs][before] += 1
                before = pairs
    return counts


def _followers(anchor: RankedStep, following: Sequence[RankedStep], mask: int) -> Iterator[Pairs]:
    """What was decided since ``anchor`` after each of the steps ``following`` in its block, as long as it has a
    name.
    """
    rank = {place: n for n, place in enumerate(anchor.places)}
    for step in following:
        if step.start != anchor.start:
            return
        pairs = []
        for place, (old, new) in enumerate(zip(anchor.tokens, step.tokens, strict=True)):
            if new == old:
                continue
            if old != mask or new not in anchor.ranks[place]:
                return  # edited, or too improbable to be drafted
            pairs.append((rank[place], anchor.ranks[place].index(new)))
        if not pairs:
            return
        yield tuple(sorted(pairs))


SCORES = ("own", "parents")


def choose(counts: Counts, nodes: int, score: str = "own") -> list[Node]:
    """The best connected graph of so many ``nodes``, in the order of their choice.

    ``score`` is a set's ``own`` count, whose sum over the graph is the number of forwards that it would have saved in
    the traces; or that and the counts of its direct ``parents``, as published.
    """
    scores = {
        pairs: own + sum(counts.states[parent] for parent in counts.parents[pairs] if parent and score == "parents")
        for pairs, own in counts.states.items()
    }
    # Ties: the state reached more often, then the smaller and earlier set.
    waiting = sorted(scores, key=lambda pairs: (-scores[pairs], -counts.states[pairs], len(pairs), pairs))
    chosen: dict[Pairs, int] = {(): ROOT}
    while waiting and len(chosen) <= nodes:
        best = next((pairs for pairs in waiting if any(parent in chosen for parent in counts.parents[pairs])), None)
        if best is None:
            break
        waiting.remove(best)
        chosen[best] = len(chosen)
    return [
        Node(
            pairs,
            tuple(sorted(chosen[parent] for parent in counts.parents[pairs] if parent in chosen)),
            counts.states[pairs],
            counts.chances(pairs),
        )
        for pairs in list(chosen)[1:]
    ]


def calibrate(
    model: BlockDiffusionModel,
    config: DecodingConfig,
    prompts: Sequence[Sequence[int]],
    *,
    nodes: int,
    depth: int,
    traces: Path,
    source: str,
    score: str = "own",
    on_traced: Callable[[], None] = lambda: None,
) -> DraftGraph:
    """A draft graph of ``nodes`` nodes up to ``depth`` steps ahead, for ``config`` on ``model`` (called ``source``);
    ``score`` as in :func:`choose`.
    """
    ranked = trace(model, config, prompts, traces, on_traced)
    counts = count(ranked, depth, model.facts.mask_token_id)
    about, decoding = signature(config, model.facts)
    return DraftGraph(
        nodes=tuple(choose(counts, nodes, score)),
        block_length=config.block_length,
        model={"source": source, **about},
        decoding=decoding,
        calibration={
            "prompts": len(prompts),
            "states": sum(counts.anchors.values()),
            "depth": depth,
            "score": score,
            "new_tokens": config.max_new_tokens,
        },
    )
