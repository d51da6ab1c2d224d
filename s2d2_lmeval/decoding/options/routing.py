"""The decoding options of when S2D2 verifies: policies, their scores, and estimators of acceptance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from s2d2_lmeval.decoding.options.option import option

_S2D2 = ("s2d2",)
_BLOCKWISE = ("block", "editing", "subblock")
_POLICIES = ("mask_span_length", "score_threshold", "score_hysteresis", "contextual_bandit_ucb", "throughput")
_ESTIMATORS = (
    "hard_margin_threshold",
    "hard_entropy_threshold",
    "soft_confidence_power",
    "soft_clipped_linear_margin",
    "soft_entropy_negexp",
    "soft_renyi_2_entropy",
)


@dataclass(frozen=True)
class RoutingOptions:
    """Part of :class:`~s2d2_lmeval.decoding.options.config.DecodingConfig`."""

    do_verify_policy: str = option("mask_span_length", "when to verify", decoders=_S2D2, choices=_POLICIES)
    min_ssd_span_length: int = option(
        1, "mask_span_length: verify spans of at least this many masks", decoders=_S2D2, low=0
    )
    legacy_ssd_span_strategy: bool = option(
        False, "mask_span_length: skip short spans only where enough masks are confident", decoders=_S2D2
    )
    do_verify_score_threshold: float = option(-1.0, "score_threshold: verify from this score on", decoders=_S2D2)
    hysteresis_threshold_on: float = option(0.0, "score_hysteresis: start verifying above", decoders=_S2D2)
    hysteresis_threshold_off: float = option(-1.0, "score_hysteresis: stop verifying below", decoders=_S2D2)
    do_verify_score_type: str = option(
        "difference_dynamic",
        "score: expected accepted tokens minus a cost, fixed or per confident mask",
        decoders=_S2D2,
        choices=("difference_static", "difference_dynamic"),
    )
    score_penalty_coef: float = option(2.0, "the cost in the score, in tokens", decoders=_S2D2)
    token_acceptance_estimator: str = option(
        "hard_margin_threshold", "how likely the verifier accepts a token", decoders=_S2D2, choices=_ESTIMATORS
    )
    ssd_confidence_margin_threshold: float = option(0.05, "of hard_margin_threshold", decoders=_S2D2)
    ssd_entropy_threshold: float = option(0.5, "of hard_entropy_threshold (normalised entropy)", decoders=_S2D2)
    ssd_confidence_power: float = option(1.0, "of soft_confidence_power", decoders=_S2D2, low=0.0)
    ssd_confidence_margin_coef: float = option(1.0, "of soft_clipped_linear_margin", decoders=_S2D2, low=0.0)
    ssd_entropy_temperature: float = option(1.0, "of soft_entropy_negexp", decoders=_S2D2, low=0.0)
    ucb_beta: float = option(
        1.0, "bandit: weight of the exploration bonus", decoders=_S2D2, schemes=_BLOCKWISE, low=0.0
    )
    ucb_span_length_bins: int = option(
        2, "bandit: buckets of span length", decoders=_S2D2, schemes=_BLOCKWISE, low=1, high=100
    )
    ucb_block_progress_bins: int = option(
        2, "bandit: buckets of decoded share of the block", decoders=_S2D2, schemes=_BLOCKWISE, low=1, high=100
    )
    ucb_entropy_bins: int = option(
        2, "bandit: buckets of mean normalised entropy", decoders=_S2D2, schemes=_BLOCKWISE, low=1, high=100
    )
    ucb_entropy_source: str = option(
        "span",
        "bandit: entropy over the span or over all masks",
        decoders=_S2D2,
        schemes=_BLOCKWISE,
        choices=("span", "masked"),
    )
    verify_cost_ratio: float | None = option(
        None,
        "throughput: cost of a verification, in drafts, which makes its answers reproducible; none: measured, so "
        "answers depend on timings and on the batch",
        decoders=_S2D2,
        schemes=_BLOCKWISE,
        low=0.0,
    )

    def _routing_faults(self) -> Iterator[str]:
        """What is wrong between these options."""
        on, off = self.hysteresis_threshold_on, self.hysteresis_threshold_off
        if self.do_verify_policy == "score_hysteresis" and on <= off:
            yield f"score_hysteresis needs hysteresis_threshold_on ({on}) above hysteresis_threshold_off ({off})."
