"""Write and read the toy checkpoint: the format of SDAR checkpoints, weights in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from recipes.toy.network import Network, Shape
from recipes.toy.tokenization import CONTEXT_LENGTH, END_OF_TEXT, MASK, TURN_END, token_id

BLOCK_SIZE = 8
STORED_TYPE = torch.bfloat16


def save_model(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``model.safetensors`` (through a temporary file), ``config.json`` and ``generation_config.json``."""
    weights = {name: weight.detach().to(STORED_TYPE).contiguous() for name, weight in network.state_dict().items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes for the owner only, which an installed package cannot use
    partial.replace(folder / "model.safetensors")
    end, pad = token_id(tokenizer, TURN_END), token_id(tokenizer, END_OF_TEXT)
    _write(folder / "config.json", _configuration(network.shape, end, pad, token_id(tokenizer, MASK)))
    _write(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False})


def load_network(folder: Path) -> Network:
    """The stored network in float32, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        key_value_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        intermediate=config["intermediate_size"],
        rope_theta=config["rope_theta"],
        epsilon=config["rms_norm_eps"],
    )
    network = Network(shape)
    network.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
    return network.eval()


def _configuration(shape: Shape, end: int, pad: int, mask: int) -> dict[str, object]:
    return {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": BLOCK_SIZE,
        "bos_token_id": None,
        "eos_token_id": end,
        "fuse_cross_entropy": False,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "mask_token_id": mask,
        "max_position_embeddings": CONTEXT_LENGTH,
        "model_type": "sdar",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "pad_token_id": pad,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": str(STORED_TYPE).removeprefix("torch."),
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocabulary,
    }


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
