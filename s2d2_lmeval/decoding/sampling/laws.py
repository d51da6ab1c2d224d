"""What is kept of the laws that tokens are decided by, if it is asked for: an entry of numbers for each token.

An entry has 1 + 2 K numbers: the token's log-probability, those of the K likeliest tokens, and the ids of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import pad

from s2d2_lmeval.decoding.generation import Law
from s2d2_lmeval.runtime.graphs import numbers

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.options.config import DecodingConfig


def entry_size(config: DecodingConfig) -> int:
    """Numbers of an entry; 0 if none are kept."""
    return config.logprobs * (1 + 2 * config.top_logprobs)


def entries(logits: torch.Tensor, tokens: torch.Tensor, size: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The entries (..., ``size``), in float64, of ``tokens`` (...) under the ``rows`` (...) of ``logits`` (M, V): by
    default each under the row of its place.
    """
    rows = numbers(len(logits), logits.device) if rows is None else rows
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = logits.logsumexp(-1)
    own = (logits[rows, tokens] - normaliser[rows]).unsqueeze(-1)
    best = size // 2
    if not best:
        return own.double()
    value, token = logits.topk(min(best, logits.shape[1]), dim=-1)
    value, token = value - normaliser.unsqueeze(1), token.double()
    value = pad(value, (0, best - value.shape[1]), value=-torch.inf)
    token = pad(token, (0, best - token.shape[1]))
    return torch.cat([own.double(), value[rows].double(), token[rows]], dim=-1)


def as_bits(entries: torch.Tensor) -> torch.Tensor:
    """Entries (R, W, size) as whole numbers (R, W * size), to travel among such."""
    return entries.view(torch.int64).flatten(1)


def as_laws(bits: np.ndarray, size: int) -> list[Law]:
    """What :func:`as_bits` made of the entries of one row; likeliest tokens without any probability are left out."""
    if not size:
        return []
    numbers, best = np.ascontiguousarray(bits).view(np.float64).reshape(-1, size).tolist(), size // 2
    found = []
    for own, *rest in numbers:
        likeliest = zip(rest[best:], rest[:best], strict=True)
        found.append(Law(own, [(int(token), value) for token, value in likeliest if value > -np.inf]))
    return found
