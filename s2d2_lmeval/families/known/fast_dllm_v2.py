"""Fast-dLLM v2: Qwen2 whose logits are shifted by one token.

Source: Efficient-Large-Model/Fast_dLLM_v2_*; settings from the S2D2 README (configurations A, B and C).
"""

from __future__ import annotations

from math import gcd
from typing import Any

from transformers import Qwen2Config

from s2d2_lmeval.families.config_map import qwen2
from s2d2_lmeval.families.facts import Family


def defaults(block_length: int, small_block_size: int = 4) -> dict[str, Any]:
    """The published setting A; B and C differ in the sub-block and the policy."""
    return {
        "block_length": block_length,
        "small_block_size": gcd(small_block_size, block_length),
        "temperature": 0.0,
        "top_p": 1.0,
        "confidence_threshold": 0.9,
        "cache_ver": False,
        "draft_ver": False,
        "use_block_cache": False,
        "min_ssd_span_length": 1,
        "do_verify_policy": "score_hysteresis",
        "hysteresis_threshold_on": 1.0,
        "hysteresis_threshold_off": -5.0,
        "do_verify_score_type": "difference_dynamic",
        "score_penalty_coef": 1.0,
        "token_acceptance_estimator": "soft_entropy_negexp",
    }


def _long_spans_only() -> dict[str, Any]:
    kept = ("block_length", "temperature", "top_p", "confidence_threshold", "cache_ver", "draft_ver", "use_block_cache")
    shared = defaults(32)
    return {
        **{name: shared[name] for name in kept},
        "small_block_size": 32,
        "do_verify_policy": "mask_span_length",
        "min_ssd_span_length": 8,
    }


FAST_DLLM_V2 = Family(
    name="fast_dllm_v2",
    model_types=("Fast_dLLM_Qwen",),
    classes=("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_QwenModel"),
    native_class="Qwen2ForCausalLM",
    config_class=Qwen2Config,
    config_map=qwen2,
    token_shift=True,
    scheme="subblock",
    commits_last_block="unless_stopped",
    defaults=defaults,
    presets={"fast-a": defaults(32, 4), "fast-b": defaults(32, 16), "fast-c": _long_spans_only()},
    published_mask_ids={152064: 151665, 151936: 151665},
    published_block_length=32,
)
