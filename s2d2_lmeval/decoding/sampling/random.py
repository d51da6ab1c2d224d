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
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from s2d2_lmeval.decoding.reference import FixedSource, SequentialSource, TorchDraws
from s2d2_lmeval.decoding.sampling.hashing import GOLDEN, hashed, mixed
from s2d2_lmeval.runtime.graphs import numbers
from s2d2_lmeval.runtime.kernels.dispatch import kernel

DRAFT, ACCEPT, RESAMPLE, NOISE = 1, 2, 3, 4
"""The purpose of a draw."""

LARGEST = (1 << 62) - 1


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

    def words(self) -> Words:
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


def _unit(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The upper 32 of 64 random bits as a number in (0, 1), small values at full relative precision."""
    return (((bits >> 32) & 0xFFFFFFFF).to(dtype) + 0.5) * 2.0**-32


def _triton() -> ModuleType:
    from s2d2_lmeval.decoding.sampling import random_triton

    return random_triton


Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Request, position and draw, int64, to be broadcast: to (M,) for draws from M distributions."""


def _bits(words: Words, seed: int, purpose: int) -> torch.Tensor:
    if words[0].device.type == "cpu":  # dozens of operations on a few numbers: numpy takes half of torch's time
        return torch.from_numpy(hashed(seed, purpose, tuple(word.numpy() for word in words)))
    return hashed(seed, purpose, words)


def _race(like: torch.Tensor, words: Words, seed: int, purpose: int) -> torch.Tensor:
    """Exponential noise (M, V) keyed by position and token: when each runner arrives."""
    tokens = numbers(like.shape[-1] + 1, like.device)[1:]
    bits = mixed(_bits(words, seed, purpose).unsqueeze(-1) + tokens * GOLDEN)
    return -torch.log1p(-_unit(bits, like.dtype))


@kernel(_triton, launches=2)
def keyed_uniform(
    request: torch.Tensor, position: torch.Tensor, draw: torch.Tensor, seed: int, purpose: int
) -> torch.Tensor:
    """Numbers in [0, 1), of the words' broadcast shape."""
    # 24 bits: a float32 below one. (0.5 + 32 bits would round up to one.)
    return ((_bits((request, position, draw), seed, purpose) >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


@kernel(_triton, launches=3)
def keyed_categorical(
    probabilities: torch.Tensor,
    request: torch.Tensor,
    position: torch.Tensor,
    draw: torch.Tensor,
    seed: int,
    purpose: int,
) -> torch.Tensor:
    """A token (M,) from each row of ``probabilities`` (M, V), by the exponential race: v wins with probability p_v."""
    return (probabilities / _race(probabilities, (request, position, draw), seed, purpose)).argmax(-1)


@kernel(_triton, launches=3)
def keyed_draw(
    logits: torch.Tensor,
    temperature: float,
    request: torch.Tensor,
    position: torch.Tensor,
    draw: torch.Tensor,
    seed: int,
    purpose: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`keyed_categorical` draws from the softmax of ``logits`` (M, V) over ``temperature``, with its
    probability (M,).
    """
    law = (logits if temperature == 1 else logits / temperature).softmax(-1)
    tokens = keyed_categorical.reference(law, request, position, draw, seed, purpose)
    return tokens, law.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@kernel(_triton, launches=2)
def keyed_gumbel(
    like: torch.Tensor, request: torch.Tensor, position: torch.Tensor, draw: torch.Tensor, seed: int, purpose: int
) -> torch.Tensor:
    """Noise (M, V) of the shape and type of ``like``: the arg-max of it and log p is the token that is drawn from p."""
    return -_race(like, (request, position, draw), seed, purpose).log()


def noise_tokens(words: tuple[np.ndarray, ...], low: int, high: int) -> np.ndarray:
    """Token ids in [low, high), uniform and a function of the ``words`` (int64, of one shape)."""
    return low + (hashed(0, NOISE, words) >> 1 & LARGEST) % (high - low)


class KeyedSource:
    """Counter-based: hashes the key, so any draw can be made at any time, in any batch, on any device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniform(self, key: Key, needed: torch.Tensor) -> torch.Tensor:
        return keyed_uniform(*key.words(), self.seed, key.purpose)

    def categorical(self, probabilities: torch.Tensor, key: Key) -> torch.Tensor:
        return keyed_categorical(probabilities, *key.words(), self.seed, key.purpose)

    def draw(self, logits: torch.Tensor, temperature: float, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`categorical` from the softmax of ``logits`` (M, V) over ``temperature``, with the token's
        probability.
        """
        return keyed_draw(logits, temperature, *key.words(), self.seed, key.purpose)

    def gumbel(self, probabilities: torch.Tensor, key: Key) -> torch.Tensor:
        return keyed_gumbel(probabilities, *key.words(), self.seed, key.purpose)

    def drawing(self, rows: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
        return rows
