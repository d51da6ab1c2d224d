"""Measure decoders: tokens per second, forwards by kind, and where the time goes.

A measurement holds ``name`` and ``batch``; ``tokens_per_second`` end to end and ``decode_tokens_per_second`` without
the forwards that only prefill; ``tokens_per_forward``, a forward counted once per row in it; ``forwards`` by kind;
``milliseconds`` per forward, all rows together, and ``over_floor`` those over the time that reading the weights takes;
``outside`` the share of time outside the model; ``over_plain`` tokens per second over those of the plain eager loop.
Each is the median over repeats, and None if a third-party loop does not report it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.trace import KINDS
from s2d2_lmeval.studies.bench.plain import PlainS2D2
from s2d2_lmeval.studies.bench.random_weights import Script

PLAIN = "plain eager S2D2 loop"

Measurement = dict[str, Any]


class Workload(NamedTuple):
    """Prompts of token ids, and how many new tokens each gets (exactly: no stop rule applies)."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int


@dataclass
class Contender:
    """A decoding setting to measure: ``run`` it once, given whether this is the warm-up."""

    name: str
    batch: int
    run: Callable[[bool], Measurement]


def measure_all(
    contenders: Sequence[Contender], repeats: int, in_turn: bool, tell: Callable[[str], None]
) -> list[Measurement]:
    """Warm all up, run each ``repeats`` times, and take medians.

    Args:
        in_turn: whether to interleave the contenders' repeats, so that drift in the machine's speed affects all alike.
            Not on CUDA, where each has its own graphs, and not all fit in memory.
    """
    runs: list[list[Measurement]] = [[] for _ in contenders]
    turns = [(place, repeat) for place in range(len(contenders)) for repeat in range(repeats + 1)]
    for place, repeat in sorted(turns, key=lambda turn: turn[1]) if in_turn else turns:
        one = contenders[place]
        tell(f"{one.name}, batch {one.batch}, {f'{repeat} of {repeats}' if repeat else 'warming up'}")
        found = one.run(repeat == 0)
        if repeat:
            runs[place].append(found)
    medians = [
        {"name": one.name, "batch": one.batch, **{key: _median([run[key] for run in several]) for key in several[0]}}
        for one, several in zip(contenders, runs, strict=True)
    ]
    plain = next((one["tokens_per_second"] for one in medians if one["name"] == PLAIN), None)
    return [{**one, "over_plain": one["tokens_per_second"] / plain if plain else None} for one in medians]


def _median(values: Sequence[Any]) -> Any:
    return statistics.median(values) if isinstance(values[0], float) else values[0]


def decoder(model: BlockDiffusionModel, name: str, options: Mapping[str, Any], batch: int, work: Workload) -> Contender:
    """``work`` by the package's engine."""
    config = model.config({**options, "max_new_tokens": work.new_tokens, "stop_token_ids": []})
    floor = floor_milliseconds(model.hf_model)

    def run(warms_up: bool) -> Measurement:
        model.max_batch = batch
        model.trace.reset()
        started = clock.now()
        model.generate(work.prompts, config)
        totals = model.trace.totals()
        wall = clock.now() - started
        milliseconds = 1000 * totals["model_seconds"] / totals["forwards"]
        return {
            "tokens_per_second": totals["new_tokens"] / wall,
            "decode_tokens_per_second": totals["new_tokens"] / (wall - (totals["seconds"] - totals["decode_seconds"])),
            "tokens_per_forward": totals.get("tokens_per_forward"),
            "forwards": {kind: int(totals[f"{kind}_forwards"]) for kind in KINDS if totals[f"{kind}_forwards"]},
            "milliseconds": milliseconds,
            "over_floor": milliseconds / floor,
            "outside": 1 - totals["model_seconds"] / wall,
        }

    return Contender(name, batch, run)


