"""What a drafter is trained to: the target's token, then the target's law, and most of all at the window's beginning.

The probability that a draw of the target is accepted is one minus half the L1 distance of the two laws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROWS = 256
"""Rows of logits that are held at once."""
CE_SHARE = 0.1
"""What is left of the cross entropy when the loss is L1: of tokens that are far from drafted, L1 has no gradient."""
PACE = 0.5
"""Share of a token's probability that D-PACE takes for granted."""

Head = Callable[[torch.Tensor], torch.Tensor]


def by_place(known: torch.Tensor, decay: float) -> torch.Tensor:
    """(K, W) weight of each mask, which falls by e over ``decay`` places; zero for what is not ``known``."""
    place = torch.arange(known.shape[1], device=known.device)
    return known * torch.exp(-place / decay)


def by_pace(known: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """(K, W) weight of each mask by the ``probability`` (K, W) of the tokens: how many of a draft's tokens are expected
    to be accepted from there on (D-PACE, as in SpecForge); zero for what is not ``known``.
    """
    reached = ((1 - PACE) * probability + PACE).cumprod(1) * known
    return reached.flip(1).cumsum(1).flip(1) * known


def draft_loss(
    head: Head,
    drafted: torch.Tensor,
    taught: torch.Tensor | None,
    truth: torch.Tensor,
    known: torch.Tensor,
    decay: float | None,
) -> torch.Tensor:
    """The mean loss of masks, which end in the hidden states ``drafted`` (K * W, H), weighted by place with ``decay``
    or, without, by pace. ``truth`` and ``known`` are (K, W).

    Args:
        taught: hidden states (K * W, H) of the target's queries in their place; the loss is L1 to their law, and a
            little of the cross entropy to the token. None: that alone.
    """
    used = known.flatten().nonzero().squeeze(1)
    losses, probabilities = [], []
    for rows in used.split(ROWS):
        teacher = None if taught is None else taught[rows]
        loss, probability = checkpoint(
            _of_rows, head, drafted[rows], teacher, truth.flatten()[rows], use_reentrant=False
        )
        losses.append(loss)
        probabilities.append(probability.detach())
    if decay is None:
        probability = torch.zeros_like(truth, dtype=torch.float32).masked_scatter(known, torch.cat(probabilities))
        weight = by_pace(known, probability)
    else:
        weight = by_place(known, decay)
    chosen = weight[known]
    return (torch.cat(losses) * chosen).sum() / chosen.sum()


def _of_rows(
    head: Head, drafted: torch.Tensor, taught: torch.Tensor | None, truth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row, and the probability of its token."""
    logits = head(drafted).float()
    entropy = F.cross_entropy(logits, truth, reduction="none")
    probability = (-entropy).exp()
    if taught is None:
        return entropy, probability
    with torch.no_grad():
        law = head(taught).float().softmax(-1)
    distance = (logits.softmax(-1) - law).abs().sum(-1)
    return CE_SHARE * entropy + (1 - CE_SHARE) * distance, probability


@torch.no_grad()
def hits(head: Head, drafted: torch.Tensor, truth: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """(K, W) whether each mask's best token is that of the text (K, W); never beyond its end."""
    best = torch.cat([head(rows).argmax(-1) for rows in drafted.split(ROWS)])
    return (best.view(truth.shape) == truth) & known
