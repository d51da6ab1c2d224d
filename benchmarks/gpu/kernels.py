"""Triton kernels: their results beside torch's, and the time of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.setting import Setting
from s2d2_lmeval.decoding.sampling import random, row_statistics
from s2d2_lmeval.runtime.kernels import layer
from s2d2_lmeval.runtime.kernels.dispatch import Kernel, runs_triton

HIDDEN = 4096

Call = tuple[Kernel[Any, Any], tuple[Any, ...]]


def calls(m: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Kernels over ``m`` rows, with arguments. (Attention and the cache's are compared by the tests for a GPU.)"""
    logits = (4 * torch.randn(m, vocabulary, device=device)).to(dtype).float()
    law, token = logits.softmax(-1), torch.arange(m, device=device) % vocabulary
    words = (token, token * 7, token % 3)
    yield row_statistics.statistics_of, (logits,)
    yield row_statistics.likeliest, (logits,)
    yield row_statistics.probability_of, (logits, token)
    yield random.keyed_uniform, (*words, 5, 1)
    yield random.keyed_categorical, (law, *words, 5, 1)
    yield random.keyed_draw, (logits, 0.7, *words, 5, 1)
    yield random.keyed_gumbel, (logits, *words, 5, 1)
    stream = torch.randn(m, HIDDEN, device=device).to(dtype)
    yield layer.add_norm, (stream, stream.flip(0).contiguous(), stream[0].abs(), 1e-6)
    yield layer.silu_mul, (stream,)


def run(setting: Setting) -> None:
    """All of them over real vocabularies, odd ones too."""
    if not setting.rehearse and not runs_triton(setting.device):
        setting.say("skipped: Triton does not run here")
        return
    rows: list[dict[str, Any]] = []
    for m, vocabulary in [(3, 130)] if setting.rehearse else [(m, v) for v in (151936, 32001) for m in (1, 8, 64, 256)]:
        for dtype in (torch.float32, torch.bfloat16):
            for kernel, given in calls(m, vocabulary, setting.device, dtype):
                with setting.part(f"{kernel.name} {m} x {vocabulary} {dtype}"):
                    about = {"kernel": kernel.name, "rows": m, "vocabulary": vocabulary, "dtype": str(dtype)}
                    rows.append({**about, **compared(setting, kernel, given)})
                    setting.note(rows=rows)
    worst = max(rows, key=lambda row: row["relative"], default=None)
    slowest = max(rows, key=lambda row: row["triton"], default=None)
    if worst and slowest:
        setting.say(
            f"{len(rows)} comparisons, largest relative difference {worst['relative']:.1e} ({worst['kernel']}), other "
            f"tokens {sum(row['tokens'] for row in rows)}, slowest {slowest['triton']:.0f} µs ({slowest['kernel']})"
        )


def compared(setting: Setting, kernel: Kernel[Any, Any], given: tuple[Any, ...]) -> dict[str, float]:
    """The largest ``relative`` difference of numbers, how many ``tokens`` differ, and microseconds of both."""
    expected, found = kernel.reference(*given), kernel(*given)
    several = [(expected, found)] if isinstance(expected, torch.Tensor) else list(zip(expected, found, strict=True))
    relative, tokens = 0.0, 0
    for one, other in several:
        if one.is_floating_point():
            one, other = one.float(), other.float()
            relative = max(relative, float(((one - other).abs() / one.abs().clamp(min=1e-2)).max()))
        else:
            tokens += int((one != other).sum())
    return {
        "relative": relative,
        "tokens": tokens,
        "torch": setting.median_us(lambda: kernel.reference(*given), 5),
        "triton": setting.median_us(lambda: kernel(*given), 5),
    }
