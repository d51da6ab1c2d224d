"""Attention in two parts, so that no mask over the prefix is needed: the long prefix, which every query of a row sees
whole, by flash-attn with a length per row; and the few fellow queries, with their mask, in torch. Each part comes with
the log of its sum of exponentials, by which the two are merged exactly.

A *prefix kernel* takes queries (R, W, heads, dim), the storage of keys and of values (slots, capacity, key-value heads,
dim), lengths (R,), slots (R,) or None (the first R) and a scale; it gives the attention over the first ``lengths``
positions of each row's slot (R, W, heads, dim) and its log-sum-exp (R, heads, W), in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

Part = tuple[torch.Tensor, torch.Tensor]
"""Attention (R, W, heads, dim) over some of the keys, and its log-sum-exp (R, heads, W)."""

PrefixKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float],
    Part,
]


@cache
def prefix_kernel() -> PrefixKernel | None:
    """flash-attn 3 if it is there, else flash-attn 2, else None."""
    if not torch.cuda.is_available():
        return None
    if find_spec("flash_attn_interface") is not None:
        from flash_attn_interface import flash_attn_with_kvcache
    elif find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache
    else:
        return None
    return _of_library(flash_attn_with_kvcache)


def _of_library(attend: Callable[..., Any]) -> PrefixKernel:
    """Both releases name their arguments alike."""

    def kernel(
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None,
        scale: float,
    ) -> Part:
        rows = len(queries)
        found = attend(
            queries,
            keys if slots is not None else keys[:rows],
            values if slots is not None else values[:rows],
            cache_seqlens=lengths.to(torch.int32),
            cache_batch_idx=None if slots is None else slots.to(torch.int32),
            softmax_scale=scale,
            causal=False,
            return_softmax_lse=True,
        )
        return found[0], found[1]

    return kernel


def prefix_in_torch(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor | None,
    scale: float,
) -> Part:
    """The twin of the library's kernel: what it computes, in plain torch."""
    span = int(lengths.max())
    rows = torch.arange(len(queries), device=queries.device) if slots is None else slots
    inside = torch.arange(span, device=queries.device) < lengths.unsqueeze(1)
    mask = inside.unsqueeze(1).expand(-1, queries.shape[1], -1)
    return among_fellows(queries, keys[rows, :span], values[rows, :span], mask, scale)


def among_fellows(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float
) -> Part:
    """Attention of ``queries`` (R, W, heads, dim) over ``keys`` and ``values`` (R, K, key-value heads, dim) where
    ``visible`` (R, W, K); scores and sums in float32 at least.
    """
    rows, widest, heads, dim = queries.shape
    grouped = queries.view(rows, widest, keys.shape[2], -1, dim)
    scores = torch.einsum("rwhgd,rkhd->rhgwk", grouped, keys) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    log_mass = scores.logsumexp(-1)
    weights = (scores - log_mass.unsqueeze(-1)).exp().nan_to_num(0.0)  # of nothing: a row without a prefix
    out = torch.einsum("rhgwk,rkhd->rwhgd", weights.to(values.dtype), values)
    return out.reshape(rows, widest, heads, dim), log_mass.reshape(rows, heads, widest)


def merge(prefix: Part, fellows: Part, lengths: torch.Tensor) -> torch.Tensor:
    """Attention over both parts (R, W, heads, dim). Where ``lengths`` (R,) are zero there is no prefix, whatever its
    kernel made of it.
    """
    (before, log_before), (here, log_here) = prefix, fellows
    nothing = lengths == 0
    share = torch.sigmoid(log_before.masked_fill(nothing.view(-1, 1, 1), -torch.inf) - log_here)
    share = share.transpose(1, 2).unsqueeze(-1)
    before = before.masked_fill(nothing.view(-1, 1, 1, 1), 0)
    return (share * before + (1 - share) * here).to(here.dtype)
