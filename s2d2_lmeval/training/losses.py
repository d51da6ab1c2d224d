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

Head = Callable[[torch.Tensor], torch.Tensor]


def weights(known: torch.Tensor, decay: float) -> torch.Tensor:
    """(K, W) weight of each mask, which falls by e over ``decay`` places; zero for what is not ``known``."""
    place = torch.arange(known.shape[1], device=known.device)
    return known * torch.exp(-place / decay)


def draft_loss(
    head: Head, drafted: torch.Tensor, taught: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor, by_law: bool
) -> torch.Tensor:
    """The mean loss of masks, of the hidden states that they (``drafted`` (M, H)) and the target's queries in their
    place (``taught`` (M, H)) end in; ``truth`` and ``weight`` are (M,).

    Args:
        by_law: L1 to the target's law, and a little of the cross entropy to its token; otherwise that alone.
    """
    used = weight.nonzero().squeeze(1)
    total = drafted.new_zeros((), dtype=torch.float32)
    for rows in used.split(ROWS):
        part = drafted[rows], taught[rows], truth[rows], weight[rows]
        total = total + checkpoint(_of_rows, head, *part, by_law, use_reentrant=False)
    return total / weight.sum()


def _of_rows(
    head: Head, drafted: torch.Tensor, taught: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor, by_law: bool
) -> torch.Tensor:
    logits = head(drafted).float()
    entropy = F.cross_entropy(logits, truth, reduction="none")
    if not by_law:
        return (entropy * weight).sum()
    with torch.no_grad():
        law = head(taught).float().softmax(-1)
    distance = (logits.softmax(-1) - law).abs().sum(-1)
    return ((CE_SHARE * entropy + (1 - CE_SHARE) * distance) * weight).sum()


@torch.no_grad()
def hits(head: Head, drafted: torch.Tensor, truth: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """(K, W) whether each mask's best token is that of the text (K, W); never beyond its end."""
    best = torch.cat([head(rows).argmax(-1) for rows in drafted.split(ROWS)])
    return (best.view(truth.shape) == truth) & known
