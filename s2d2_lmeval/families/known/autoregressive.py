"""Autoregressive models of transformers, the targets of block-diffusion drafts. They run under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from s2d2_lmeval.families.config_map import configured
from s2d2_lmeval.families.facts import AUTOREGRESSIVE, Family


def _family(name: str, native_class: str, config_class: type[PreTrainedConfig]) -> Family:
    def as_it_is(config: Mapping[str, Any]) -> PreTrainedConfig:
        return configured(config_class, config)

    return Family(
        name=name,
        model_types=(name,),
        native_class=native_class,
        config_class=config_class,
        config_map=as_it_is,
        token_shift=True,
        defaults=lambda block_length: {"temperature": 1.0, "do_sample": False, "window": 1},
        presets={},
        published_mask_ids={},
        published_block_length=1,
        scheme=AUTOREGRESSIVE,
        default_decoder="ar",
    )


TARGETS = (
    _family("qwen3", "Qwen3ForCausalLM", Qwen3Config),
    _family("qwen3_moe", "Qwen3MoeForCausalLM", Qwen3MoeConfig),
    _family("qwen2", "Qwen2ForCausalLM", Qwen2Config),
    _family("llama", "LlamaForCausalLM", LlamaConfig),
    _family("mistral", "MistralForCausalLM", MistralConfig),
)
