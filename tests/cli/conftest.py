"""A tiny random SDAR checkpoint with a tokenizer of one token per letter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|MASK|>")
LETTERS = 256
MASK, STOP = LETTERS + 2, LETTERS + 1
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, template: str | None) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_checkpoint(folder: Path, *, template: str | None = TEMPLATE, **config: object) -> Path:
    """The folder, with config.json completed or changed by ``config``."""
    folder.mkdir(parents=True)
    write_tokenizer(folder, template)
    sizes = {
        "vocab_size": LETTERS + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 160,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(5)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.25)
        model.lm_head.weight[LETTERS:] = 0.0
    save_file(dict(model.state_dict()), str(folder / "model.safetensors"), metadata={"format": "pt"})
    published = {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "block_size": 4,
        "mask_token_id": MASK,
        "eos_token_id": STOP,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": 10000.0,
        **sizes,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(published))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def templateless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "plain", template=None)
