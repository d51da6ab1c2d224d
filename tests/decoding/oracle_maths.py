"""The oracle's forwards (full recompute under an explicit mask), probabilities and routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .oracle_inputs import Options

DUST = 1.0e-6  # a residual mass that is nothing but rounding: drafter and verifier agree
NEVER = 1.0e-6  # a temperature below this means "take the argmax"


class Context:
    """The committed tokens, and for each of them the row of the mask under which it was committed."""

    def __init__(self, model: Any, mask_id: int) -> None:
        self.model, self.mask_id = model, mask_id
        self.tokens: list[int] = []
        self.rows: list[Tensor] = []  # bool, one entry per token committed so far, as wide as that row saw

    def forward(self, tokens: Sequence[int], positions: Sequence[int], visible: Tensor, *, keep: bool) -> Tensor:
        """Logits (W, V) of a window; every query sees all committed tokens and what ``visible`` (W, W) says."""
        done, width = len(self.tokens), len(tokens)
        mask = torch.zeros(done + width, done + width, dtype=torch.bool)
        for i, row in enumerate(self.rows):
            mask[i, : len(row)] = row
        mask[done:, :done] = True
        mask[done:, done:] = visible
        ids = torch.tensor([self.tokens + list(tokens)])
        where = torch.tensor([list(range(done)) + list(positions)])
        with torch.no_grad():
            answer = self.model(input_ids=ids, position_ids=where, attention_mask=mask[None, None], use_cache=False)
        if keep:
            self.rows.extend(mask[done + i].clone() for i in range(width))
            self.tokens.extend(tokens)
        return answer.logits[0, done:]


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def block_causal(n: int, block: int) -> Tensor:
    index = torch.arange(n) // block
    return index[:, None] >= index[None, :]


def two_halves(n: int) -> Tensor:
    """The verifier's mask: drafted tokens are causal; mask i sees the drafted tokens before i and itself."""
    mask = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    mask[:n, :n] = causal(n)
    mask[n:, :n] = torch.ones(n, n, dtype=torch.bool).tril(-1)
    mask[n:, n:] = torch.eye(n, dtype=torch.bool)
    return mask


def wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def transformed(logits: Tensor, options: Options) -> Tensor:
    """Probabilities after temperature, then top-k, then top-p; temperature zero leaves the plain softmax.

    D2F as published: top-p before top-k, and both at temperature zero too.
    """
    logits = wide(logits)
    if options.temperature >= NEVER:
        logits = logits / options.temperature
    elif not options.nucleus_first:
        return logits.softmax(-1)
    for cut in (nucleus, best) if options.nucleus_first else (best, nucleus):
        logits = cut(logits, options)
    return logits.softmax(-1)


def best(logits: Tensor, options: Options) -> Tensor:
    if options.top_k <= 0:
        return logits
    smallest = logits.topk(min(options.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def nucleus(logits: Tensor, options: Options) -> Tensor:
    if options.top_p >= 1.0:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    over = ordered.softmax(-1).cumsum(-1) > options.top_p
    drop = torch.cat([torch.zeros_like(over[..., :1]), over[..., :-1]], -1)  # the one that crosses top_p stays
    return logits.masked_fill(torch.zeros_like(over).scatter(-1, index, drop), -math.inf)


def drafts(logits: Tensor, options: Options) -> tuple[Tensor, bool]:
    """The law that drafts and their confidence come from, and whether they are sampled from it."""
    sampled = options.do_sample and options.temperature >= NEVER
    return transformed(logits, options) if sampled or options.nucleus_first else wide(logits).softmax(-1), sampled


def entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-12).log()).sum(-1)


def by_confidence(positions: Sequence[int], confidence: Tensor) -> list[int]:
    return sorted(positions, key=lambda i: -float(confidence[i]))


def top(count: int, positions: Sequence[int], confidence: Tensor) -> list[int]:
    """The ``count`` most confident of the ``positions``, chosen among equals by the operation of the published code."""
    eligible = torch.full_like(confidence, -math.inf)
    eligible[list(positions)] = confidence[list(positions)]
    return eligible.topk(count).indices.tolist()


