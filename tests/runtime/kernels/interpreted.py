"""Every kernel's Triton side against its torch side: run by test_kernels.py, as a program in Triton's interpreter, and
on a GPU where there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parent))

import drawn

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    limit = TOLERANCE.get(expected.dtype, 0)
    torch.testing.assert_close(got, expected, rtol=limit, atol=limit)


def on(device: str, given: Any) -> Any:
    """``given`` with all tensors on ``device``."""
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, given)


def attention(device: str = "cpu") -> None:
    from s2d2_lmeval.runtime.kernels import attention_triton
    from s2d2_lmeval.runtime.kernels.attention import attend

    for name, shape in drawn.ATTENTION.items():
        for dtype in (torch.float32, torch.bfloat16)[: 2 if device != "cpu" or name in drawn.ALSO_HALF else 1]:
            given = on(device, drawn.attention(**shape, dtype=dtype))
            print(name, dtype, flush=True)
            apart = attend.implementation(**given)
            close(apart, attend.reference(**given))
            enough, attention_triton.ENOUGH = attention_triton.ENOUGH, 0
            assert torch.equal(attend.implementation(**given), apart), "whoever goes through the splits"
            attention_triton.ENOUGH = enough


def layer(device: str = "cpu") -> None:
    from s2d2_lmeval.runtime.kernels import layer as kernels

    for name, shape in drawn.LAYERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for kernel, given in on(device, drawn.layer(**shape, dtype=dtype)).items():
                print(name, dtype, kernel, flush=True)
                one = getattr(kernels, kernel.split()[0])
                other = [value.clone() if isinstance(value, torch.Tensor) else value for value in given]
                got, expected = one.implementation(*given), one.reference(*other)
                results = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
                for result in results:
                    close(*result)
                for value, written in zip(given, other, strict=True):
                    if isinstance(value, torch.Tensor):
                        close(value, written)


def statistics(device: str = "cpu") -> None:
    from s2d2_lmeval.decoding.sampling import row_statistics, row_statistics_triton

    row_statistics_triton.CHUNK = 64
    for rows, vocabulary in ((0, 5), (1, 1), (3, 5), (7, 64), (4, 65), (9, 640)):
        x = drawn.logits(rows, vocabulary).to(device)
        print(rows, vocabulary, flush=True)
        tokens = torch.arange(rows, device=device) * 7 % vocabulary
        calls = {"statistics_of": (x,), "likeliest": (x,), "probability_of": (x, tokens)}
        for name, given in calls.items():
            kernel = getattr(row_statistics, name)
            got, expected = kernel.implementation(*given), kernel.reference(*given)
            results = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
            for one, other in results:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
    x[0, 3] = torch.nan
    assert row_statistics.statistics_of.implementation(x)[1][0].isnan()
    assert row_statistics.statistics_of.implementation(x.t()[:9].contiguous().t())[0].shape == (9,)


def draws(device: str = "cpu") -> None:
    from s2d2_lmeval.decoding.sampling import random, random_triton

    random_triton.CHUNK = 64
    generator = torch.Generator().manual_seed(0)
    for rows, vocabulary in ((0, 5), (1, 1), (3, 5), (7, 64), (5, 200)):
        x = drawn.logits(rows, vocabulary).to(device)
        p = x.softmax(-1)
        words = [torch.randint(0, most, (rows,), generator=generator).to(device) for most in (10**9, 4000, 60)]
        for seed, temperature in ((0, 1.0), (1234, 0.7), (2**31 - 1, 3.0)):
            print(rows, vocabulary, seed, flush=True)
            key = *words, seed, random.DRAFT
            token, probability = random.keyed_draw.implementation(x, temperature, *key)
            expected = random.keyed_draw.reference(x, temperature, *key)
            assert torch.equal(token, expected[0])
            torch.testing.assert_close(probability, expected[1], rtol=1e-5, atol=1e-7)
            race = random.keyed_categorical
            assert torch.equal(race.implementation(p, *key), race.reference(p, *key))
            noise = random.keyed_gumbel
            torch.testing.assert_close(noise.implementation(x, *key), noise.reference(x, *key), rtol=1e-5, atol=1e-6)
            table = words[0].unsqueeze(1), torch.arange(7, device=device), words[2].unsqueeze(1)
            uniform = random.keyed_uniform
            assert torch.equal(uniform.implementation(*table, seed, 2), uniform.reference(*table, seed, 2))


PARTS: dict[str, Callable[[str], None]] = {
    "attention": attention,
    "layer": layer,
    "statistics": statistics,
    "draws": draws,
}

if __name__ == "__main__":
    PARTS[sys.argv[1]]("cpu")
