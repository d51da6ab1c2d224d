"""Hypothesis strategies: decoding options, prompts and models, drawn so that every branch is taken from both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from .oracle import Options
from .tiny import VOCABULARY

MASK = VOCABULARY - 1

POLICIES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "mask_span_length": {"min_ssd_span_length": st.integers(0, 5), "legacy_ssd_span_strategy": st.booleans()},
    "score_threshold": {"do_verify_score_threshold": st.sampled_from([-5.0, 0.0, 0.5, 1.5])},
    "score_hysteresis": {
        "hysteresis_threshold_on": st.sampled_from([0.5, 1.0, 2.0]),
        "hysteresis_threshold_off": st.sampled_from([-5.0, -1.0, 0.3]),
    },
    "contextual_bandit_ucb": {
        "ucb_beta": st.sampled_from([0.0, 0.5, 1.0]),
        "ucb_span_length_bins": st.integers(1, 3),
        "ucb_block_progress_bins": st.integers(1, 3),
        "ucb_entropy_bins": st.integers(1, 4),
        "ucb_entropy_source": st.sampled_from(["span", "masked"]),
    },
}

SCORE: dict[str, st.SearchStrategy[Any]] = {
    "do_verify_score_type": st.sampled_from(["difference_static", "difference_dynamic"]),
    "score_penalty_coef": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    "token_acceptance_estimator": st.sampled_from(
        [
            "hard_margin_threshold",
            "hard_entropy_threshold",
            "soft_confidence_power",
            "soft_clipped_linear_margin",
            "soft_entropy_negexp",
            "soft_renyi_2_entropy",
        ]
    ),
    "ssd_confidence_margin_threshold": st.sampled_from([0.05, 0.3]),
    "ssd_entropy_threshold": st.sampled_from([0.3, 0.5]),
    "ssd_confidence_power": st.sampled_from([0.8, 1.0, 2.0]),
    "ssd_confidence_margin_coef": st.sampled_from([1.0, 1.5]),
    "ssd_entropy_temperature": st.sampled_from([0.7, 1.0]),
}

VERIFICATION: dict[str, st.SearchStrategy[Any]] = {
    "acceptance": st.sampled_from(["stochastic", "stochastic", "greedy"]),
    "allow_resample": st.booleans(),
    "ssd_ratio_tempering_factor": st.sampled_from([0.5, 1.0, 2.0]),
    "ssd_ratio_threshold": st.sampled_from([-1.0, -1.0, 0.0, 0.3]),
    "ssd_threshold_all_spans": st.booleans(),
    "always_check_high_confidence": st.booleans(),
}

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")


@dataclass(frozen=True)
class Case:
    """A request and how to decode it."""

    options: Options
    prompt: list[int]
    model_seed: int
    random_source: str
    seed: int
    request: int


def prompts(longest: int = 18) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, MASK - 1), min_size=1, max_size=longest)


@st.composite
def options(draw: st.DrawFn, decoder: str, policy: str | None = None) -> Options:
    """Options of ``decoder``; for s2d2 of one routing ``policy``."""
    block = 1 if decoder == "ar" else draw(st.integers(1, 8))
    fixed: dict[str, Any] = {
        "decoder": decoder,
        "block_length": block,
        "denoising_steps": draw(st.integers(1, block)),
        "max_new_tokens": draw(st.integers(0, 14)),
        "temperature": (temperature := draw(st.sampled_from([0.0, 0.6, 1.0, 1.7]))),
        "top_k": draw(st.sampled_from([0, 0, 4])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.8])),
        "do_sample": draw(st.booleans()) and temperature > 0,
        "confidence_threshold": draw(st.sampled_from([0.3, 0.5, 0.85])),
        "eb_threshold": draw(st.sampled_from([0.2, 1.5, 4.0])),
        "stop_token_ids": tuple(draw(st.lists(st.integers(0, MASK - 1), max_size=2))),
        "cache_ver": draw(st.booleans()),
        "draft_ver": draw(st.booleans()),
        "suppress_mask_token": draw(st.booleans()),
    }
    if decoder == "s2d2":
        assert policy is not None
        fixed["do_verify_policy"] = policy
        fixed["remasking_strategy"] = draw(st.sampled_from(STRATEGIES))
        for name, values in {**POLICIES[policy], **SCORE, **VERIFICATION}.items():
            fixed[name] = draw(values)
    return Options(**fixed)


@st.composite
def cases(draw: st.DrawFn, decoder: str, policy: str | None = None) -> Case:
    """A request with options, model and randomness."""
    return Case(
        options=draw(options(decoder, policy)),
        prompt=draw(prompts()),
        model_seed=draw(st.integers(0, 3)),
        random_source=draw(st.sampled_from(["keyed", "keyed", "fixed", "torch"])),
        seed=draw(st.integers(0, 2**31)),
        request=draw(st.integers(-3, 1000)),
    )
