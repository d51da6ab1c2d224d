"""A tiny autoregressive checkpoint, and adapters for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from s2d2_lmeval.families import load_checkpoint
from s2d2_lmeval.families.drafts import digest
from s2d2_lmeval.training.adapter import AdaptedModel, Form

VOCABULARY = 61


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose choices are neither all alike nor all equal."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.1 * noise if weight.dim() == 1 else (0.8 if len(weight) == VOCABULARY else 0.17) * noise
    model.save_pretrained(folder)
    return folder


Adapter = Callable[[Form], Path]


@pytest.fixture(scope="session")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Writes a random adapter of a form."""

    def written(form: Form) -> Path:
        adapted = AdaptedModel(*load_checkpoint(checkpoint, device="cpu"), form, seed=3)
        generator = torch.Generator().manual_seed(4)
        for name, parameter in adapted.parameters.items():
            if not name.endswith("lora_A.weight"):
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path_factory.mktemp("adapter")
        adapted.save(folder, digest([checkpoint / "model.safetensors"]), "a/base")
        return folder

    return written
