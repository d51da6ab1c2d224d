"""The remasking strategies: which masks a denoising step decides, for all rows at once.

A strategy is a function of an :class:`Undecided` to (order, count): the rank (R, L) of every mask, and how many (R,) of
them to decide. It is registered under the value of ``remasking_strategy``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.reference import most_confident, within_collapsed_entropy
from s2d2_lmeval.registry import STRATEGIES
from s2d2_lmeval.runtime.graphs import numbers


@dataclass
class Undecided:
    """The input of a strategy: R rows of L places.

    ``masks`` (R, L); ``count`` (R,) is how many the schedule asks for; ``confidence`` and ``entropy`` (nats; only where
    ``entropy_bounded`` is in force and not collapsed) are (R, L); ``at_most_count``: ``count`` is a bound, as in S2D2;
    ``breaks_ties`` as :class:`~s2d2_lmeval.decoding.reference.Rules` say.
    """

    masks: torch.Tensor
    count: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    config: DecodingConfig
    at_most_count: bool = False
    breaks_ties: bool = False

    def most_confident(self, more: torch.Tensor | None = None) -> torch.Tensor:
        """Rank (R, L) of every mask by descending confidence; the first ``count`` are to be decided, or ``more`` (R,)
        says that more are.
        """
        order = ranks(self.confidence, self.masks)
        if not self.breaks_ties or (more is not None and bool(more)):
            return order
        return most_confident(self.confidence.masked_fill(~self.masks, -torch.inf), order, self.count)

    def from_left(self) -> torch.Tensor:
        """Rank (R, L) of every mask from left to right."""
        place = numbers(self.masks.shape[-1], self.masks.device).expand_as(self.masks)
        return ranks(-place.to(self.confidence.dtype), self.masks)


def ranks(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Rank (R, L) of each place by descending ``scores`` within ``among``.

    Earlier places win ties; places outside come last.
    """
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)


def choose(strategy: str, step: Undecided) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks (R, L) that the strategy decides, at most as many as there are, and their order (R, L)."""
    order, count = STRATEGIES[strategy].implementation(step)
    return step.masks & (order < count.unsqueeze(-1)), order


@STRATEGIES.register("sequential")
def sequential(step: Undecided) -> tuple[torch.Tensor, torch.Tensor]:
    """The first masks."""
    return step.from_left(), step.count


@STRATEGIES.register("low_confidence_static")
def low_confidence_static(step: Undecided) -> tuple[torch.Tensor, torch.Tensor]:
    """The most confident masks."""
    return step.most_confident(), step.count


@STRATEGIES.register("low_confidence_dynamic")
def low_confidence_dynamic(step: Undecided) -> tuple[torch.Tensor, torch.Tensor]:
    """All above ``confidence_threshold`` if these are enough, else the most confident."""
    above = (step.masks & (step.confidence > step.config.confidence_threshold)).sum(-1)
    enough = (above >= step.count) & (step.count > 0)
    return step.most_confident(enough), torch.where(enough, above, step.count)


@STRATEGIES.register("entropy_bounded")
def entropy_bounded(step: Undecided) -> tuple[torch.Tensor, torch.Tensor]:
    """In ascending entropy, as many as keep the sum below ``eb_threshold``, but at least one if any are requested.

    ``collapse_entropy`` is the published form with one number per block.
    """
    masks, bound = step.masks, step.config.eb_threshold
    assert bound is not None
    if step.config.collapse_entropy:
        order = step.from_left()
        within = within_collapsed_entropy(step.confidence, order, bound)
    else:
        order = ranks(-step.entropy, masks)
        rising = step.entropy.masked_fill(~masks, 0).gather(-1, order.argsort(dim=-1)).cumsum(-1)
        within = rising.gather(-1, order) < bound
    affordable = (within & masks).sum(-1).clamp_min(1)
    if step.at_most_count:
        affordable = torch.minimum(affordable, step.count)
    return order, torch.where(step.count > 0, affordable, 0)
