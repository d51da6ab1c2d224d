"""What a decoder layer does between its matrix products, rounded where transformers' modules round."""

from __future__ import annotations

from types import ModuleType

import torch
from torch.nn.functional import silu

from s2d2_lmeval.runtime.kernels.dispatch import kernel


def _triton() -> ModuleType:
    from s2d2_lmeval.runtime.kernels import layer_triton

    return layer_triton


@kernel(_triton)
def add_norm(
    stream: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual ``stream`` (N, H) with ``added`` (N, H), if anything is; and its RMS norm times ``weight`` (H,).
    Without ``added`` the first is a copy.
    """
    stream = stream.clone() if added is None else stream + added
    return stream, _normed(stream, weight, eps)


@kernel(_triton, writes=("keys", "values"))
def rope_write(
    projected: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destinations: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Queries (N, heads, dim), normalised and rotated; their keys, likewise, and values go into the cache.

    Args:
        projected: (N, (heads + 2 * key-value heads) * dim), queries, keys and values of each token side by side.
        query_norm: (dim,) weight of the norm of each head's query; None where the model has none, as ``key_norm``.
        cos: (N, dim) as transformers' rotary embeddings give it, as ``sin``.
        destinations: (N,) place of each token as slot * capacity + position.
        keys: storage (slots, capacity, key-value heads, dim), as ``values``.
    """
    count, dim = keys.shape[2:]
    heads = projected.unflatten(1, (-1, dim))
    queries, fresh, kept = heads.split([heads.shape[1] - 2 * count, count, count], dim=1)
    if query_norm is not None and key_norm is not None:
        queries, fresh = _normed(queries, query_norm, eps), _normed(fresh, key_norm, eps)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    keys.view(-1, count, dim).index_copy_(0, destinations, _rotated(fresh, cos, sin))
    values.view(-1, count, dim).index_copy_(0, destinations, kept)
    return _rotated(queries, cos, sin)


@kernel(_triton)
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half times the second: (N, I) of (N, 2 * I)."""
    gate, up = gate_up.chunk(2, dim=1)
    return silu(gate) * up


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
