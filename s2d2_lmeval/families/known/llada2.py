"""LLaDA2: Glm4Moe with a fused query-key-value projection and one weight per expert.

Source: inclusionAI/LLaDA2.*; settings from the S2D2 README (Conservative and Quality).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Concatenate, ConversionOps, Glm4MoeConfig, WeightConverter
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families.config_map import NO_WINDOW, SIZES, translate
from s2d2_lmeval.families.facts import Family
from s2d2_lmeval.ranks import split_rows

_SIZES = {name: name for name in (*SIZES, "head_dim", "moe_intermediate_size", "num_experts_per_tok", "n_group")}
_SIZES |= {"topk_group": "topk_group", "n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
_ASSUMES = {
    **NO_WINDOW,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
}


class LLaDA2Config(Glm4MoeConfig):
    """Glm4Moe's configuration; transformers finds the weight conversion by its type.

    The type is deliberately not the published one: a conversion under that name would also be applied to the
    published code, where someone loads it in the same process.
    """

    model_type = "llada2_glm4_moe"


class SplitQueryKeyValue(ConversionOps):
    """Splits the fused projection into its three, by the head counts of the configuration."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        config = kwargs["config"]
        (fused,) = input_dict.values()
        weight = fused[0] if isinstance(fused, list) else fused
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        parts = split_rows(weight, [query, key, key])
        return {target: part.contiguous() for target, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


_QUERY_KEY_VALUE = WeightConverter(
    source_patterns=r"\.attention\.query_key_value\.weight",
    target_patterns=[f".self_attn.{part}_proj.weight" for part in ("q", "k", "v")],
    operations=[SplitQueryKeyValue()],
)
# dFactory stacks the experts of each projection; down_proj is the native tensor then.
_STACKED_EXPERTS = WeightConverter(
    source_patterns=[r"\.mlp\.experts\.gate_proj$", r"\.mlp\.experts\.up_proj$"],
    target_patterns=".mlp.experts.gate_up_proj",
    operations=[Concatenate(dim=1)],
)
# The experts are published in the format of Glm4Moe's own checkpoints, so their stacking is transformers'.
register_checkpoint_conversion_mapping(
    LLaDA2Config.model_type,
    [_QUERY_KEY_VALUE, _STACKED_EXPERTS, *get_checkpoint_conversion_mapping("glm4_moe")],
    overwrite=True,
)


def defaults(block_length: int, *, conservative: bool = False) -> dict[str, Any]:
    """The published settings: Quality, or Conservative, which despite its name verifies at every step with masks."""
    return {
        "block_length": block_length,
        "temperature": 0.0,
        "confidence_threshold": 0.95 if conservative else 0.7,
        "editing_threshold": 0.9 if conservative else 0.5,
        "max_post_steps": 0,
        "num_to_transfer": 1,
        "eos_early_stop": True,
        "min_ssd_span_length": 1,
        "do_verify_policy": "score_threshold",
        "do_verify_score_threshold": -5.0 if conservative else 0.0,
        "do_verify_score_type": "difference_static",
        "score_penalty_coef": 4.0,
        "token_acceptance_estimator": "soft_entropy_negexp",
    }


def _glm4_moe(config: Mapping[str, Any]) -> LLaDA2Config:
    _refuse_relatives(config)
    _refuse_quantized(config)
    return translate(
        {"partial_rotary_factor": 0.5, **config},
        LLaDA2Config,
        _SIZES,
        optional=("hidden_act", "routed_scaling_factor", "first_k_dense_replace"),
        assumes=_ASSUMES,
        norm_topk_prob=True,
        use_qk_norm=True,
        attention_bias=False,
    )


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    """The fused projection would have to be split as it is stored, with scales for blocks of all three."""
    if config.get("quantization_config"):
        raise CheckpointError(
            "quantized LLaDA2 checkpoints hold queries, keys and values as one projection, which cannot be split here. "
            "Load plain weights, with load_in_8bit=True if memory is short."
        )


def _refuse_relatives(config: Mapping[str, Any]) -> None:
    """LLaDA2.2 and LLaDA2.0-Uni have the same weights by name and shape, and would load and answer wrongly."""
    for name in ("expert_capacity", "delete_token_id", "split_token_id", "image_token_offset"):
        if config.get(name):
            what = "LLaDA2.0-Uni (images)" if name.startswith("image") else "LLaDA2.2, whose router chooses per block"
            raise CheckpointError(
                f"this LLaDA2MoeModelLM says {name}={config[name]!r}: it is {what}, which {LLADA2.native_class} does "
                "not compute, so no family=… decodes it. Give a LLaDA2.0 or LLaDA2.1 checkpoint."
            )


LLADA2 = Family(
    name="llada2",
    model_types=("llada2_moe", "llada2_moe_veomni"),  # the latter is what dFactory writes
    classes=("LLaDA2MoeModelLM", "LLaDA2MoeModel", "LLaDA2MoeForCausalLM"),
    native_class="Glm4MoeForCausalLM",
    config_class=LLaDA2Config,
    config_map=_glm4_moe,
    key_mapping={
        r"^model\.word_embeddings\.": "model.embed_tokens.",
        r"\.attention\.dense\.": ".self_attn.o_proj.",
        r"\.attention\.query_layernorm\.": ".self_attn.q_norm.",
        r"\.attention\.key_layernorm\.": ".self_attn.k_norm.",
        r"\.mlp\.gate\.expert_bias": ".mlp.gate.e_score_correction_bias",
    },
    token_shift=False,
    scheme="editing",
    commits_last_block="never",
    defaults=defaults,
    presets={"llada2-conservative": defaults(32, conservative=True), "llada2-quality": defaults(32)},
    published_mask_ids={157184: 156895},
    published_stop_ids={157184: 156892},
    published_block_length=32,
    fixed_block_length=True,
    shares_weights=False,
)
