"""Memory that is planned for a row covers what its steps take, and not several times as much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from s2d2_lmeval import BlockDiffusionModel, load
from s2d2_lmeval.decoding import scoring
from s2d2_lmeval.decoding.engine import Engine
from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.passes import Sent
from s2d2_lmeval.decoding.sampling import row_statistics
from s2d2_lmeval.runtime.memory import bytes_per_token
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.runner import Runner

from ..peak import Peak
from . import pipelined_cases, subblocks_drawn
from .tiny import tiny_model

VOCABULARY = 2048
PROMPTS = [[(3 * i + j) % 500 for j in range(20)] for i in range(4)]
FILTERS = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}
SMALL = 1.03
"""What else is alive, tables of tokens and places, is next to nothing; to this vocabulary it is a little."""
DECODERS: dict[str, dict[str, Any]] = {
    "ar": {"decoder": "ar"},
    "dynamic": {"decoder": "dynamic"},
    "entropy_bounded": {"decoder": "entropy_bounded", "eb_threshold": 0.3},
    "s2d2": {"decoder": "s2d2"},
    "lookahead": {"decoder": "s2d2", "schedule": "lookahead", "cache_ver": True, "draft_ver": True},
    "score": {"decoder": "s2d2", "do_verify_policy": "score_threshold"},
    "sliding": {"decoder": "sliding"},
    "chain": {"decoder": "sliding", "draft_shape": "chain"},
    "spiffy": {"decoder": "spiffy"},
}


def blocks() -> BlockDiffusionModel:
    plain = tiny_model(vocabulary=VOCABULARY, dtype=torch.float32, hidden=16, layers=1)
    return load(plain, mask_token_id=VOCABULARY - 1, block_length=4, max_batch=4)


def subblocks() -> BlockDiffusionModel:
    return subblocks_drawn.engine(layers=1, max_batch=4, vocabulary=VOCABULARY)


def pipelined() -> BlockDiffusionModel:
    return pipelined_cases.engine("llada", max_batch=4, seed=77)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which does not work on a few rows at a time to stay in a cache."""
    monkeypatch.setattr(row_statistics, "ELEMENTS_AT_ONCE", 1 << 60)


def taken_and_planned(
    model: BlockDiffusionModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[float, int, int, int]:
    """Logits of a row that a run read of a forward, and that it had alive at once, at most; and those planned for."""
    peak, read, alive, planned = Peak(), [], [], [0, 0]
    prepare = Engine._prepare

    def prepared(engine: Engine, requests: Sequence[Request]) -> None:
        prepare(engine, requests)
        decoder, decide = engine.decoder, engine.decoder.decide
        needs = engine._needs(decoder, 1)
        planned[:] = decoder.most_logits[0], needs.logits

        def decided(sent: Sent, logits: torch.Tensor) -> Any:
            rows = engine.slots
            peak.begin()
            before = peak.bytes - logits.nbytes
            outcome = decide(sent, logits)
            read.append(len(logits) / rows)
            alive.append((peak.most - before) / (rows * VOCABULARY * logits.itemsize))
            return outcome

        monkeypatch.setattr(decoder, "decide", decided)

    monkeypatch.setattr(Engine, "_prepare", prepared)
    with peak:
        model.generate(PROMPTS, {"max_new_tokens": 8, "stop_token_ids": [], **options})
    return max(read), max(alive), *planned


@pytest.mark.parametrize("sampling", [{}, FILTERS], ids=["greedy", "filtered"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_of_blocks(decoder: str, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read, alive, may_read, may_live = taken_and_planned(blocks(), {**DECODERS[decoder], **sampling}, monkeypatch)
    assert read <= may_read
    assert alive <= may_live * SMALL <= 4 * alive


@pytest.mark.parametrize("sampling", [{}, FILTERS], ids=["greedy", "filtered"])
@pytest.mark.parametrize("decoder", ["dynamic", "s2d2"])
def test_logits_of_subblocks(decoder: str, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read, alive, may_read, may_live = taken_and_planned(subblocks(), {"decoder": decoder, **sampling}, monkeypatch)
    assert read <= may_read
    assert alive <= may_live * SMALL <= 4 * alive


@pytest.mark.parametrize("sampling", [{}, FILTERS], ids=["greedy", "filtered"])
@pytest.mark.parametrize("decoder", ["pipelined", "s2d2"])
def test_logits_of_pipelines(decoder: str, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelined_cases, "VOCABULARY", VOCABULARY)
    read, alive, may_read, may_live = taken_and_planned(pipelined(), {"decoder": decoder, **sampling}, monkeypatch)
    assert read <= may_read
    assert alive <= may_live * SMALL


@pytest.mark.parametrize("make", [blocks, subblocks])
def test_logits_of_scoring(make: Callable[[], BlockDiffusionModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model, peak, most = make(), Peak(), []
    run = model._runner.run

    def watched(*arguments: Any) -> torch.Tensor:
        logits = run(*arguments)
        most.append([peak.bytes - logits.nbytes, logits.nbytes])
        peak.begin()
        return logits

    monkeypatch.setattr(model._runner, "run", watched)
    with peak:
        model.score([(PROMPTS[0], [5] * 60)])
    (before, size), *others = most
    assert not others
    assert 2 * size < peak.most - before <= scoring.TABLES * size


CONFIG = {"vocab_size": 50, "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 16}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "grouped": lambda: Qwen3ForCausalLM(
        Qwen3Config(**CONFIG, intermediate_size=768, num_key_value_heads=4, head_dim=16)
    ),
    "many_heads": lambda: Qwen3ForCausalLM(
        Qwen3Config(**CONFIG, intermediate_size=128, num_key_value_heads=4, head_dim=64)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**CONFIG, intermediate_size=768, num_key_value_heads=16)),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**CONFIG, num_key_value_heads=4, head_dim=16, moe_intermediate_size=96, num_experts=16)
    ),
    "glm": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(**CONFIG, num_key_value_heads=4, head_dim=16, moe_intermediate_size=96, n_routed_experts=16)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_activations_of_a_prompt(name: str) -> None:
    rows, width, capacity = 2, 256, 1024
    runner = Runner(MODELS[name]().to(torch.bfloat16))
    runner.reserve(rows, capacity)
    layout = Layout(np.arange(rows), np.full(rows, width))
    place = torch.from_numpy(layout.local)
    visible = torch.ones(width, width, dtype=torch.bool).tril().expand(rows, -1, -1)

    def request() -> Pass:
        return Pass(layout, place % 50, place, visible, torch.arange(1), np.full(rows, width))

    runner.forward(request())  # allocates the cache
    with Peak() as peak:
        runner.forward(request())
    taken, planned = peak.most / layout.queries, bytes_per_token(runner.model, 2 * width)
    assert taken <= planned <= 2.5 * taken
