"""Measure decoders: tokens per second, forwards by kind, and where the time goes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.trace import KINDS
from s2d2_lmeval.studies.plain import PlainS2D2
from s2d2_lmeval.studies.scripted import Script

PLAIN = "plain eager S2D2 loop"


@dataclass(frozen=True)
class Measurement:
    """One way of decoding, medians over repeats.

    ``tokens_per_second`` end to end; ``decode_tokens_per_second`` without the forwards that only prefill;
    ``tokens_per_forward`` counts a forward once per row in it; ``milliseconds`` per forward, all rows together;
    ``over_floor`` those over the time that reading the weights takes at the measured copy bandwidth; ``outside`` the
    share of time outside the model. None where a loop of somebody else's does not tell.
    """

    name: str
    batch: int
    tokens_per_second: float
    decode_tokens_per_second: float | None
    tokens_per_forward: float | None
    forwards: Mapping[str, int]
    milliseconds: float | None
    over_floor: float | None
    outside: float | None


@dataclass(frozen=True)
class Workload:
    """Prompts of token ids, and how many tokens each is continued by (never fewer: nothing stops)."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int


@dataclass
class Contender:
    """A way of decoding that is to be measured: ``run`` it once, given whether that only warms up; ``conclude`` from
    the results of the runs after that.
    """

    label: str
    run: Callable[[bool], Any]
    conclude: Callable[[list[Any]], Measurement]


def measure_all(
    contenders: Sequence[Contender], repeats: int, in_turn: bool, tell: Callable[[str], None]
) -> list[Measurement]:
    """Warm all up, run each ``repeats`` times, and conclude.

    :param in_turn: whether every repeat runs all contenders, so that a machine whose speed drifts slows all alike. On
        CUDA each has graphs of its own, which not all fit: there one follows the other.
    """
    runs: list[list[Any]] = [[] for _ in contenders]

    def run(place: int, repeat: int) -> None:
        tell(f"{contenders[place].label}, {f'{repeat} of {repeats}' if repeat else 'warming up'}")
        result = contenders[place].run(repeat == 0)
        if repeat:
            runs[place].append(result)

    turns = [(place, repeat) for place in range(len(contenders)) for repeat in range(repeats + 1)]
    for place, repeat in sorted(turns, key=lambda turn: turn[1]) if in_turn else turns:
        run(place, repeat)
    return [contender.conclude(results) for contender, results in zip(contenders, runs, strict=True)]


def decoder(model: BlockDiffusionModel, name: str, options: Mapping[str, Any], batch: int, work: Workload) -> Contender:
    """``work`` by the package's engine."""
    config = model.config({**options, "max_new_tokens": work.new_tokens, "stop_token_ids": []})

    def run(warms_up: bool) -> Mapping[str, float]:
        model.max_batch = batch
        model.trace.reset()
        started = clock.now()
        model.generate(work.prompts, config)
        totals = model.trace.totals()
        wall = clock.now() - started
        return {**totals, "wall": wall, "decode_wall": wall - (totals["seconds"] - totals["decode_seconds"])}

    def conclude(runs: list[Mapping[str, float]]) -> Measurement:
        def median(value: Callable[[Mapping[str, float]], float]) -> float:
            return statistics.median(value(run) for run in runs)

        milliseconds = median(lambda run: 1000 * run["model_seconds"] / run["forwards"])
        return Measurement(
            name=name,
            batch=batch,
            tokens_per_second=median(lambda run: run["new_tokens"] / run["wall"]),
            decode_tokens_per_second=median(lambda run: run["new_tokens"] / run["decode_wall"]),
            tokens_per_forward=runs[0].get("tokens_per_forward"),
            forwards={kind: int(runs[0][f"{kind}_forwards"]) for kind in KINDS if runs[0][f"{kind}_forwards"]},
            milliseconds=milliseconds,
            over_floor=milliseconds / floor_milliseconds(model.hf_model),
            outside=median(lambda run: 1 - run["model_seconds"] / run["wall"]),
        )

    return Contender(f"{name}, batch {batch}", run, conclude)


