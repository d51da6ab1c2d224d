"""Decoders on random weights in published shapes, beside transformers' ``generate`` and a plain loop."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.setting import Setting
from s2d2_lmeval.model import load
from s2d2_lmeval.studies.bench import measuring
from s2d2_lmeval.studies.bench.measuring import Contender, Workload
from s2d2_lmeval.studies.bench.random_weights import (
    SHAPES,
    Script,
    follow_script,
    random_model,
    with_random_drafter,
)

DECODERS: dict[str, dict[str, Any]] = {
    "s2d2": {"decoder": "s2d2", "block_length": 4},
    "s2d2:lookahead": {"decoder": "s2d2", "block_length": 4, "schedule": "lookahead"},
    "ar": {"decoder": "ar"},
    "sliding": {"decoder": "sliding"},
    "dynamic": {"decoder": "dynamic", "block_length": 4},
}
DRAFTED: dict[str, dict[str, Any]] = {"ar (target of ddtree)": {"decoder": "ar"}, "ddtree": {"decoder": "ddtree"}}
"""Of a target with a random drafter, without a script: every round is as long as it ever is, and accepts little."""

ACCEPTED, PROMPT, NEW = 0.8, 64, 32

REHEARSAL = "a tiny shape for a rehearsal"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def of_8b(setting: Setting) -> None:
    """SDAR-8B at batch 1, 8 and 32."""
    measure(setting, "sdar-8b", (1, 32, 8))


def of_1_7b(setting: Setting) -> None:
    """SDAR-1.7B at batch 1 and 32."""
    measure(setting, "sdar-1.7b", (1, 32))


def measure(setting: Setting, name: str, batches: tuple[int, ...]) -> None:
    """Everything at the first batch, then at the next; each is written when it is there."""
    plain = random_model(shape_for(setting, name), setting.device, setting.half)
    floor = measuring.floor_milliseconds(plain)
    rows: list[dict[str, Any]] = []
    setting.note(floor_milliseconds=floor, scripted_acceptance=ACCEPTED, rows=rows)
    for batch in batches[:1] if setting.rehearse else batches:
        for contender in contenders(plain, batch, workload(setting, plain, batch)):
            with setting.part(f"{contender.name}, batch {batch}"):
                contender.run(True)
                rows.append({"name": contender.name, "batch": batch, **contender.run(False)})
                setting.note(rows=rows)
                setting.say(summary(rows, floor))


def shape_for(setting: Setting, name: str) -> str:
    """The name of the shape, or of a tiny one."""
    SHAPES.setdefault(REHEARSAL, TINY)
    return REHEARSAL if setting.rehearse else name


def workload(setting: Setting, plain: Any, batch: int) -> Workload:
    """Random prompts; as many as rows, at least two."""
    rng = random.Random(0)
    length, new = (6, 5) if setting.rehearse else (PROMPT, NEW)
    words = range(plain.config.vocab_size // 2)
    return Workload([rng.choices(words, k=length) for _ in range(max(batch, 2))], new)


def contenders(plain: Any, batch: int, work: Workload) -> Iterator[Contender]:
    """One after the other, so that each one's graphs go before the next one's come."""
    mask = plain.config.vocab_size - 1
    script = Script(ACCEPTED, plain.config.vocab_size)
    model = follow_script(load(plain, family="sdar", mask_token_id=mask, block_length=4), script)
    for name, options in DECODERS.items():
        yield measuring.decoder(model, name, options, batch, work)
    model.release()
    drafted = with_random_drafter(plain)
    for name, options in DRAFTED.items():
        yield measuring.decoder(drafted, name, options, batch, work)
    drafted.release()
    yield measuring.transformers_generate(plain, batch, None, work)
    if batch == 1:
        yield measuring.plain_loop(plain, mask, 4, script, work)


def summary(rows: list[dict[str, Any]], floor: float) -> str:
    """The first decoder's numbers at batch 1, and how much is there."""
    first = rows[0]
    outside = first["milliseconds"] * first["outside"] / (1 - first["outside"]) if first.get("milliseconds") else 0
    return (
        f"{len(rows)} rows; {first['name']}, batch {first['batch']}: {first['milliseconds']:.2f} ms per forward "
        f"({first['milliseconds'] / floor:.2f} x floor), {outside:.2f} ms outside, {first['tokens_per_second']:.0f} "
        "tokens/s"
    )


def profiled(setting: Setting) -> None:
    """A profile of about 30 steps of S2D2 and of sliding at 8B, after a warm-up: what runs, and how busy the GPU is."""
    plain = random_model(shape_for(setting, "sdar-8b"), setting.device, setting.half)
    mask = plain.config.vocab_size - 1
    model = follow_script(
        load(plain, family="sdar", mask_token_id=mask, block_length=4), Script(ACCEPTED, plain.config.vocab_size)
    )
    activities = [ProfilerActivity.CPU, *([] if setting.rehearse else [ProfilerActivity.CUDA])]
    where = torch.autograd.DeviceType.CPU if setting.rehearse else torch.autograd.DeviceType.CUDA
    for entry, batch, new in (("s2d2", 1, 48), ("s2d2:lookahead", 8, 64), ("sliding", 8, 64)):
        with setting.part(entry):
            model.max_batch = batch
            prompts = workload(setting, plain, batch).prompts[:batch]
            options = {**DECODERS[entry], "max_new_tokens": 4 if setting.rehearse else new, "stop_token_ids": []}
            model.generate(prompts, options)
            model.trace.reset()
            with profile(activities=activities) as seen:
                model.generate(prompts, options)
                setting.wait()
            kernels = [one for one in seen.events() if one.device_type == where]
            totals = model.trace.totals()
            busy = sum(one.time_range.elapsed_us() for one in kernels) / 1e6 / totals["seconds"]
            said = (
                f"{totals['forwards']:.0f} steps, {len(kernels) / totals['forwards']:.0f} kernels each, busy {busy:.0%}"
            )
            setting.note(**{f"{entry}, batch {batch}": {"said": said, "kernels": by_time(kernels)}})
    setting.say("; ".join(f"{name}: {one['said']}" for name, one in setting.found.items() if "batch" in name))


def by_time(kernels: list[Any], most: int = 40) -> list[str]:
    """The kernels that take longest in all: microseconds, calls, name."""
    took: dict[str, list[float]] = {}
    for one in kernels:
        took.setdefault(one.name, []).append(one.time_range.elapsed_us())
    longest = sorted(took.items(), key=lambda one: -sum(one[1]))[:most]
    return [f"{sum(times):10.0f} {len(times):6d}  {name[:100]}" for name, times in longest]
