"""Models to measure on where the weights do not matter: the shapes of published checkpoints, filled at random."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "sdar-100m": {
        "hidden_size": 640,
        "intermediate_size": 1920,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    "sdar-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
"""Name -> Qwen3 configuration. ``sdar-8b`` is JetLM/SDAR-8B-Chat's; ``sdar-100m`` keeps its proportions for a CPU."""


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A plain transformers model of the shape ``name`` with random weights and its last id as the mask token."""
    shape = SHAPES[name]
    config = Qwen3Config(
        **shape,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)
