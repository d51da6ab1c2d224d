"""Statistics of rows of logits, from one pass over the vocabulary.

On CUDA Triton kernels read every logit once and write a few numbers per row (:mod:`.row_statistics_triton`). Elsewhere,
and without Triton, :func:`in_torch` computes the same a few rows at a time, so that intermediate values stay in the CPU
cache.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from s2d2_lmeval.runtime.kernels.dispatch import kernel

ELEMENTS_AT_ONCE = 1 << 17
"""Logits that the torch version processes at a time."""

BLOCK, WORTH_BLOCKS = 64, 4096
"""Neighbours of which :func:`arg_max` first takes the largest: vectorised, which an argmax on the CPU is not; and the
vocabulary from which on that pays.
"""


class RowStatistics(NamedTuple):
    """Of each row (M,) of logits x: the argmax (the lowest index on ties); the largest and the second largest
    probability; log of the sum of exp x; the entropy in nats; the collision probability, the sum of squares.
    """

    token: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    normaliser: torch.Tensor
    entropy: torch.Tensor
    collision: torch.Tensor


def _triton() -> ModuleType:
    from s2d2_lmeval.decoding.sampling import row_statistics_triton

    return row_statistics_triton


def row_statistics(logits: torch.Tensor) -> RowStatistics:
    """The statistics of ``logits`` (M, V); minus infinity rules a token out, NaN makes its row NaN."""
    return RowStatistics(*statistics_of(logits))


@kernel(_triton, launches=2)
def statistics_of(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fields of :class:`RowStatistics` of ``logits`` (M, V)."""
    return tuple(in_torch(logits))


@kernel(_triton, launches=2)
def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The argmax (M,) of ``logits`` (M, V) and its probability (M,)."""
    tokens = arg_max(logits)
    return tokens, probability_of.reference(logits, tokens)


@kernel(_triton, launches=2)
def probability_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The probability (M,) of ``tokens`` (M,) under ``logits`` (M, V)."""
    return logits.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def in_torch(logits: torch.Tensor) -> RowStatistics:
    """:func:`row_statistics` without a kernel."""
    if not len(logits):
        numbers = [logits.new_empty(0) for _ in range(5)]
        return RowStatistics(torch.empty(0, dtype=torch.long, device=logits.device), *numbers)
    parts = [_of_part(part) for part in logits.split(max(1, ELEMENTS_AT_ONCE // logits.shape[1]))]
    return parts[0] if len(parts) == 1 else RowStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _of_part(logits: torch.Tensor) -> RowStatistics:
    token = arg_max(logits).unsqueeze(1)
    top = logits.gather(1, token)
    below = logits - top
    second = below.scatter(1, token, -torch.inf).amax(-1)
    weight = below.exp()
    mass = weight.sum(-1)
    # A token that is ruled out weighs nothing, however far below it is; 0 times infinity would be no number.
    surprise = torch.linalg.vecdot(weight, below.clamp_(min=-1e4))
    return RowStatistics(
        token=token.squeeze(1),
        first=1 / mass,
        second=second.exp() / mass,
        normaliser=top.squeeze(1) + mass.log(),
        entropy=mass.log() - surprise / mass,
        collision=torch.linalg.vecdot(weight, weight) / mass.square(),
    )


def arg_max(logits: torch.Tensor) -> torch.Tensor:
    """The first argmax of each row of ``logits`` (..., V)."""
    vocabulary = logits.shape[-1]
    if logits.device.type != "cpu" or vocabulary < WORTH_BLOCKS or vocabulary % BLOCK or not logits.numel():
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, BLOCK))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    index = block.unsqueeze(-1).expand(*block.shape, BLOCK)
    return block.squeeze(-1) * BLOCK + blocks.gather(-2, index).squeeze(-2).argmax(-1)
