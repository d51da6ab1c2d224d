"""Stable-DiffCoder: Llama under its own names and type, trained to denoise blocks.

Source: ByteDance-Seed/Stable-DiffCoder-8B-{Base,Instruct}; settings from its README.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

from s2d2_lmeval.families.config_map import SIZES, translate
from s2d2_lmeval.families.facts import Family


def defaults(block_length: int) -> dict[str, Any]:
    """One token a step, at temperature zero; the threshold is that of the code's default."""
    return {
        "block_length": block_length,
        "temperature": 0.0,
        "confidence_threshold": 0.95,
        "transfer_counts": "masks",
        "untempered_confidence": True,
        "short_last_block": True,
    }


def _llama(config: Mapping[str, Any]) -> LlamaConfig:
    assumes = {"attention_bias": False, "mlp_bias": False}
    return translate(config, LlamaConfig, SIZES, optional=("hidden_act", "head_dim"), assumes=assumes)


STABLE_DIFFCODER = Family(
    name="stable_diffcoder",
    model_types=("stable_diffcoder",),  # published as llama: it is recognised by its class
    classes=("StableDiffcoderForCausalLM", "StableDiffCoderForCausalLM", "StableDiffcoderModel"),
    native_class="LlamaForCausalLM",
    config_class=LlamaConfig,
    config_map=_llama,
    token_shift=False,
    default_decoder="dynamic",
    commits_last_block="unless_stopped",
    defaults=defaults,
    presets={"stable-diffcoder": defaults(4), "stable-diffcoder-static": {**defaults(4), "decoder": "static"}},
    published_mask_ids={155136: 5},
    published_stop_ids={155136: 2},
    taken_for_granted=False,
    published_block_length=4,
    fixed_block_length=True,
)
