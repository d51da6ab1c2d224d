"""64 random bits as a function of integers: the same of tensors, of arrays and in kernels."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Integers = TypeVar("Integers", torch.Tensor, np.ndarray)


def signed(word: int) -> int:
    """The low 64 bits of ``word`` as int64 holds them."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


GOLDEN = signed(0x9E3779B97F4A7C15)
MULTIPLIERS = (signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB))


def of_seed(seed: int) -> int:
    """The word that stands for a seed."""
    return signed((2 * seed + 1) * 0x2545F4914F6CDD1D)


def of_purpose(purpose: int) -> int:
    """The word that stands for a purpose."""
    return signed(purpose * 0x632BE59BD9B4E019)


def mixed(x: Integers) -> Integers:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) on int64 with wrapping arithmetic."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MULTIPLIERS[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MULTIPLIERS[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def hashed(seed: int, purpose: int, words: tuple[Integers, ...]) -> Integers:
    """64 random bits as int64, a function of all the ``words`` (int64, broadcast); the same of tensors and arrays."""
    first, *others = words
    state = mixed((first + 1) * GOLDEN + of_seed(seed))
    for word in others:
        state = mixed((word + 1) * GOLDEN + state)
    return mixed(state ^ of_purpose(purpose))