def plain_loop(
    plain: PreTrainedModel, mask_token_id: int, block_length: int, script: Script | None, work: Workload
) -> Contender:
    """The eager S2D2 loop of :mod:`s2d2_lmeval.studies.plain`, one prompt after the other."""

    def scripted(logits: torch.Tensor, position: torch.Tensor, draft: bool, cached: int) -> torch.Tensor:
        if script is None:
            logits[:, mask_token_id] = -torch.inf
            return logits
        flags = torch.full_like(position, draft, dtype=torch.bool)
        return script.logits(logits, position, flags, torch.full_like(position, cached))

    def run(warms_up: bool) -> tuple[float, int]:
        loop = PlainS2D2(plain, mask_token_id, block_length, scripted)
        _synchronise(plain.device)
        started = clock.now()
        for prompt in work.prompts[:1] if warms_up else work.prompts:
            loop.generate(list(prompt), work.new_tokens)
        _synchronise(plain.device)
        return clock.now() - started, loop.forwards

    def conclude(runs: list[tuple[float, int]]) -> Measurement:
        return _of_others(PLAIN, 1, work, statistics.median(seconds for seconds, _ in runs), runs[0][1])

    return Contender(PLAIN, run, conclude)


def transformers_generate(plain: PreTrainedModel, batch: int, cache: str | None, work: Workload) -> Contender:
    """transformers' own autoregressive ``generate`` on the same weights, arg-max, prompts cut to one length."""
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
    name = f"transformers generate, {cache or 'dynamic'} cache"

    def run(warms_up: bool) -> float:
        started = clock.now()
        # The first run compiles and fills caches: one batch of it is enough.
        for part in (ids[:batch] if warms_up else ids).split(batch):
            plain.generate(part, attention_mask=torch.ones_like(part), generation_config=settings)
        _synchronise(plain.device)
        return clock.now() - started

    def conclude(runs: list[float]) -> Measurement:
        return _of_others(name, batch, work, statistics.median(runs), len(ids.split(batch)) * work.new_tokens)

    return Contender(f"{name}, batch {batch}", run, conclude)


def _of_others(name: str, batch: int, work: Workload, seconds: float, forwards: int) -> Measurement:
    """A loop of somebody else's, of which only the time and the forwards are known."""
    tokens = len(work.prompts) * work.new_tokens
    return Measurement(
        name=name,
        batch=batch,
        tokens_per_second=tokens / seconds,
        decode_tokens_per_second=None,
        tokens_per_forward=tokens / forwards if batch == 1 else 1.0,
        forwards={"all": forwards},
        milliseconds=None,
        over_floor=None,
        outside=None,
    )


def floor_milliseconds(model: PreTrainedModel) -> float:
    """Milliseconds to read every weight that a forward reads, at the copy bandwidth measured here and now.

    An embedding table that is not the head as well is not read: a forward looks up a few of its rows.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if table.data_ptr() != head.data_ptr():
        read -= table.numel() * table.element_size()
    return 1000 * read / copy_bandwidth(table.device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read per second by a large copy on ``device`` (as many again are written)."""
    if device not in _BANDWIDTHS:
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
        _BANDWIDTHS[device] = 2 * source.numel() / statistics.median(seconds)
    return _BANDWIDTHS[device]


_BANDWIDTHS: dict[torch.device, float] = {}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def over_plain(found: Sequence[Measurement]) -> list[float | None]:
    """Tokens per second of each over those of the plain eager loop of the same run; None without one."""
    plain = next((one.tokens_per_second for one in found if one.name == PLAIN), None)
    return [one.tokens_per_second / plain if plain else None for one in found]


def as_json(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Plain values."""
    ratios = over_plain(measurements)
    return [{**asdict(one), "over_plain": ratio} for one, ratio in zip(measurements, ratios, strict=True)]


def plot(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    """Draw tokens per second by decoder, a bar per batch size, into ``path`` (its ending names the format)."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one.name for one in measurements))
    batches = sorted({one.batch for one in measurements})
    figure = Figure(figsize=(8, 1 + 0.25 * len(names) * len(batches)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(batches)
    for place, batch in enumerate(batches):
        rows = [one for one in measurements if one.batch == batch]
        where = [names.index(one.name) + height * (place - (len(batches) - 1) / 2) for one in rows]
        bars = axes.barh(where, [one.tokens_per_second for one in rows], height, label=f"batch {batch}")
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second, end to end")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
