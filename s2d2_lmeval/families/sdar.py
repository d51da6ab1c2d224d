"""SDAR: Qwen3, and SDAR-MoE: Qwen3-MoE, under the published weight names.

Source: JetAstra's SDAR checkpoints (JetLM/SDAR-*); settings from the S2D2 README (configurations A and B).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Qwen3Config, Qwen3MoeConfig

from s2d2_lmeval.families.config_map import NO_WINDOW, SIZES, translate
from s2d2_lmeval.families.facts import Family

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


def _qwen3(config: Mapping[str, Any]) -> Qwen3Config:
    return translate(config, Qwen3Config, _SIZES, optional=_OPTIONAL, assumes=NO_WINDOW)


def _qwen3_moe(config: Mapping[str, Any]) -> Qwen3MoeConfig:
    return translate(
        config,
        Qwen3MoeConfig,
        (*_SIZES, "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
        optional=(*_OPTIONAL, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
        assumes=NO_WINDOW,
    )


# Models with SDAR's class and type whose masks see earlier masks only and predict the next token.
_CAUSAL = re.compile(r"(?<![a-z])i-?dlm|(?<![a-z])uno(?![a-z])", re.IGNORECASE)


def _doubt(config: Mapping[str, Any], source: str) -> str | None:
    names = [str(Path(source).absolute()) if Path(source).exists() else source, str(config.get("_name_or_path") or "")]
    causal = [found[0] for name in names if (found := _CAUSAL.search(name))]
    if config.get("use_regular_causal"):
        return "says use_regular_causal=true, as I-DLM and UNO do"
    if causal:
        return f"is called {causal[0]!r}, and I-DLM and UNO, which are other models, say the type of SDAR"
    block = config.get("block_size")
    if isinstance(block, int) and not isinstance(block, bool) and 1 <= block <= 3:
        return f"says block_size={block}, which I-DLM is trained with and no SDAR is published with"
    return None


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


SDAR = _family("sdar", "Qwen3ForCausalLM", "SDAR", config_class=Qwen3Config, config_map=_qwen3)
# transformers stacks the published mlp.experts.N.* itself: its own Qwen3-MoE hub format is the same.
SDAR_MOE = _family(
    "sdar_moe",
    "Qwen3MoeForCausalLM",
    "SDARMoe",
    config_class=Qwen3MoeConfig,
    config_map=_qwen3_moe,
    shares_weights=False,
)
