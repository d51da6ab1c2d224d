"""The decoding options of S2D2 under their published names: acceptance, remasking and routing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.decoding.options.option import option
from s2d2_lmeval.registry import ESTIMATORS, POLICIES, STRATEGIES

_UNDIVIDED = ("block",)
_UNEDITED = ("block", "subblock", "pipelined")
_BLOCKWISE = ("block", "editing", "subblock")


@dataclass(frozen=True)
class AcceptanceOption:
    """The rule by which a drafted token is accepted."""

    acceptance: str | None = option(
        None,
        "s2d2: stochastic (speculative sampling as published; the default) or greedy (accept while the verifier's "
        "argmax agrees); sliding: keyed (what ar would draw with the same seed; the default) or rejection (the same "
        "distribution, other draws)",
        choices=("stochastic", "greedy", "keyed", "rejection"),
    )


@dataclass(frozen=True)
class RemaskingOption:
    """Which masks S2D2 decides without a verification."""

    remasking_strategy: str = option(
        "low_confidence_dynamic",
        "which masks a step decides without a verification, or after a short one",
        schemes=_UNDIVIDED,
        choices=STRATEGIES,
    )


@dataclass(frozen=True)
class VerifierOptions:
    """Acceptance of a verified span."""

    allow_resample: bool = option(
        True,
        "resample a rejected token from the residual; otherwise the draft stays (sub-blocks, pipelines: the mask)",
        schemes=_UNEDITED,
    )
    ssd_ratio_tempering_factor: float = option(1.0, "exponent of the acceptance ratio", low=0.0)
    ssd_ratio_threshold: float = option(
        -1.0,
        "also accept after a rejection if the ratio reaches this; negative: off",
        schemes=_UNDIVIDED,
    )
    ssd_threshold_all_spans: bool = option(
        False, "apply ssd_ratio_threshold to every mask of the block", schemes=_UNDIVIDED
    )
    always_check_high_confidence: bool = option(
        False,
        "also decide every mask above confidence_threshold in each step",
        schemes=_UNDIVIDED,
    )


@dataclass(frozen=True)
class RoutingOptions:
    """When S2D2 verifies: policies, their scores, and estimators of acceptance."""

    do_verify_policy: str = option("mask_span_length", "when to verify", choices=POLICIES)
    min_ssd_span_length: int = option(1, "mask_span_length: verify spans of at least this many masks", low=0)
    legacy_ssd_span_strategy: bool = option(
        False, "mask_span_length: skip short spans only if enough masks are confident"
    )
    do_verify_score_threshold: float = option(-1.0, "score_threshold: verify at or above this score")
    hysteresis_threshold_on: float = option(0.0, "score_hysteresis: start verifying above")
    hysteresis_threshold_off: float = option(-1.0, "score_hysteresis: stop verifying below")
    do_verify_score_type: str = option(
        "difference_dynamic",
        "score: expected accepted tokens minus a cost, fixed or per confident mask",
        choices=("difference_static", "difference_dynamic"),
    )
    score_penalty_coef: float = option(2.0, "the cost in the score, in tokens")
    token_acceptance_estimator: str = option(
        "hard_margin_threshold", "estimates how likely the verifier accepts a token", choices=ESTIMATORS
    )
    ssd_confidence_margin_threshold: float = option(0.05, "of hard_margin_threshold")
    ssd_entropy_threshold: float = option(0.5, "of hard_entropy_threshold (normalised entropy)")
    ssd_confidence_power: float = option(1.0, "of soft_confidence_power", low=0.0)
    ssd_confidence_margin_coef: float = option(1.0, "of soft_clipped_linear_margin", low=0.0)
    ssd_entropy_temperature: float = option(1.0, "of soft_entropy_negexp", low=0.0)
    ucb_beta: float = option(1.0, "bandit: weight of the exploration bonus", schemes=_BLOCKWISE, low=0.0)
    ucb_span_length_bins: int = option(2, "bandit: buckets of span length", schemes=_BLOCKWISE, low=1, high=100)
    ucb_block_progress_bins: int = option(
        2, "bandit: buckets of decoded share of the block", schemes=_BLOCKWISE, low=1, high=100
    )
    ucb_entropy_bins: int = option(2, "bandit: buckets of mean normalised entropy", schemes=_BLOCKWISE, low=1, high=100)
    ucb_entropy_source: str = option(
        "span",
        "bandit: entropy over the span or over all masks",
        schemes=_BLOCKWISE,
        choices=("span", "masked"),
    )
    verify_cost_ratio: float | None = option(
        None,
        "throughput: cost of a verification, in drafts, which makes its answers reproducible; none: measured, so "
        "answers depend on timings and on the batch",
        schemes=_BLOCKWISE,
        low=0.0,
    )

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        on, off = config.hysteresis_threshold_on, config.hysteresis_threshold_off
        if config.do_verify_policy == "score_hysteresis" and on <= off:
            yield f"score_hysteresis needs hysteresis_threshold_on ({on}) above hysteresis_threshold_off ({off})."
