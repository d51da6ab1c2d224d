"""Fused layers give what their modules give, and leave alone what they do not know."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import s2d2_lmeval
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime.drafting.dflash import FeatureTap
from s2d2_lmeval.runtime.kernels import fused
from s2d2_lmeval.runtime.kernels import layer as kernels
from s2d2_lmeval.runtime.kernels.fused import FusedLayer
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.studies.pretend import move_module, pretend_cuda

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LONG = {  # queries are scaled from position 4 on
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, Any] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "qwen3 with biases": (Qwen3ForCausalLM, Qwen3Config(**SIZES, attention_bias=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "ministral3": (Ministral3ForCausalLM, Ministral3Config(**SIZES, rope_parameters=LONG, max_position_embeddings=64)),
    "qwen3 with experts": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, **EXPERTS, decoder_sparse_step=2)),
}


def model_of(name: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> PreTrainedModel:
    made, config = MODELS[name]
    config = deepcopy(config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = made._from_config(config, dtype=dtype).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(torch.randn_like(weight) * 0.2 + (weight.dim() == 1))
    return model


@torch.inference_mode()
def logits_of(runner: Runner) -> torch.Tensor:
    """Two forwards: a prefill of two rows, and a ragged pass over both, one of whose masks is a tree's."""
    runner.reserve(3, 64)
    found = []
    for slots, widths, keep in (([2, 0], [7, 5], [7, 5]), ([0, 2], [4, 1], [0, 0])):
        layout = Layout(np.array(slots), np.array(widths))
        prefix = torch.from_numpy(runner.cache.lengths[layout.slots][layout.row_of])
        visible = torch.ones(2, max(widths), max(widths), dtype=torch.bool).tril()
        visible[0, 3, 1] = False
        count = layout.queries
        tokens, place = torch.arange(count) * 5 % 61, prefix + torch.from_numpy(layout.local)
        there = (one.to(runner.device) for one in (tokens, place, visible, torch.arange(count)))
        found.append(runner.forward(Pass(layout, *there, np.array(keep))))
    return torch.cat(found)


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_modules(name: str, attention: str) -> None:
    expected = logits_of(Runner(model_of(name), "sdpa"))
    runner = Runner(model_of(name), attention, fused="on")
    assert runner.fused
    torch.testing.assert_close(logits_of(runner), expected, rtol=1e-5, atol=2e-5)


def test_half_precision_is_off_by_no_more_than_the_modules_are() -> None:
    exact = logits_of(Runner(model_of("qwen3", torch.float64), "sdpa"))
    off = []
    for wanted in ("off", "on"):
        model = model_of("qwen3").to(torch.bfloat16)
        off.append((logits_of(Runner(model, "sdpa", fused=wanted)) - exact).abs().max().item())
    assert off[1] < 1.3 * off[0]


def test_answers_of_the_toy_and_its_drafter() -> None:
    prompts = [[5, 6, 7], list(range(20, 40))]
    options = {"decoder": "ddtree", "max_new_tokens": 12}
    answers = []
    for wanted in ("off", "on"):
        model = s2d2_lmeval.load("toy", draft="toy", fused=wanted)
        assert model.fused is (wanted == "on")
        answers.append([answer.canvas for answer in model.generate(prompts, options)])
    assert answers[0] == answers[1]
    assert all(isinstance(layer.forward, FusedLayer) for layer in model._runner.drafter.backbone.layers)  # type: ignore[attr-defined]


def test_ten_launches_a_layer() -> None:
    launches = []
    for layers in (1, 2):
        with pretend_cuda() as counts:
            runner = Runner(move_module(model_of("qwen3", layers=layers)))
            assert (runner.attention, runner.fused) == ("triton", True)
            counts.reset()
            logits_of(runner)
            launches.append(counts.totals()["launches_outside"])
    forwards = 2
    assert launches[1] - launches[0] == 10 * forwards


def test_weights_are_held_once_and_keep_their_names(tmp_path: Path) -> None:
    plain, model = model_of("qwen2"), model_of("qwen2")
    Runner(model, fused="on")
    assert plain.state_dict().keys() == model.state_dict().keys()
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    model.save_pretrained(tmp_path)
    again = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in plain.state_dict().items())
    attention = model.model.layers[0].self_attn
    storages = {getattr(attention, f"{name}_proj").weight.untyped_storage().data_ptr() for name in "qkv"}
    assert len(storages) == 1


