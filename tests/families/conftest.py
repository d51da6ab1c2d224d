"""Tiny checkpoints in every family's published format, made from the random weights of its native class."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 7,
    "mask_token_id": 60,
    "torch_dtype": "float32",
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
NATIVE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NATIVE += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")


class Layout(NamedTuple):
    """How a family publishes what a native class computes."""

    native_class: str
    published: dict[str, Any]
    native: Callable[[dict[str, Any]], dict[str, Any]]
    names: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def same(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in (*NATIVE, "head_dim") if name in config} | {"rope_parameters": ROPE}


def moe(config: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: config[name] for name in ("moe_intermediate_size", "num_experts", "num_experts_per_tok")}
    return same(config) | sizes | {"norm_topk_prob": config["norm_topk_prob"]}


def llada_native(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": config["embedding_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config["mlp_hidden_size"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"] or config["n_heads"],
        "max_position_embeddings": config["max_sequence_length"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": config["weight_tying"],
        "rope_parameters": ROPE,
    }


def llada2_native(config: dict[str, Any]) -> dict[str, Any]:
    kept = ("moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor")
    return (
        same(config)
        | {name: config[name] for name in (*kept, "first_k_dense_replace")}
        | {"n_routed_experts": config["num_experts"], "n_shared_experts": config["num_shared_experts"]}
        | {"norm_topk_prob": True, "use_qk_norm": True, "attention_bias": False}
        | {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
    )


def unstacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One weight per expert, as published."""
    out = {}
    for name, value in weights.items():
        if name.endswith(".experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for number, expert in enumerate(value):
                gate, up = expert.chunk(2)
                out[f"{prefix}{number}.gate_proj.weight"], out[f"{prefix}{number}.up_proj.weight"] = gate, up
        elif name.endswith(".experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            out |= {f"{prefix}{number}.down_proj.weight": expert for number, expert in enumerate(value)}
        else:
            out[name] = value
    return out


def llada_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    block = {"self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj"}
    block |= {"mlp.down_proj": "ff_out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm"}
    block |= {f"self_attn.{part}_proj": f"{part}_proj" for part in "qkv"}
    top = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
    out = {}
    for name, value in weights.items():
        stem = name.removesuffix(".weight")
        if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
            out[f"model.transformer.blocks.{found[1]}.{block[found[2]]}.weight"] = value
        else:
            out[f"model.transformer.{top[stem]}.weight"] = value
    return out


def llada2_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {"embed_tokens": "word_embeddings", "self_attn.o_proj": "attention.dense"}
    renamed |= {"self_attn.q_norm": "attention.query_layernorm", "self_attn.k_norm": "attention.key_layernorm"}
    renamed |= {"gate.e_score_correction_bias": "gate.expert_bias"}
    out = {}
    for name, value in unstacked(weights).items():
        if ".self_attn.q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            out[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            for native, published in renamed.items():
                name = name.replace(native, published)
            out[name] = value
    return out


def ministral3(config: dict[str, Any]) -> dict[str, Any]:
    return same(config) | {"rope_parameters": config["rope_parameters"], "sliding_window": None}


def nemotron_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("model.", "encoder.").replace("lm_head", "diffusion_head"): weights[name] for name in weights}


YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.1,
    }
}
QWEN3 = {**COMMON, "head_dim": 16, "attention_bias": False, "block_size": 4}
MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
LLADA2 = {"num_experts": 12, "num_shared_experts": 1, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1}
LLADA2 |= {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "routed_scaling_factor": 2.5, "head_dim": 16}
LLADA = {"embedding_size": 61, "vocab_size": 61, "d_model": 32, "mlp_hidden_size": 48, "n_layers": 2, "n_heads": 4}
LLADA |= {"n_kv_heads": None, "max_sequence_length": 128, "rope_theta": 1e4, "weight_tying": False, "alibi": False}
LLADA |= {"block_type": "llama", "layer_norm_type": "rms", "eos_token_id": 7, "mask_token_id": 60, "rope": True}

