"""Nemotron-Labs-Diffusion: Ministral3 trained to predict the next token and to denoise blocks.

Clean text is token-causal and predicts the next token; masks see their whole block and predict their own. Source:
nvidia/Nemotron-Labs-Diffusion-{3B,8B,14B}; settings from its model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Ministral3Config

from s2d2_lmeval.families.config_map import SIZES, is_number, require, translate
from s2d2_lmeval.families.facts import Family

_ASSUMES = {"attention_bias": False, "mlp_bias": False}
_PARADIGMS = ("bidirectional", "block_diff")  # as published, and as training writes it


def defaults(block_length: int) -> dict[str, Any]:
    """Greedy self-speculation in a window of one block."""
    return {
        "block_length": block_length,
        "window": max(block_length, 2),
        "row_budget": max(64, 2 * block_length),
        "temperature": 0.0,
        "confidence_threshold": 0.9,
        "transfer_counts": "masks",
        "untempered_confidence": True,
        "cache_ver": True,
    }


def _ministral3(config: Mapping[str, Any]) -> Ministral3Config:
    native = translate(
        config, Ministral3Config, (*SIZES, "head_dim"), optional=("hidden_act",), assumes=_ASSUMES, sliding_window=None
    )
    # Queries are scaled by 1 + beta·ln(1 + ⌊position / original context⌋), whatever the rotary frequencies.
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        value = native.rope_parameters.get(name)
        fine = is_number(value) and value >= 0 and (value > 0 or name == "llama_4_scaling_beta")
        require(native.rope_parameters, name, "a positive number in rope_parameters", fine)
    return native


def _doubt(config: Mapping[str, Any], source: str) -> str | None:
    paradigm = config.get("dlm_paradigm")
    if paradigm in (None, *_PARADIGMS):
        return None
    return f"says dlm_paradigm={paradigm!r}, and known are {' and '.join(_PARADIGMS)}"


NEMOTRON = Family(
    name="nemotron_labs_diffusion",
    model_types=("nemotron_labs_diffusion",),
    classes=("NemotronLabsDiffusionModel", "NemotronLabsDiffusionForCausalLM"),
    doubt=_doubt,
    native_class="Ministral3ForCausalLM",
    config_class=Ministral3Config,
    config_map=_ministral3,
    key_mapping={r"^encoder\.": "model.", r"^diffusion_head\.": "lm_head."},
    token_shift=True,
    draft_shift=False,
    prefix_causal=True,
    scheme="seeded",
    default_decoder="sliding",
    defaults=defaults,
    presets={
        "nemotron": defaults(32),
        "nemotron-dlm": {**defaults(32), "decoder": "dynamic"},
        "nemotron-linear": {**defaults(32), "decoder": "linear_spec"},
    },
    published_mask_ids={131072: 100},
    published_block_length=32,
)
