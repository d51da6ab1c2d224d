"""From logits to probabilities, drafts and confidences."""

from __future__ import annotations

import torch

from s2d2_lmeval.decoding.config import DecodingConfig
from s2d2_lmeval.decoding.random import Key, RandomSource


def probabilities(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Softmax of ``logits`` (..., V) after temperature, then top-k, then top-p.

    A temperature of zero means one, unfiltered.
    """
    if temperature < 1e-6:
        return logits.softmax(-1)
    scaled = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        weakest = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < weakest, -torch.inf)
    if top_p < 1.0:
        ordered, order = scaled.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        beyond = mass > top_p
        # The token that crosses the bound stays: shift right by one, and the first always stays.
        beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)
        scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return scaled.softmax(-1)


def draft_tokens(
    logits: torch.Tensor, config: DecodingConfig, source: RandomSource, key: Key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft a token per row of ``logits`` (M, V); return tokens (M,) and their probabilities (M,).

    The arg-max comes with its probability at temperature one without filters, whatever the sampling options say; a
    sampled token with its probability under them.
    """
    if config.sampled:
        distribution = probabilities(logits, config.temperature, config.top_k, config.top_p)
        tokens = source.categorical(distribution, key)
    else:
        distribution = logits.softmax(-1)
        tokens = logits.argmax(-1)
    return tokens, distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
