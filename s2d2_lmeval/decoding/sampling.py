"""From logits to probabilities, drafts and confidences."""

from __future__ import annotations

from typing import cast

import torch

from s2d2_lmeval.decoding.config import DecodingConfig
from s2d2_lmeval.decoding.random import Key, KeyedNoise, RandomSource
from s2d2_lmeval.decoding.row_statistics import likeliest


def probabilities(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, nucleus_first: bool = False
) -> torch.Tensor:
    """The distributions of ``logits`` (..., V) under the sampling options: the softmax of :func:`filtered`."""
    return filtered(logits, temperature, top_k, top_p, nucleus_first).softmax(-1)


def filtered(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, nucleus_first: bool = False
) -> torch.Tensor:
    """``logits`` (..., V) after temperature, then top-k, then top-p; itself where none of them changes anything.

    A temperature of zero means one, unfiltered. ``nucleus_first`` is the published form of D2F: top-p, then top-k, at
    temperature zero too.
    """
    if temperature < 1e-6 and not nucleus_first:
        return logits
    if temperature >= 1e-6 and temperature != 1:
        logits = logits / temperature
    if nucleus_first:
        return _best(_nucleus(logits, top_p), top_k)
    return _nucleus(_best(logits, top_k), top_p)


def _best(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """``logits`` with all but the ``top_k`` largest at minus infinity."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """``logits`` with all but the smallest set of probability ``top_p`` at minus infinity."""
    if top_p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    beyond = ordered.softmax(-1).cumsum(-1) > top_p
    # The token that crosses the bound stays: shift right by one, and the first always stays.
    beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)


def draft_tokens(
    logits: torch.Tensor, config: DecodingConfig, source: RandomSource, key: Key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft a token per row of ``logits`` (M, V); return tokens (M,) and their probabilities (M,).

    The arg-max comes with its probability at temperature one without filters, whatever the sampling options say; a
    sampled token with its probability under them.
    """
    if not config.sampled:
        return likeliest(logits)
    distribution = probabilities(logits, config.temperature, config.top_k, config.top_p)
    tokens = source.categorical(distribution, key)
    return tokens, distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def ranked_tokens(
    logits: torch.Tensor, config: DecodingConfig, source: RandomSource, key: Key, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` tokens (M, count) that :func:`draft_tokens` would take first from ``logits`` (M, V) under ``key``,
    best first, and their log probabilities (M, count). Nothing is drawn.

    A sampled token is known beforehand as far as the noise is; from a sequential source nothing is known but the odds.
    """
    if not config.sampled:
        log_p, tokens = logits.log_softmax(-1).topk(count, dim=-1)
        return tokens, log_p
    distribution = probabilities(logits, config.temperature, config.top_k, config.top_p)
    score = log_p = distribution.log()
    if not source.sequential:
        score = log_p + cast(KeyedNoise, source).gumbel(distribution, key)
    tokens = score.topk(count, dim=-1).indices
    return tokens, log_p.gather(-1, tokens)