def residual(draft: Tensor, target: Tensor) -> Tensor:
    """What is left of the verifier's law where it exceeds the drafter's, normalised; all of it if nothing is left."""
    excess = (target - draft).clamp_min(0.0)
    mass = excess.sum()
    return excess / mass if bool(torch.isfinite(mass)) and float(mass) > DUST else target


class Router:
    """Whether a step pays for the verifier. Its state lives as long as one sequence."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.on = False
        self.time = 0
        self.visits: dict[tuple[int, int], int] = {}
        self.total: dict[tuple[int, int], float] = {}
        self.bucket = 0

    def decide(
        self, p: Tensor, span: list[int], masked: list[int], high: list[int], progress: int, confidence: Tensor
    ) -> bool:
        options = self.options
        if options.do_verify_policy == "mask_span_length":
            long_enough = len(span) >= options.min_ssd_span_length
            if not options.legacy_ssd_span_strategy:
                return long_enough
            return long_enough or len(high) < min(options.min_ssd_span_length, len(masked))
        if options.do_verify_policy == "contextual_bandit_ucb":
            return self._bandit(p, span, masked, progress)
        score = self.expected(p, span, confidence)
        many = len(high) if options.do_verify_score_type == "difference_dynamic" else 1
        score -= options.score_penalty_coef * many
        if options.do_verify_policy == "score_threshold":
            return score >= options.do_verify_score_threshold
        assert options.do_verify_policy == "score_hysteresis"
        self.on = score >= options.hysteresis_threshold_off if self.on else score > options.hysteresis_threshold_on
        return self.on

    def expected(self, p: Tensor, span: list[int], confidence: Tensor) -> float:
        """Expected number of accepted tokens if every token is accepted on its own with probability alpha."""
        total, product = 0.0, 1.0
        for alpha in self.alpha(p[span], confidence[span]).clamp(0.0, 1.0).tolist():
            product *= alpha
            total += product
        return total

    def alpha(self, p: Tensor, confidence: Tensor) -> Tensor:
        options = self.options
        top = p.topk(2, dim=-1).values
        margin = top[:, 0] - top[:, 1]
        spread = entropy(p) / math.log(p.shape[-1])
        match options.token_acceptance_estimator:
            case "hard_margin_threshold":
                return (margin > options.ssd_confidence_margin_threshold).to(p.dtype)
            case "hard_entropy_threshold":
                return (spread < options.ssd_entropy_threshold).to(p.dtype)
            case "soft_confidence_power":
                return confidence.pow(options.ssd_confidence_power)
            case "soft_clipped_linear_margin":
                return (options.ssd_confidence_margin_coef * margin).clamp(0.0, 1.0)
            case "soft_entropy_negexp":
                return (-options.ssd_entropy_temperature * spread).exp()
            case "soft_renyi_2_entropy":
                return p.pow(2).sum(-1)
        raise AssertionError(options.token_acceptance_estimator)

    def _bandit(self, p: Tensor, span: list[int], masked: list[int], progress: int) -> bool:
        options, size = self.options, self.options.block_length
        self.time += 1
        source = p[span] if options.ucb_entropy_source == "span" else p[masked]
        spread = float(entropy(source).mean()) / math.log(p.shape[-1])

        def bin_of(share: float, bins: int) -> int:
            return min(bins - 1, int(min(max(share, 0.0), 1.0) * bins))

        length = bin_of((len(span) - 1) / max(1, size - 1), options.ucb_span_length_bins)
        done = bin_of(progress / size, options.ucb_block_progress_bins)
        unsure = bin_of(spread, options.ucb_entropy_bins)
        self.bucket = (length * options.ucb_block_progress_bins + done) * options.ucb_entropy_bins + unsure

        def bound(action: int) -> float:
            n = self.visits.get((action, self.bucket), 0)
            if n == 0:
                return math.inf
            mean = self.total[action, self.bucket] / n
            return mean + options.ucb_beta * math.sqrt(math.log(self.time) / n)

        return bound(1) >= bound(0)

    def reward(self, committed: int, verified: bool) -> None:
        key = (int(verified), self.bucket)
        self.visits[key] = self.visits.get(key, 0) + 1
        self.total[key] = self.total.get(key, 0.0) + committed / (2 if verified else 1)
