"""A decoder on a CPU in few calls: the numbers of transformers' modules."""

from __future__ import annotations

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, Ministral3Config, Ministral3ForCausalLM

import s2d2_lmeval
from s2d2_lmeval.runtime.drafting.dflash import FeatureTap
from s2d2_lmeval.runtime.runner import Runner

from .test_fused import MODELS, SIZES, logits_of, model_of


def glm(experts: int) -> Glm4MoeForCausalLM:
    """LLaDA2's class: rotary embeddings of half a head, and in the second layer experts, if any."""
    torch.manual_seed(0)
    sizes = {"n_routed_experts": max(experts, 1), "num_experts_per_tok": 1, "moe_intermediate_size": 32, "n_group": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    more = {"topk_group": 1, "first_k_dense_replace": 1 if experts else 2, "use_qk_norm": True}
    config = Glm4MoeConfig(**{**SIZES, **sizes, **more, "rope_parameters": rope})
    return Glm4MoeForCausalLM._from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("name", [name for name in MODELS if "ministral3" not in name])
def test_logits_of_the_modules(name: str) -> None:
    expected, runner = logits_of(Runner(model_of(name), "sdpa", fused="off")), Runner(model_of(name), "sdpa")
    assert runner.lean is not None
    assert torch.equal(logits_of(runner), expected)


@pytest.mark.parametrize("experts", [0, 4])
def test_rotary_embeddings_of_half_a_head(experts: int) -> None:
    expected, runner = logits_of(Runner(glm(experts), "sdpa", fused="off")), Runner(glm(experts), "sdpa")
    assert runner.lean is not None
    assert torch.equal(logits_of(runner), expected)


def test_hooks_see_what_leaves_a_layer() -> None:
    features = []
    for wanted in ("off", "auto"):
        runner = Runner(model_of("qwen3"), "sdpa", fused=wanted)
        tap = FeatureTap(runner.backbone, (0, 1))
        logits_of(runner)
        features.append(tap.features())
    torch.testing.assert_close(features[1], features[0], rtol=1e-5, atol=1e-5)


def test_other_weights() -> None:
    runner, other = Runner(model_of("qwen3"), "sdpa"), model_of("qwen3")
    for weight in other.parameters():
        weight.mul_(0.5)
    for weight, own in zip(other.parameters(), runner.model.parameters(), strict=True):
        own.copy_(weight)  # in place
    torch.testing.assert_close(logits_of(runner), logits_of(Runner(other, "sdpa", fused="off")), rtol=1e-5, atol=2e-5)
    other = model_of("qwen3")
    runner.model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(logits_of(runner), logits_of(Runner(other, "sdpa", fused="off")), rtol=1e-5, atol=2e-5)


def test_what_is_left_to_the_modules() -> None:
    assert Runner(model_of("qwen3", torch.float64)).lean is None
    assert Runner(model_of("qwen3").to(torch.bfloat16)).lean is None
    assert Runner(model_of("qwen3"), "triton").lean is None
    model = model_of("qwen3")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert Runner(model).lean is None
    scaled = Ministral3ForCausalLM._from_config(Ministral3Config(**SIZES)).eval()
    assert Runner(scaled).lean is None
    assert s2d2_lmeval.load("toy", fused="off")._runner.lean is None
