"""Sources of random numbers.

``keyed``  The default. Every number is a pure function of (seed, request, purpose, position, draw): a request's samples
do not depend on its batch, the schedule, or the order of calls.
``fixed``  Every uniform is 0.5 and every categorical draw the argmax.
``torch``  The global generator of torch, drawn in the order of the published code
           (:mod:`~s2d2_lmeval.decoding.reference`). One row at a time.
an object  With ``uniform(n)`` and ``categorical(probabilities)``, in the same order as ``torch``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from s2d2_lmeval.decoding.reference import FixedSource, SequentialSource, TorchDraws

DRAFT, ACCEPT, RESAMPLE = 1, 2, 3
"""The purpose of a draw."""


def _signed(word: int) -> int:
    """The low 64 bits of ``word`` as torch's int64 holds them."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


@dataclass(frozen=True)
class Key:
    """Keys of draws: ``request``, ``position`` and ``draw`` (how often the position was drawn before) of one broadcast
    shape, int64; with an ``index``, those at its places. Evaluated lazily, when something is drawn.
    """

    purpose: int
    request: torch.Tensor
    position: torch.Tensor
    draw: torch.Tensor
    index: tuple[torch.Tensor, ...] | None = None

    def take(self, index: tuple[torch.Tensor, ...]) -> Key:
        """The key at ``index`` of its broadcast shape."""
        if self.index is None:
            return replace(self, index=index)
        return Key(self.purpose, *self.words(), index)

    def words(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Request, position and draw, to be broadcast."""
        words = self.request, self.position, self.draw
        if self.index is None:
            return words
        request, position, draw = torch.broadcast_tensors(*words)
        return request[self.index], position[self.index], draw[self.index]


class RandomSource(Protocol):
    """The interface of a random source."""

    def uniform(self, key: Key, needed: torch.Tensor) -> torch.Tensor:
        """Numbers in [0, 1) where ``needed`` (bool, the key's shape) is set; elsewhere anything."""

    def categorical(self, probabilities: torch.Tensor, key: Key) -> torch.Tensor:
        """A token (M,) from each row of ``probabilities`` (M, V)."""

    def gumbel(self, probabilities: torch.Tensor, key: Key) -> torch.Tensor:
        """The noise (M, V) that :meth:`categorical` adds to log p before it takes the argmax; zeros if it is not known
        in advance.
        """

    def drawing(self, rows: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
        """Of ``rows`` (K,), those for which a draw is made, at least where it is ``needed`` (K,)."""


def source_of(name_or_object: Any, seed: int) -> RandomSource:
    """The source that the option ``random_source`` names."""
    if name_or_object == "keyed":
        return KeyedSource(seed)
    if name_or_object == "fixed":
        return FixedSource()
    return SequentialSource(TorchDraws() if name_or_object == "torch" else name_or_object)


Integers = TypeVar("Integers", torch.Tensor, np.ndarray)


def _mix(x: Integers) -> Integers:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) on int64 with wrapping arithmetic."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MULTIPLIERS[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def hashed(seed: int, purpose: int, words: tuple[Integers, ...]) -> Integers:
    """64 random bits as int64, a function of all the ``words`` (int64, broadcast); the same of tensors and arrays."""
    first, *others = words
    state = _mix((first + 1) * _GOLDEN + _signed((2 * seed + 1) * 0x2545F4914F6CDD1D))
    for word in others:
        state = _mix((word + 1) * _GOLDEN + state)
    return _mix(state ^ _signed(purpose * 0x632BE59BD9B4E019))


def _unit(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The upper 32 of 64 random bits as a number in (0, 1), small values at full relative precision."""
    return (((bits >> 32) & 0xFFFFFFFF).to(dtype) + 0.5) * 2.0**-32


class KeyedSource:
    """Counter-based: hashes the key, so any draw can be made at any time, in any batch, on any device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _hash(self, key: Key) -> torch.Tensor:
        words = key.words()
        if words[0].device.type == "cpu":  # dozens of operations on a few numbers: numpy takes half of torch's time
            bits = hashed(self.seed, key.purpose, tuple(word.numpy() for word in words))
            return torch.from_numpy(bits)
        return hashed(self.seed, key.purpose, words)

    def uniform(self, key: Key, needed: torch.Tensor) -> torch.Tensor:
        # 24 bits: a float32 below one. (0.5 + 32 bits would round up to one.)
        return ((self._hash(key) >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24

    def categorical(self, probabilities: torch.Tensor, key: Key) -> torch.Tensor:
        """The exponential race: token v wins with probability p_v, by noise keyed by position and token."""
        return (probabilities / self._race(probabilities, key)).argmax(-1)

    def gumbel(self, probabilities: torch.Tensor, key: Key) -> torch.Tensor:
        return -self._race(probabilities, key).log()

    def drawing(self, rows: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
        return rows

    def _race(self, probabilities: torch.Tensor, key: Key) -> torch.Tensor:
        tokens = torch.arange(1, probabilities.shape[-1] + 1, device=probabilities.device)
        bits = _mix(self._hash(key).unsqueeze(-1) + tokens * _GOLDEN)
        return -torch.log1p(-_unit(bits, probabilities.dtype))
