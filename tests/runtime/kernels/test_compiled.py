"""Experts compiled for any number of queries, shared by all layers."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from s2d2_lmeval import load
from s2d2_lmeval.errors import ConfigError


def experts() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, max_position_embeddings=64)).eval()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_experts_answer_alike_at_every_width() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"decoder": "s2d2", "block_length": 4, "stop_token_ids": []}
    answers = []
    for compiles in (False, True):
        model = load(experts(), family="sdar_moe", mask_token_id=39, block_length=4, compile=compiles)
        answers.append(
            [one.canvas for one in model.generate([[1, 2, 3], [4] * 9, [5] * 5], options, max_new_tokens=12)]
        )
    assert answers[0] == answers[1]
    stats = torch._dynamo.utils.counters
    assert not stats["graph_break"]
    assert 1 <= stats["stats"]["unique_graphs"] <= 2


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile=true is for models with experts"):
        load("toy", compile=True)
