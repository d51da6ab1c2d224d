"""From logits to probabilities, drafts and confidences."""

from __future__ import annotations

import torch

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.general import GREEDY
from s2d2_lmeval.decoding.sampling.random import Key, KeyedSource, RandomSource
from s2d2_lmeval.decoding.sampling.row_statistics import likeliest, probability_of


def bias_of(config: DecodingConfig, vocabulary: int, device: torch.device) -> torch.Tensor | None:
    """The values (V,) that ``logit_bias`` and ``suppress_tokens`` add to each row of logits; None if empty."""
    if not config.logit_bias and not config.suppress_tokens:
        return None
    bias = torch.zeros(vocabulary)
    for token, value in config.logit_bias:
        bias[token] = value
    bias[list(config.suppress_tokens)] = -torch.inf
    return bias.to(device)


def tables_of(config: DecodingConfig) -> int:
    """Tables of the size of some logits, themselves included, that are alive at once while tokens are drawn from them
    and judged: at most, whatever the filters (measured by ``tests/decoding/test_memory_plan.py``).
    """
    return 12 if config.sampled else 4


def probabilities(logits: torch.Tensor, config: DecodingConfig) -> torch.Tensor:
    """The distributions of ``logits`` (..., V) under the sampling options: the softmax of :func:`filtered`."""
    return filtered(logits, config).softmax(-1)


def drawn_tokens(
    logits: torch.Tensor, config: DecodingConfig, source: RandomSource, key: Key
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token (M,) drawn from each row of :func:`probabilities` of ``logits`` (M, V), with its probability (M,)."""
    if isinstance(source, KeyedSource):
        if _only_tempers(config):
            return source.draw(logits, config.temperature if config.temperature >= GREEDY else 1.0, key)
        return source.draw(filtered(logits, config), 1.0, key)
    distribution = probabilities(logits, config)
    tokens = source.categorical(distribution, key)
    return tokens, distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def filtered(logits: torch.Tensor, config: DecodingConfig) -> torch.Tensor:
    """``logits`` (..., V) after temperature, then top-k, top-p, min-p and typical-p; itself where none of them changes
    anything.

    A temperature of zero means one, unfiltered. ``nucleus_first`` is the published form of D2F: top-p, then top-k, at
    temperature zero too.
    """
    temperature, first = config.temperature, config.nucleus_first
    if temperature < GREEDY and not first:
        return logits
    if temperature >= GREEDY and temperature != 1:
        logits = logits / temperature
    if first:
        logits = _best(_nucleus(logits, config.top_p), config.top_k)
    else:
        logits = _nucleus(_best(logits, config.top_k), config.top_p)
    return _typical(_near_the_best(logits, config.min_p), config.typical_p)


def _only_tempers(config: DecodingConfig) -> bool:
    """Whether :func:`filtered` does nothing but divide by the temperature."""
    cuts = config.top_k > 0, config.top_p < 1, config.min_p > 0, config.typical_p < 1
    return not any(cuts) and not config.nucleus_first


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


def _near_the_best(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """``logits`` with all that have less than ``min_p`` of the best one's probability at minus infinity."""
    if min_p <= 0:
        return logits
    p = logits.softmax(-1)
    return logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)


def _typical(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """``logits`` with all at minus infinity but the tokens of probability ``mass`` whose surprise is nearest to the
    entropy (Meister et al., 2022).
    """
    if mass >= 1.0:
        return logits
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    oddness = (log_p + (p * log_p).nansum(-1, keepdim=True).neg()).abs()
    nearest, order = oddness.sort(dim=-1)
    last = (p.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True).clamp_max(p.shape[-1] - 1)
    return logits.masked_fill(oddness > nearest.gather(-1, last), -torch.inf)


def draft_tokens(
    logits: torch.Tensor, config: DecodingConfig, source: RandomSource, key: Key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft a token per row of ``logits`` (M, V); return tokens (M,) and their probabilities (M,).

    The argmax comes with its probability at temperature one without filters, whatever the sampling options; a
    sampled token with its probability under them.
    """
    if not config.sampled:
        return likeliest(logits)
    tokens, confidence = drawn_tokens(logits, config, source, key)
    return tokens, probability_of(logits, tokens) if config.untempered_confidence else confidence


def ranked_tokens(
    logits: torch.Tensor, config: DecodingConfig, source: RandomSource, key: Key, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` tokens (M, count) that :func:`draft_tokens` would take first from ``logits`` (M, V) under ``key``,
    best first, and their log probabilities (M, count). Nothing is drawn.

    With keyed noise, sampled tokens are known in advance.
    """
    if not config.sampled:
        log_p, tokens = logits.log_softmax(-1).topk(count, dim=-1)
        return tokens, log_p
    log_p = filtered(logits, config).log_softmax(-1)
    tokens = (log_p + source.gumbel(log_p, key)).topk(count, dim=-1).indices
    return tokens, log_p.gather(-1, tokens)
