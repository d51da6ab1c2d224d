"""Which masks a denoising step decides: the four published strategies, for all rows at once."""

from __future__ import annotations

import torch


def ranks(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Rank (R, L) of each place by descending ``scores`` within ``among``.

    Earlier places win ties; places outside come last.
    """
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)


def choose(
    strategy: str,
    masks: torch.Tensor,
    count: torch.Tensor,
    confidence: torch.Tensor,
    entropy: torch.Tensor | None,
    confidence_threshold: float,
    eb_threshold: float | None,
    collapse_entropy: bool = False,
    at_most_count: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose places among ``masks`` (R, L) of each row.

    ``count`` (R,) is how many the schedule asks for; it is clamped to the number of masks. ``confidence`` and
    ``entropy`` (nats) are (R, L). Returns the chosen places (R, L) and the order (R, L) in which they were chosen.

    ``sequential``               the first ``count`` masks
    ``low_confidence_static``    the ``count`` most confident
    ``low_confidence_dynamic``   all above ``confidence_threshold`` if these are at least ``count``, else as static
    ``entropy_bounded``          in ascending entropy, as many as keep the sum below ``eb_threshold``, at least one
                                 (where ``count`` is positive); ``collapse_entropy`` is the published form with one
                                 number per block,
                                 ``at_most_count`` makes ``count`` a bound, as S2D2 does
    """
    length = masks.shape[-1]
    place = torch.arange(length, device=masks.device).expand_as(masks)
    left = masks.sum(-1)
    if strategy == "sequential":
        order = ranks(-place.to(confidence.dtype), masks)
    elif strategy == "entropy_bounded":
        assert entropy is not None
        assert eb_threshold is not None
        if collapse_entropy:
            block_entropy = -(confidence * confidence.clamp_min(1e-12).log()).sum(-1, keepdim=True)
            order = ranks(-place.to(confidence.dtype), masks)
            within = (order + 1) * block_entropy < eb_threshold
        else:
            order = ranks(-entropy, masks)
            rising = entropy.masked_fill(~masks, 0).gather(-1, order.argsort(dim=-1)).cumsum(-1)
            within = rising.gather(-1, order) < eb_threshold
        affordable = (within & masks).sum(-1).clamp_min(1)
        if at_most_count:
            affordable = torch.minimum(affordable, count)
        count = torch.where(count > 0, affordable, 0)
    else:
        order = ranks(confidence, masks)
        if strategy == "low_confidence_dynamic":
            above = (masks & (confidence > confidence_threshold)).sum(-1)
            count = torch.where((above >= count) & (count > 0), above, count)
    count = torch.minimum(count, left)
    return masks & (order < count.unsqueeze(-1)), order