LAYOUTS = {
    "sdar": Layout("Qwen3ForCausalLM", {**QWEN3, "model_type": "sdar"}, same, dict),
    "sdar_moe": Layout("Qwen3MoeForCausalLM", {**QWEN3, **MOE, "model_type": "sdar_moe"}, moe, unstacked),
    "fast_dllm_v2": Layout("Qwen2ForCausalLM", {**COMMON, "bd_size": 32, "model_type": "Fast_dLLM_Qwen"}, same, dict),
    "llada2": Layout(
        "Glm4MoeForCausalLM", {**COMMON, **LLADA2, "model_type": "llada2_moe"}, llada2_native, llada2_names
    ),
    "llada": Layout("LlamaForCausalLM", {**LLADA, "model_type": "llada"}, llada_native, llada_names),
    "dream": Layout("Qwen2ForCausalLM", {**COMMON, "model_type": "Dream"}, same, dict),
    "nemotron_labs_diffusion": Layout(
        "Ministral3ForCausalLM", {**QWEN3, **YARN, "model_type": "nemotron_labs_diffusion"}, ministral3, nemotron_names
    ),
    "tiny_a2d": Layout("Qwen3ForCausalLM", {**QWEN3, "model_type": "a2d-qwen3"}, same, dict),
    "stable_diffcoder": Layout(
        "LlamaForCausalLM",
        {**COMMON, "model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"]},
        same,
        dict,
    ),
    "idlm": Layout("Qwen3ForCausalLM", {**QWEN3, "model_type": "sdar", "use_regular_causal": True}, same, dict),
    "wedlm": Layout("Qwen3ForCausalLM", {**QWEN3, "model_type": "wedlm"}, same, dict),
    "wedlm_qwen2": Layout(
        "Qwen2ForCausalLM", {**COMMON, "model_type": "wedlm", "qk_norm": False, "attention_bias": True}, same, dict
    ),
}


def random_native(layout: Layout, config: dict[str, Any]) -> PreTrainedModel:
    """The native class with weights large enough that every one of them shows in the logits."""
    native_class = getattr(transformers, layout.native_class)
    torch.manual_seed(0)
    model = native_class._from_config(
        native_class.config_class(**layout.native(config)), attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.2)
        model.tie_weights()
    return model


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> None:
    """A safetensors file, or several and their index."""
    names = sorted(weights)
    if shards == 1:
        save_file({name: weights[name].clone() for name in names}, folder / "model.safetensors")
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: weights[name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Published(NamedTuple):
    folder: Path
    native: PreTrainedModel
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]


@pytest.fixture(params=list(LAYOUTS))
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Published]:
    """publish(family, shards=1, without=(), **changes of config.json) -> Published."""

    def make(name: str, *, shards: int = 1, without: tuple[str, ...] = (), **changes: Any) -> Published:
        layout = LAYOUTS[name]
        config = {key: value for key, value in (layout.published | changes).items() if key not in without}
        native = random_native(layout, layout.published | changes)
        weights = native.state_dict()
        if native.config.tie_word_embeddings:
            weights.pop("lm_head.weight")
        weights = layout.names(weights)
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        write_weights(folder, weights, shards)
        return Published(folder, native, config, weights)

    return make


@pytest.fixture
def rewrite() -> Callable[[Path, dict[str, torch.Tensor]], None]:
    """Puts other weights into a checkpoint of one file."""
    return write_weights


@pytest.fixture
def logits() -> Callable[[PreTrainedModel], torch.Tensor]:
    """Logits of one fixed sequence under a mask with a bidirectional block at its end."""

    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        ids = torch.tensor([[3, 1, 4, 15, 9, 26, 60, 60, 60]], device=model.device)
        visible = torch.ones(9, 9, dtype=torch.bool, device=model.device).tril()
        visible[6:] = True
        return model(input_ids=ids, attention_mask=visible[None, None]).logits.float().cpu()

    return run
