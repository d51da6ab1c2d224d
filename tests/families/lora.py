"""LoRA adapters with random factors, as they are published: under the names of the model that they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, ALPHA = 3, 12
MODULES = {
    "llada": {
        "model.transformer.blocks.0.q_proj": "model.layers.0.self_attn.q_proj",
        "model.transformer.blocks.1.attn_out": "model.layers.1.self_attn.o_proj",
        "model.transformer.blocks.1.ff_out": "model.layers.1.mlp.down_proj",
        "model.transformer.ff_out": "lm_head",
    },
    "dream": {
        "model.layers.0.self_attn.k_proj": "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.up_proj": "model.layers.1.mlp.up_proj",
    },
}


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(native: torch.nn.Module, names: dict[str, str], form: str = "{}.lora_{}.weight") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = {}
    for published, name in names.items():
        rows, columns = native.get_parameter(f"{name}.weight").shape
        prefix = f"base_model.model.{published}"
        out[form.format(prefix, "A")] = 0.3 * torch.randn(RANK, columns, generator=generator)
        out[form.format(prefix, "B")] = 0.3 * torch.randn(rows, RANK, generator=generator)
    return out
