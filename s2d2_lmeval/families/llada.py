"""LLaDA: Llama under OLMo's names, the first base of D2F.

Source: GSAI-ML/LLaDA-8B-*; settings from the S2D2 README.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

from s2d2_lmeval.families import d2f
from s2d2_lmeval.families.config_map import translate
from s2d2_lmeval.families.facts import Family

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
    block_alignment="prompt",
    scheme="pipelined",
    defaults=d2f.defaults,
    presets={"d2f-llada": d2f.defaults(d2f.BLOCK_LENGTH)},
    published_mask_ids={126464: 126336},
    published_block_length=d2f.BLOCK_LENGTH,
    caveat_without_adapter=d2f.CAVEAT,
    fixed_block_length=True,
)