def plain_loop(
    plain: PreTrainedModel, mask_token_id: int, block_length: int, script: Script | None, work: Workload
) -> Contender:
    """The eager S2D2 loop of :mod:`s2d2_lmeval.studies.bench.plain`, one prompt after the other."""

    def scripted(logits: torch.Tensor, position: torch.Tensor, draft: bool, cached: int) -> torch.Tensor:
        if script is None:
            logits[:, mask_token_id] = -torch.inf
            return logits
        flags = torch.full_like(position, draft, dtype=torch.bool)
        return script.logits(logits, position, flags, torch.full_like(position, cached))

    def run(warms_up: bool) -> Measurement:
        loop = PlainS2D2(plain, mask_token_id, block_length, scripted)
        _synchronise(plain.device)
        started = clock.now()
        for prompt in work.prompts[:1] if warms_up else work.prompts:
            loop.generate(list(prompt), work.new_tokens)
        _synchronise(plain.device)
        return _of_others(1, work, clock.now() - started, loop.forwards)

    return Contender(PLAIN, 1, run)


def transformers_generate(plain: PreTrainedModel, batch: int, cache: str | None, work: Workload) -> Contender:
    """transformers' own autoregressive ``generate`` on the same weights, greedy, with prompts cut to one length."""
    shortest = min(len(prompt) for prompt in work.prompts)
    ids = torch.tensor([list(prompt)[:shortest] for prompt in work.prompts], device=plain.device)
    settings = GenerationConfig(
        max_new_tokens=work.new_tokens,
        min_new_tokens=work.new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **({"cache_implementation": cache} if cache else {}),
    )

    def run(warms_up: bool) -> Measurement:
        started = clock.now()
        # The first run compiles and fills caches: one batch of it is enough.
        for part in (ids[:batch] if warms_up else ids).split(batch):
            plain.generate(part, attention_mask=torch.ones_like(part), generation_config=settings)
        _synchronise(plain.device)
        return _of_others(batch, work, clock.now() - started, len(ids.split(batch)) * work.new_tokens)

    return Contender(f"transformers generate, {cache or 'dynamic'} cache", batch, run)


def _of_others(batch: int, work: Workload, seconds: float, forwards: int) -> Measurement:
    """A run of a third-party loop, of which only the time and the forwards are known."""
    tokens = len(work.prompts) * work.new_tokens
    unknown = dict.fromkeys(("decode_tokens_per_second", "milliseconds", "over_floor", "outside"))
    per_forward = tokens / forwards if batch == 1 else 1.0
    known = {"tokens_per_second": tokens / seconds, "tokens_per_forward": per_forward, "forwards": {"all": forwards}}
    return {**known, **unknown}


def floor_milliseconds(model: PreTrainedModel) -> float:
    """Milliseconds to read every weight that a forward reads, at the copy bandwidth measured now.

    An embedding table that is not also the head does not count, because a forward looks up only a few of its rows.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if table.data_ptr() != head.data_ptr():
        read -= table.numel() * table.element_size()
    return 1000 * read / copy_bandwidth(table.device)


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read per second by a large copy on ``device`` (as many again are written)."""
    source = torch.zeros(1 << 28 if device.type == "cuda" else 1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        _synchronise(device)
        started = clock.now()
        target.copy_(source)
        _synchronise(device)
        seconds.append(clock.now() - started)
    # A copy reads and writes; reading alone has the bandwidth of both together.
    return 2 * source.numel() / statistics.median(seconds)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plot(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    """Draw tokens per second by decoder, a bar per batch size, into ``path`` (its ending names the format)."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one["name"] for one in measurements))
    batches = sorted({one["batch"] for one in measurements})
    figure = Figure(figsize=(8, 1 + 0.25 * len(names) * len(batches)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(batches)
    for place, batch in enumerate(batches):
        rows = [one for one in measurements if one["batch"] == batch]
        where = [names.index(one["name"]) + height * (place - (len(batches) - 1) / 2) for one in rows]
        bars = axes.barh(where, [one["tokens_per_second"] for one in rows], height, label=f"batch {batch}")
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second, end to end")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
