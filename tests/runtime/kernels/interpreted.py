"""Every kernel's Triton side against its torch side, in Triton's interpreter: run as a program by test_kernels.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import drawn


def statistics() -> None:
    from s2d2_lmeval.decoding.sampling import row_statistics, row_statistics_triton

    row_statistics_triton.CHUNK = 64
    for rows, vocabulary in ((0, 5), (1, 1), (3, 5), (7, 64), (4, 65), (9, 640)):
        x = drawn.logits(rows, vocabulary)
        print(rows, vocabulary, flush=True)
        tokens = torch.arange(rows) * 7 % vocabulary
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


def draws() -> None:
    from s2d2_lmeval.decoding.sampling import random, random_triton

    random_triton.CHUNK = 64
    generator = torch.Generator().manual_seed(0)
    for rows, vocabulary in ((0, 5), (1, 1), (3, 5), (7, 64), (5, 200)):
        x, p = drawn.logits(rows, vocabulary), drawn.logits(rows, vocabulary).softmax(-1)
        words = [torch.randint(0, most, (rows,), generator=generator) for most in (10**9, 4000, 60)]
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
            table = words[0].unsqueeze(1), torch.arange(7), words[2].unsqueeze(1)
            uniform = random.keyed_uniform
            assert torch.equal(uniform.implementation(*table, seed, 2), uniform.reference(*table, seed, 2))


PARTS: dict[str, Callable[[], None]] = {
    "statistics": statistics,
    "draws": draws,
}

if __name__ == "__main__":
    PARTS[sys.argv[1]]()
