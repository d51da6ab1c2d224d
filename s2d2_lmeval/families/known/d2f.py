"""D2F: its setting and its bases, LLaDA (Llama under OLMo's names) and Dream (Qwen2, logits shifted by one token).

Source: GSAI-ML/LLaDA-8B-*, Dream-org/Dream-v0-*; settings from the S2D2 README and the defaults of its D2F scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, Qwen2Config

from s2d2_lmeval.families.config_map import qwen2, translate
from s2d2_lmeval.families.facts import Family

# D2F was trained with, and is published for, one block length; the base checkpoints know nothing of blocks.
BLOCK_LENGTH = 32
_CAVEAT = (
    "decoded block by block, as D2F makes LLaDA and Dream by a LoRA adapter: give it as adapter=… (in --model_args: "
    "peft=…) unless it is in these weights already. Without it the model was trained to see the whole text at once, "
    "and answers worse than by its own method, which is not decoded here"
)


def defaults(block_length: int) -> dict[str, Any]:
    """Pipelined blocks with a token-causal verifier."""
    return {
        "block_length": block_length,
        "temperature": 0.0,
        "block_add_threshold": 0.5,
        "decoded_token_threshold": 0.8,
        "confidence_threshold": 0.9,
        "target_block_size": 1,
        "min_tokens_per_step": 1,
        "min_ssd_span_length": 1,
        "ssd_partial_ar_span": 0,
        "ssd_threshold_draft_confidence": False,
        "allow_resample": True,
    }


def _defaults_of_dream(block_length: int) -> dict[str, Any]:
    """D2F's setting with the stricter acceptance that was published for Dream."""
    return {
        **defaults(block_length),
        "ssd_threshold_draft_confidence": True,
        "draft_confidence_threshold": 0.5,
        "allow_resample": False,
    }


_SIZES = {
    "vocab_size": "embedding_size",
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
}
# OLMo's configuration can describe many architectures; LLaDA is the one that Llama computes.
_ASSUMES = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}
_BLOCK = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
_TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}


def _llama(config: Mapping[str, Any]) -> LlamaConfig:
    # What the published code falls back to.
    config = {"rms_norm_eps": 1e-5, **config}
    if config.get("embedding_size") is None:
        config["embedding_size"] = config.get("vocab_size")
    if config.get("n_kv_heads") is None:
        config["n_kv_heads"] = 1 if config.get("multi_query_attention") else config.get("n_heads")
    return translate(config, LlamaConfig, _SIZES, assumes=_ASSUMES, tied="weight_tying")


def _doubt(config: Mapping[str, Any], source: str) -> str | None:
    if config.get("block_size") is None:
        return None
    return f"says block_size={config['block_size']!r}, as DreamReasoner does; Dream knows no blocks"


_SHARED: dict[str, Any] = {
    "scheme": "pipelined",
    "published_block_length": BLOCK_LENGTH,
    "caveat_without_adapter": _CAVEAT,
    "fixed_block_length": True,
}
LLADA = Family(
    name="llada",
    model_types=("llada",),
    classes=("LLaDAModelLM", "LLaDAModel"),
    native_class="LlamaForCausalLM",
    config_class=LlamaConfig,
    config_map=_llama,
    key_mapping={
        **{
            rf"^model\.transformer\.blocks\.(\d+)\.{published}\.": rf"model.layers.\1.{native}."
            for published, native in _BLOCK.items()
        },
        **{rf"^model\.transformer\.{published}\.": f"{native}." for published, native in _TOP.items()},
    },
    token_shift=False,
    defaults=defaults,
    presets={"d2f-llada": defaults(BLOCK_LENGTH)},
    published_mask_ids={126464: 126336},
    **_SHARED,
)
DREAM = Family(
    name="dream",
    model_types=("Dream",),
    classes=("DreamModel", "DreamBaseModel"),
    doubt=_doubt,
    native_class="Qwen2ForCausalLM",
    config_class=Qwen2Config,
    config_map=qwen2,
    token_shift=True,
    defaults=_defaults_of_dream,
    presets={"d2f-dream": _defaults_of_dream(BLOCK_LENGTH)},
    published_mask_ids={152064: 151666},
    **_SHARED,
)