def test_hooks_see_what_leaves_a_layer() -> None:
    features = []
    for wanted in ("off", "on"):
        runner = Runner(model_of("qwen3"), "sdpa", fused=wanted)
        tap = FeatureTap(runner.backbone, (0, 1))
        logits_of(runner)
        features.append(tap.features())
    torch.testing.assert_close(features[1], features[0], rtol=1e-5, atol=1e-5)


def test_layers_that_accelerate_brings_inputs_to() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    plain, model = model_of("qwen3"), model_of("qwen3")
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
        add_hook_to_module(layer.mlp.up_proj, AlignDevicesHook("cpu"))
    runner = Runner(model, "sdpa", fused="on")
    assert isinstance(model.model.layers[0]._old_forward, FusedLayer)
    torch.testing.assert_close(logits_of(runner), logits_of(Runner(plain, "sdpa")), rtol=1e-5, atol=2e-5)
    assert not Runner(model, "sdpa", fused="off").fused
    assert not isinstance(model.model.layers[0]._old_forward, FusedLayer)
    add_hook_to_module(model.model.layers[1].mlp.up_proj, AlignDevicesHook("cpu", offload=True))
    with pytest.raises(ConfigError, match="accelerate keeps its weights elsewhere"):
        Runner(model, "sdpa", fused="on")


def test_on_two_gpus() -> None:
    """Layers lie on both; only what is between the products is left of their kernels."""
    expected = logits_of(Runner(model_of("qwen3"), "sdpa"))
    launches = {}
    for wanted in ("off", "on"):
        with pretend_cuda(devices=2) as counts:
            on = {"model.layers.1": "cuda:1"}
            moved = move_module(model_of("qwen3"), lambda name, on=on: on.get(name[:14], "cuda:0"))
            runner = Runner(moved, fused=wanted)
            assert (runner.attention, runner.fused) == ("triton", wanted == "on")
            counts.reset()
            torch.testing.assert_close(logits_of(runner).cpu(), expected, rtol=1e-5, atol=2e-5)
            totals = counts.totals()
        assert not totals["device_mismatches"]
        launches[wanted] = totals["launches_outside"]
    per_layer = (launches["off"] - launches["on"]) / 4
    assert per_layer > 25, launches


def test_other_weights_go_to_the_module() -> None:
    runner = Runner(model_of("qwen3"), "sdpa", fused="on")
    other = model_of("qwen3")
    for weight in other.parameters():
        weight.mul_(0.5)
    runner.model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(logits_of(runner), logits_of(Runner(other, "sdpa")))


def test_off_again() -> None:
    model = model_of("qwen3")
    assert Runner(model, fused=True).fused
    assert not Runner(model, fused=False).fused
    assert not any(isinstance(layer.forward, FusedLayer) for layer in model.model.layers)
    assert not Runner(model).fused, "on a CPU it is for tests"


def test_what_is_not_known_is_left_to_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
    glm = Glm4MoeForCausalLM._from_config(Glm4MoeConfig(**SIZES, **experts, partial_rotary_factor=0.5, topk_group=1))
    with pytest.raises(ConfigError, match=r"their rotary embedding covers part of a head. Use fused=auto."):
        Runner(glm.eval(), "sdpa", fused="on")
    model = model_of("qwen3")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ConfigError, match=r"it has self_attn\.sinks"):
        Runner(model, "sdpa", fused="on")
    with pytest.raises(ConfigError, match=r"fused='yes' is none of: auto, on, off"):
        Runner(model_of("qwen3"), "sdpa", fused="yes")


def test_a_layer_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("qwen3")
    expected = logits_of(Runner(model_of("qwen3"), "sdpa"))
    monkeypatch.setattr(fused, "silu_mul", lambda x: 1.01 * kernels.silu_mul(x))
    monkeypatch.setattr(fused, "runs_triton", lambda device: True)
    with caplog.at_level(logging.INFO):
        runner = Runner(model, "sdpa")
    assert not runner.fused
    assert "they give something else than their modules" in caplog.text
    torch.testing.assert_close(logits_of(runner), expected)
