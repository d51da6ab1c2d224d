"""Tiny-A2D: autoregressive models turned into block-diffusion models under their own weight names (dllm's BD3LM).

Blocks are counted back from the prompt's end. Source: dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1 and the sampler of
ZHZisZZ/dllm. Checkpoints of full attention (mdlm) have the same types and classes and are not block models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from s2d2_lmeval.families.config_map import SIZES, qwen2, translate
from s2d2_lmeval.families.facts import Family
from s2d2_lmeval.families.known.sdar import qwen3
from s2d2_lmeval.families.records import names_blocks, names_of


def defaults(block_length: int) -> dict[str, Any]:
    """One token a step, at temperature zero; the sampler has no threshold, so that one is this package's."""
    return {
        "block_length": block_length,
        "temperature": 0.0,
        "confidence_threshold": 0.9,
        "transfer_counts": "rounded",
        "untempered_confidence": True,
        "short_last_block": True,
    }


def _llama(config: Mapping[str, Any]) -> LlamaConfig:
    optional = ("hidden_act", "head_dim", "attention_bias", "mlp_bias")
    return translate(config, LlamaConfig, SIZES, optional=optional)


def _doubt(config: Mapping[str, Any], source: str) -> str | None:
    names = " ".join(names_of(config, source))
    if re.search("mdlm", names, re.IGNORECASE):
        return "is called mdlm, which has full attention and no blocks"
    if re.search("bd3lm", names, re.IGNORECASE) or names_blocks(config):
        return None
    return (
        "does not say whether it is a bd3lm, which denoises blocks (then give block_length=…, published with 32), or "
        "an mdlm, which denoises the whole text"
    )


def _family(stem: str, config_class: type[PreTrainedConfig], config_map: Any) -> Family:
    return Family(
        name="tiny_a2d" if stem == "Qwen3" else f"tiny_a2d_{stem.lower()}",
        model_types=(f"a2d-{stem.lower()}",),
        classes=(f"A2D{stem}LMHeadModel", f"A2D{stem}ForCausalLM", f"A2D{stem}Model"),
        doubt=_doubt,
        native_class=f"{stem}ForCausalLM",
        config_class=config_class,
        config_map=config_map,
        token_shift=False,
        block_alignment="prompt_end",
        default_decoder="static",
        commits_last_block="never",
        defaults=defaults,
        presets={"tiny-a2d": defaults(32)},
        published_mask_ids={151936: 151669} if stem == "Qwen3" else {},
        taken_for_granted=False,
        published_block_length=32,
        fixed_block_length=True,
    )


TINY_A2D = (
    _family("Qwen3", Qwen3Config, qwen3),
    _family("Qwen2", Qwen2Config, qwen2),
    _family("Llama", LlamaConfig, _llama),
)
