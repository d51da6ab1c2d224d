"""SDAR: Qwen3, and SDAR-MoE: Qwen3-MoE, under the published weight names.

Source: JetAstra's SDAR checkpoints (JetLM/SDAR-*); settings from the S2D2 README (configurations A and B).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import Qwen3Config, Qwen3MoeConfig

from s2d2_lmeval.families.config_map import NO_WINDOW, SIZES, is_whole, translate
from s2d2_lmeval.families.facts import Family
from s2d2_lmeval.families.records import names_of

_SIZES = (*SIZES, "head_dim")
_OPTIONAL = ("hidden_act", "attention_bias")


def defaults(block_length: int) -> dict[str, Any]:
    """The published setting: at block length 4 verify when at least one token is expected to be accepted (A),
    at any other always (B)."""
    return {
        "block_length": block_length,
        "denoising_steps": block_length,
        "temperature": 1.0,
        "do_sample": False,
        "remasking_strategy": "low_confidence_dynamic",
        "confidence_threshold": 0.85,
        "cache_ver": True,
        "draft_ver": True,
        "do_verify_policy": "score_threshold",
        "do_verify_score_threshold": 0.0,
        "do_verify_score_type": "difference_static",
        "score_penalty_coef": 1.0 if block_length == 4 else 0.0,
        "token_acceptance_estimator": "soft_entropy_negexp",
    }


def qwen3(config: Mapping[str, Any]) -> Qwen3Config:
    """Qwen3's configuration from one that names its fields as transformers does."""
    return translate(config, Qwen3Config, _SIZES, optional=_OPTIONAL, assumes=NO_WINDOW)


def _qwen3_moe(config: Mapping[str, Any]) -> Qwen3MoeConfig:
    return translate(
        config,
        Qwen3MoeConfig,
        (*_SIZES, "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
        optional=(*_OPTIONAL, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
        assumes=NO_WINDOW,
    )


_CAUSAL = re.compile(r"(?<![a-z])i-?dlm|(?<![a-z])uno(?![a-z])", re.IGNORECASE)


def causal_relative(config: Mapping[str, Any], source: str) -> str | None:
    """How a config.json of SDAR's type, or the name ``source``, shows I-DLM or UNO, whose masks see earlier masks only
    and predict the next token.
    """
    if config.get("use_regular_causal"):
        return "says use_regular_causal=true, as I-DLM and UNO do"
    called = [found[0] for name in names_of(config, source) if (found := _CAUSAL.search(name))]
    return f"is called {called[0]!r}, as I-DLM and UNO are, which say the type of SDAR" if called else None


def _doubt(config: Mapping[str, Any], source: str) -> str | None:
    block = config.get("block_size")
    if is_whole(block, 1, 3):
        return f"says block_size={block}, which I-DLM is trained with and no SDAR is published with"
    return causal_relative(config, source)


def _family(name: str, native_class: str, stem: str, **layout: Any) -> Family:
    return Family(
        name=name,
        model_types=(name,),
        classes=(f"{stem}ForCausalLM", f"{stem}Model"),
        doubt=_doubt,
        native_class=native_class,
        token_shift=False,
        defaults=defaults,
        presets={"sdar-a": defaults(4), "sdar-b": defaults(16)},
        published_mask_ids={151936: 151669},
        published_block_length=4,
        **layout,
    )


SDAR = _family("sdar", "Qwen3ForCausalLM", "SDAR", config_class=Qwen3Config, config_map=qwen3)
# transformers stacks the published mlp.experts.N.* itself: its own Qwen3-MoE hub format is the same.
SDAR_MOE = _family(
    "sdar_moe",
    "Qwen3MoeForCausalLM",
    "SDARMoe",
    config_class=Qwen3MoeConfig,
    config_map=_qwen3_moe,
    shares_weights=False,
)
