"""When to verify: the four published routing policies and ``throughput``, for all rows at once.

A policy keeps its state per row, from a request's first block to its last; nothing is reset between blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.reference import verifies_short_span
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.registry import POLICIES
from s2d2_lmeval.runtime.costs import MeasureCosts
from s2d2_lmeval.runtime.graphs import Tables, numbers

ONE_BLOCK = ("block", "editing", "subblock")
"""Schemes in which one block is open at a time."""


@dataclass(frozen=True)
class DraftView:
    """The input of a policy: R rows of L places, after a draft.

    ``drafting`` (R,) rows that drafted in this step; ``masks`` (R, L) undecided places; ``span`` (R, L) the first run
    of masks;
    ``confidence``, ``acceptance`` (estimated) and ``entropy`` (normalised; None unless the policy reads it) (R, L);
    ``decided`` (R,) tokens decided in this block so far, the prompt's not counted; ``denoised`` (R,) tokens that the
    step decides if it does not verify (None unless the policy reads it); ``in_flight`` (1,) rows that share a forward.
    """

    drafting: torch.Tensor
    masks: torch.Tensor
    span: torch.Tensor
    confidence: torch.Tensor
    acceptance: torch.Tensor
    entropy: torch.Tensor | None
    decided: torch.Tensor
    denoised: torch.Tensor | None = None
    in_flight: torch.Tensor | None = None


class RoutingPolicy(ABC):
    """Decides which drafts are verified, in blocks of L places of ``rows`` rows.

    A class registers itself under the value of ``do_verify_policy``:
    ``@POLICIES.register("name", options=…)``, with schemes if it only fits some.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """Those of ``acceptance``, ``entropy`` and ``denoised`` that it uses; the others are not computed."""
    always = False
    """Whether it always verifies every draft."""

    def __init__(self, config: DecodingConfig, rows: int, length: int, tables: Tables) -> None:
        self.config = config

    @abstractmethod
    def decide(self, view: DraftView) -> torch.Tensor:
        """Which rows (R,) go on to the verifier."""

    def calibrate_costs(self, measure_costs: MeasureCosts, ahead: int) -> None:  # noqa: B027
        """Called before the first request: a policy that needs forward costs measures them here. A verification
        carries ``ahead`` queries of the next block.
        """

    def judged(self, span: torch.Tensor, accepted: torch.Tensor, rejected: torch.Tensor) -> None:  # noqa: B027
        """Learn from verified spans (R, L): their ``accepted`` prefix, and the first ``rejected`` place (R,).

        The tokens after it were not judged.
        """

    def reward(self, finished: torch.Tensor, verified: bool, decided: torch.Tensor) -> None:  # noqa: B027
        """Learn from rows (R,) whose step is complete: whether it verified and how many tokens (R,) it ``decided``."""

    def reset(self, row: int) -> None:  # noqa: B027
        """Forget a row's history, because another request starts there."""


def policy_of(config: DecodingConfig, scheme: str, rows: int, length: int, tables: Tables) -> RoutingPolicy:
    """The policy that the option ``do_verify_policy`` names.

    Raises:
        ConfigError: it does not fit the ``scheme`` of the family.
    """
    entry = POLICIES.find(config.do_verify_policy, scheme)
    if entry is None:
        raise ConfigError(f"do_verify_policy={config.do_verify_policy} is made for one block at a time; use another.")
    policy: RoutingPolicy = entry.implementation(config, rows, length, tables)
    return policy


