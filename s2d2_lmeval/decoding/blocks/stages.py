"""Where rows stand in the making of a block, on the device: what a denoising step reads and what it decides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from s2d2_lmeval.decoding.generation import NOTHING
from s2d2_lmeval.decoding.readback import StepTables
from s2d2_lmeval.decoding.sampling import random


@dataclass(frozen=True)
class Stage:
    """Where every row stands, on the device.

    ``block`` (rows, B) tokens; ``index`` (rows, B) their places in the flattened store; ``position`` (rows, B);
    ``step`` (rows, 1) of the block; ``count`` (rows,) tokens that the schedule asks of it; ``given`` (rows,) prompt
    tokens in the block; ``key`` (rows, 1) names the request's randomness.
    """

    block: torch.Tensor
    index: torch.Tensor
    position: torch.Tensor
    step: torch.Tensor
    count: torch.Tensor
    given: torch.Tensor
    key: torch.Tensor

    def draws(self, purpose: int) -> random.Key:
        """Names draws at every place: a place is drawn at most once per purpose and step."""
        return random.Key(purpose, self.key, self.position, self.step)


@dataclass
class Draft:
    """The latest draft of every row (rows, B).

    Tokens, their confidence, and the entropy (nats) of their distribution if it is needed. ``sound`` is false once
    logits were no numbers.
    """

    tokens: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    sound: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device) -> Draft:
        """Before the first draft."""
        zeros = torch.zeros(shape, device=device)
        return cls(zeros.long(), zeros, zeros, torch.ones((), dtype=torch.bool, device=device))


class Decisions:
    """What one step decides: ``block``, ``masks``, ``marks`` and the ``order`` within equal marks, all (rows, B)."""

    def __init__(self, block: torch.Tensor, mask_token_id: int) -> None:
        self.block = self.before = block
        self.masks = self.masked_before = block == mask_token_id
        self.marks = self.order = torch.full_like(block, NOTHING)

    def decide(self, places: torch.Tensor, tokens: torch.Tensor, mark: int, order: torch.Tensor | None = None) -> None:
        """Write ``tokens`` at ``places``."""
        self.block = torch.where(places, tokens, self.block)
        self.masks = self.masks & ~places
        self.marks = self.marks.masked_fill(places, mark)
        if order is not None:
            self.order = torch.where(places, order, self.order)

    @property
    def count(self) -> torch.Tensor:
        """(rows,) tokens decided so far."""
        return (self.masked_before & ~self.masks).sum(-1)

    def tables(self, draft: torch.Tensor) -> StepTables[torch.Tensor]:
        """For the host; ``draft`` (rows, B) are the drafted tokens."""
        drafted = torch.where(self.masked_before, draft, self.before)
        return StepTables(self.before, drafted, self.block, self.marks, self.order)


def turn(stage: Stage, moved: torch.Tensor, mask_token_id: int, first_count: int) -> Stage:
    """The stage with the rows ``moved`` (rows,) at the beginning of their next block."""
    across = moved.unsqueeze(1)
    length = stage.block.shape[1]
    return replace(
        stage,
        block=stage.block.masked_fill(across, mask_token_id),
        index=stage.index + across * length,
        position=stage.position + across * length,
        step=stage.step.masked_fill(across, 0),
        count=stage.count.masked_fill(moved, first_count),
        given=stage.given.masked_fill(moved, 0),
    )
