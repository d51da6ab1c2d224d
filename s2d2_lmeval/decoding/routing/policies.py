"""When to verify: the four published routing policies, for all rows at once (``throughput`` has its own module).

A policy keeps its state per row, from a request's first block to its last; nothing is reset between blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.registry import POLICIES
from s2d2_lmeval.runtime.costs import MeasureCosts

ONE_BLOCK = ("block", "editing", "subblock")
"""Schemes in which one block is open at a time."""


@dataclass(frozen=True)
class DraftView:
    """What a policy may look at: R rows of L places, after a draft.

    ``drafting`` (R,) rows that drafted in this step; ``masks`` (R, L) undecided places; ``span`` (R, L) the first run
    of masks;
    ``confidence``, ``acceptance`` (estimated) and ``entropy`` (normalised; None unless the policy reads it) (R, L);
    ``decided`` (R,) tokens decided in this block so far, the prompt's not counted; ``denoised`` (R,) tokens that the
    step decides if it does not verify (None unless the policy reads it); ``in_flight`` rows that share a forward.
    """

    drafting: torch.Tensor
    masks: torch.Tensor
    span: torch.Tensor
    confidence: torch.Tensor
    acceptance: torch.Tensor
    entropy: torch.Tensor | None
    decided: torch.Tensor
    denoised: torch.Tensor | None = None
    in_flight: int = 1


class RoutingPolicy(ABC):
    """Decides which drafts are verified, in blocks of L places of ``rows`` rows.

    A class registers itself under the value of ``do_verify_policy``:
    ``@POLICIES.register("name", options=…)``, with schemes where it fits some only.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """Those of ``acceptance``, ``entropy`` and ``denoised`` that it looks at; the others are not computed."""
    always = False
    """Whether it is known beforehand that every draft is verified."""

    def __init__(self, config: DecodingConfig, rows: int, length: int, device: torch.device) -> None:
        self.config = config

    @abstractmethod
    def decide(self, view: DraftView) -> torch.Tensor:
        """Which rows (R,) go on to the verifier."""

    def weigh(self, measure_costs: MeasureCosts, ahead: int) -> None:  # noqa: B027
        """Before the first request: a policy that wants to know what forwards cost measures it here. A verification
        brings ``ahead`` queries of the next block.
        """

    def judged(self, span: torch.Tensor, accepted: torch.Tensor, rejected: torch.Tensor) -> None:  # noqa: B027
        """Learn from spans (R, L) that came back: their ``accepted`` prefix, and the first ``rejected`` place (R,).

        Nothing is known of the tokens after it.
        """

    def reward(self, finished: torch.Tensor, verified: bool, decided: torch.Tensor) -> None:  # noqa: B027
        """Learn from rows (R,) whose step is complete: whether it verified and how many tokens (R,) it ``decided``."""

    def reset(self, row: int) -> None:  # noqa: B027
        """Forget a row's past: another request begins there."""


def policy_of(config: DecodingConfig, scheme: str, rows: int, length: int, device: torch.device) -> RoutingPolicy:
    """The policy that the option ``do_verify_policy`` names.

    Raises:
        ConfigError: it does not fit the ``scheme`` of the family.
    """
    entry = POLICIES.find(config.do_verify_policy, scheme)
    if entry is None:
        raise ConfigError(f"do_verify_policy={config.do_verify_policy} is made for one block at a time; use another.")
    policy: RoutingPolicy = entry.implementation(config, rows, length, device)
    return policy


def expected_accepted(acceptance: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """Expected length (R,) of the accepted prefix of the span: sum over its places of the product of ``acceptance`` up
    to there.
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

    Legacy: skip a short span only where enough masks are confident.
    """

    def __init__(self, config: DecodingConfig, rows: int, length: int, device: torch.device) -> None:
        super().__init__(config, rows, length, device)
        self.always = config.min_ssd_span_length <= 1 and not config.legacy_ssd_span_strategy

    def decide(self, view: DraftView) -> torch.Tensor:
        shortest = self.config.min_ssd_span_length
        long = view.span.sum(-1) >= shortest
        if not self.config.legacy_ssd_span_strategy:
            return long
        confident = (view.masks & (view.confidence > self.config.confidence_threshold)).sum(-1)
        return long | (confident < view.masks.sum(-1).clamp_max(shortest))


@POLICIES.register("score_threshold")
class ScorePolicy(RoutingPolicy):
    """Verify where the score reaches ``do_verify_score_threshold``."""

    reads = frozenset({"acceptance"})

    def decide(self, view: DraftView) -> torch.Tensor:
        return score(view, self.config) >= self.config.do_verify_score_threshold


@POLICIES.register("score_hysteresis")
class HysteresisPolicy(ScorePolicy):
    """Start verifying above one score, stop below a lower one."""

    def __init__(self, config: DecodingConfig, rows: int, length: int, device: torch.device) -> None:
        super().__init__(config, rows, length, device)
        self.on = torch.zeros(rows, dtype=torch.bool, device=device)

    def decide(self, view: DraftView) -> torch.Tensor:
        value = score(view, self.config)
        decision = torch.where(
            self.on, value >= self.config.hysteresis_threshold_off, value > self.config.hysteresis_threshold_on
        )
        self.on = torch.where(view.drafting, decision, self.on)
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

    def __init__(self, config: DecodingConfig, rows: int, length: int, device: torch.device) -> None:
        super().__init__(config, rows, length, device)
        buckets = config.ucb_span_length_bins * config.ucb_block_progress_bins * config.ucb_entropy_bins
        self.pulls = torch.zeros(rows, 2, buckets, dtype=torch.float64, device=device)
        self.gained = torch.zeros_like(self.pulls)
        self.decisions = torch.zeros(rows, dtype=torch.float64, device=device)
        self.bucket = torch.zeros(rows, dtype=torch.long, device=device)

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
        self.bucket = torch.where(asked, self._bucket_of(view), self.bucket)
        index = self.bucket.view(-1, 1, 1).expand(-1, 2, 1)
        pulls = self.pulls.gather(2, index).squeeze(2)
        bonus = (self.decisions.clamp_min(1).log().unsqueeze(1) / pulls.clamp_min(1)).sqrt()
        mean = self.gained.gather(2, index).squeeze(2) / pulls.clamp_min(1)
        bound = mean + self.config.ucb_beta * bonus
        skip, verify = bound.masked_fill(pulls == 0, torch.inf).unbind(1)
        return verify >= skip

    def reward(self, finished: torch.Tensor, verified: bool, decided: torch.Tensor) -> None:
        row = torch.arange(len(finished), device=finished.device)
        place = (row, torch.full_like(row, int(verified)), self.bucket)
        self.pulls[place] += finished
        self.gained[place] += decided.double() / (2 if verified else 1) * finished

    def reset(self, row: int) -> None:
        self.pulls[row] = 0
        self.gained[row] = 0
        self.decisions[row] = 0