def expected_accepted(acceptance: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """Expected length (R,) of the accepted prefix of the span: the sum over its places of the product of ``acceptance``
    up to each.
    """
    survival = torch.where(span, acceptance, 1).cumprod(-1)
    return (survival * span).sum(-1)


def score(view: DraftView, config: DecodingConfig) -> torch.Tensor:
    """Expected accepted tokens minus the cost of verifying (R,); minus infinity where the span is empty."""
    gain = expected_accepted(view.acceptance, view.span)
    if config.do_verify_score_type == "difference_static":
        value = gain - config.score_penalty_coef
    else:
        confident = (view.masks & (view.confidence > config.confidence_threshold)).sum(-1)
        value = gain - config.score_penalty_coef * confident
    return value.masked_fill(~view.span.any(-1), -torch.inf)


@POLICIES.register("mask_span_length")
class SpanLengthPolicy(RoutingPolicy):
    """Verify spans of at least ``min_ssd_span_length`` masks.

    Legacy: skip a short span only if enough masks are confident.
    """

    def __init__(self, config: DecodingConfig, rows: int, length: int, tables: Tables) -> None:
        super().__init__(config, rows, length, tables)
        self.always = config.min_ssd_span_length <= 1 and not config.legacy_ssd_span_strategy

    def decide(self, view: DraftView) -> torch.Tensor:
        shortest = self.config.min_ssd_span_length
        long = view.span.sum(-1) >= shortest
        if not self.config.legacy_ssd_span_strategy:
            return long
        confident = view.masks & (view.confidence > self.config.confidence_threshold)
        return long | verifies_short_span(view.masks, confident, shortest)


@POLICIES.register("score_threshold")
class ScorePolicy(RoutingPolicy):
    """Verify if the score reaches ``do_verify_score_threshold``."""

    reads = frozenset({"acceptance"})

    def decide(self, view: DraftView) -> torch.Tensor:
        return score(view, self.config) >= self.config.do_verify_score_threshold


@POLICIES.register("score_hysteresis")
class HysteresisPolicy(ScorePolicy):
    """Start verifying above one score, stop below a lower one."""

    def __init__(self, config: DecodingConfig, rows: int, length: int, tables: Tables) -> None:
        super().__init__(config, rows, length, tables)
        self.on = tables.full("policy.on", (rows,), False, torch.bool)

    def decide(self, view: DraftView) -> torch.Tensor:
        value = score(view, self.config)
        decision = torch.where(
            self.on, value >= self.config.hysteresis_threshold_off, value > self.config.hysteresis_threshold_on
        )
        self.on.copy_(torch.where(view.drafting, decision, self.on))
        return decision

    def reset(self, row: int) -> None:
        self.on[row] = False


@POLICIES.register("contextual_bandit_ucb", *ONE_BLOCK)
class BanditPolicy(RoutingPolicy):
    """Upper confidence bounds (UCB1) over {skip, verify}, a table per bucket of span length, progress and entropy.

    The reward of a step is its decided tokens per forward. An action that was never tried in a bucket is tried first,
    verification before skipping.
    """

    reads = frozenset({"entropy"})

    def __init__(self, config: DecodingConfig, rows: int, length: int, tables: Tables) -> None:
        super().__init__(config, rows, length, tables)
        buckets = config.ucb_span_length_bins * config.ucb_block_progress_bins * config.ucb_entropy_bins
        self.pulls, self.gained = (
            tables.full(f"policy.{name}", (rows, 2, buckets), 0, torch.float64) for name in ("pulls", "gained")
        )
        self.decisions = tables.full("policy.decisions", (rows,), 0, torch.float64)
        self.bucket = tables.full("policy.bucket", (rows,))

    def _bucket_of(self, view: DraftView) -> torch.Tensor:
        config, length = self.config, view.masks.shape[-1]

        def binned(ratio: torch.Tensor, bins: int) -> torch.Tensor:
            return (ratio.clamp(0, 1) * bins).long().clamp_max(bins - 1)

        assert view.entropy is not None
        source = view.span if config.ucb_entropy_source == "span" else view.masks
        entropy = (view.entropy * source).sum(-1) / source.sum(-1).clamp_min(1)
        span = binned((view.span.sum(-1) - 1) / max(length - 1, 1), config.ucb_span_length_bins)
        progress = binned(view.decided / length, config.ucb_block_progress_bins)
        return (span * config.ucb_block_progress_bins + progress) * config.ucb_entropy_bins + binned(
            entropy, config.ucb_entropy_bins
        )

    def decide(self, view: DraftView) -> torch.Tensor:
        asked = view.drafting & view.span.any(-1)
        self.decisions += asked
        self.bucket.copy_(torch.where(asked, self._bucket_of(view), self.bucket))
        index = self.bucket.view(-1, 1, 1).expand(-1, 2, 1)
        pulls = self.pulls.gather(2, index).squeeze(2)
        bonus = (self.decisions.clamp_min(1).log().unsqueeze(1) / pulls.clamp_min(1)).sqrt()
        mean = self.gained.gather(2, index).squeeze(2) / pulls.clamp_min(1)
        bound = mean + self.config.ucb_beta * bonus
        skip, verify = bound.masked_fill(pulls == 0, torch.inf).unbind(1)
        return verify >= skip

    def reward(self, finished: torch.Tensor, verified: bool, decided: torch.Tensor) -> None:
        row = numbers(len(finished), finished.device)
        place = (row, torch.full_like(row, int(verified)), self.bucket)
        self.pulls[place] += finished
        self.gained[place] += decided.double() / (2 if verified else 1) * finished

    def reset(self, row: int) -> None:
        self.pulls[row] = 0
        self.gained[row] = 0
        self.decisions[row] = 0


BINS = 8
"""Number of bins of the estimator's guess."""

PRIOR = 2.0
"""Pseudo-count of the estimator's own guess."""


class AcceptanceCurve:
    """The verifier's acceptance rate as a function of the estimator's guess, per row or for the whole run.

    Counts are (rows, BINS). ``pooled`` curves use every outcome of the run; others only those of their own row's
    request, so that decisions do not depend on the batch.
    """

    def __init__(self, rows: int, pooled: bool, tables: Tables) -> None:
        self.pooled = pooled
        self.tried, self.accepted = (
            tables.full(f"curve.{name}", (rows, BINS), 0, torch.float64) for name in ("tried", "accepted")
        )

    @staticmethod
    def bin(guess: torch.Tensor) -> torch.Tensor:
        """The bin of each ``guess``."""
        return (guess.nan_to_num().clamp(0, 1) * BINS).long().clamp_max(BINS - 1)

    def __call__(self, guess: torch.Tensor) -> torch.Tensor:
        """Probability of acceptance, from the estimator's ``guess`` (rows, L).

        A rarely tried bin gets the benefit of the doubt; otherwise it would never be learned.
        """
        index = self.bin(guess)
        tried, accepted = (
            (counts.sum(0, keepdim=True).expand_as(counts) if self.pooled else counts).gather(1, index)
            for counts in (self.tried, self.accepted)
        )
        mean = (accepted + PRIOR * guess) / (tried + PRIOR)
        return (mean + 0.5 / (1 + tried).sqrt()).clamp(0, 1)

    def learn(self, index: torch.Tensor, judged: torch.Tensor, accepted: torch.Tensor) -> None:
        """Take outcomes over: of the places ``judged`` (rows, L), whose guesses lie in ``index``, the ``accepted``."""
        self.tried.scatter_add_(1, index, judged.double())
        self.accepted.scatter_add_(1, index, accepted.double())

    def reset(self, row: int) -> None:
        """Another request begins in ``row``."""
        if not self.pooled:
            self.tried[row] = 0
            self.accepted[row] = 0


@POLICIES.register("throughput", *ONE_BLOCK)
class ThroughputPolicy(RoutingPolicy):
    """Verify if the expected gain in tokens is worth the time; no thresholds.

    A verification takes a forward and decides the accepted prefix of the span and the token after it; without it the
    remasking strategy decides its own tokens. So verification gains G more tokens for a time c. Elsewhere the same time
    would decode at this run's rate r (tokens decided so far over time spent). The policy verifies if G >= r c: the
    marginal value theorem (Charnov, 1976), under which no other mix of the two decodes faster.

    * c is measured before the run, for the batch and every length of the span, or given as ``verify_cost_ratio``.
    * G follows from the acceptance probability of each token of the span: the estimator's guess, corrected by how often
      tokens with such a guess were accepted so far (:class:`AcceptanceCurve`).
    """

    reads = frozenset({"acceptance", "denoised"})

    def __init__(self, config: DecodingConfig, rows: int, length: int, tables: Tables) -> None:
        super().__init__(config, rows, length, tables)
        self.lookahead = config.schedule == "lookahead"
        self.replaces = config.allow_resample or config.acceptance == "greedy"
        given = config.verify_cost_ratio
        # Measured costs are not reproducible, so statistics are pooled across rows.
        self.pooled = given is None
        size, number = (rows + 1, length + 1), torch.float64
        self.costs = tables.full("policy.costs", size, 1.0 if given is None else given, number)
        """The cost of a verification, in drafts, by rows in flight and masks to verify."""
        self.curve = AcceptanceCurve(rows, self.pooled, tables)
        # The rate starts at one token per draft.
        self.decided, self.spent = (tables.full(f"policy.{name}", (rows,), 1, number) for name in ("decided", "spent"))
        self.index = tables.full("policy.index", (rows, length))
        self.price = tables.full("policy.price", (rows,), 0, number)

    def calibrate_costs(self, measure_costs: MeasureCosts, ahead: int) -> None:
        """Unless it is given, measure the cost of a verification relative to a draft, at this batch size."""
        if self.pooled:
            # A row drafts with a block of queries; it verifies k masks with k more.
            rows, length = self.index.shape
            seconds = measure_costs(2 * length + ahead)
            flight, masks = np.arange(rows + 1)[:, None], np.arange(length + 1)[None, :]
            ratio = seconds(flight * (length + masks + ahead)) / seconds(flight * np.full_like(masks, length))
            self.costs.copy_(torch.from_numpy(ratio))

    @property
    def pace(self) -> torch.Tensor:
        """(rows,) tokens decided in the time of a draft."""
        if self.pooled:
            return (self.decided.sum() / self.spent.sum()).expand_as(self.decided)
        return self.decided / self.spent

    def decide(self, view: DraftView) -> torch.Tensor:
        assert view.denoised is not None
        asked = view.drafting & view.span.any(-1)
        chance = self.curve(view.acceptance)
        standing = torch.where(view.span, chance, 1).cumprod(-1)
        whole = standing[:, -1]
        gain = (standing * view.span).sum(-1) + (1 - whole) * self.replaces
        assert view.in_flight is not None
        price = self.costs.index_select(0, view.in_flight).squeeze(0).index_select(0, view.span.sum(-1))
        if self.lookahead:  # a block that is accepted whole saves the next one's draft
            price = price - whole * (view.span == view.masks).all(-1)
        self.index.copy_(torch.where(asked.unsqueeze(1), self.curve.bin(view.acceptance), self.index))
        self.price.copy_(torch.where(asked, price, self.price))
        return asked & (gain - view.denoised >= self.pace * price)

    def judged(self, span: torch.Tensor, accepted: torch.Tensor, rejected: torch.Tensor) -> None:
        place = numbers(span.shape[1], span.device)
        self.curve.learn(self.index, span & (place <= rejected.unsqueeze(1)), accepted)

    def reward(self, finished: torch.Tensor, verified: bool, decided: torch.Tensor) -> None:
        self.decided += finished * decided
        self.spent += finished * (1 + self.price if verified else 1)

    def reset(self, row: int) -> None:
        self.curve.reset(row)
        if not self.pooled:
            self.decided[row] = self.spent[row] = 1
