"""Published drafter checkpoints: their variants, their arithmetic, and refusals of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

import s2d2_lmeval
from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.drafting.dflash import DFlash, FeatureTap
from s2d2_lmeval.runtime.drafting.loading import default_layer_ids, drafter_shape, load_drafter
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.runner import Runner

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
BLOCK, MASK = 4, 39


def target(layers: int = 5, **changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(**{**SIZES, "num_hidden_layers": layers, "tie_word_embeddings": False, **changes})
    return Qwen3ForCausalLM._from_config(config, dtype=torch.float64).eval()


def published(**changes: Any) -> dict[str, Any]:
    config = {**SIZES, "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 2}
    config |= {"num_target_layers": 5, "block_size": BLOCK, "rope_theta": 10000.0}
    return {**config, "dflash_config": {"target_layer_ids": [1, 3], "mask_token_id": MASK}, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, published())
    return tmp_path


def write(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    drafter = DFlash(drafter_shape(config, "here"))
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: (1 if weight.dim() == 1 else 0) + 0.2 * torch.randn(weight.shape, generator=generator)
        for name, weight in drafter.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def by_hand(drafter: DFlash, model: Qwen3ForCausalLM, text: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """The published forward, written out: context and block rows concatenated, no cache, one sequence."""
    shape, start, size = drafter.shape, len(text), len(block)
    states = model(text.view(1, -1), output_hidden_states=True).hidden_states
    context = drafter.hidden_norm(drafter.fc(torch.cat([states[i + 1][0] for i in shape.layer_ids], -1)))
    hidden = model.get_input_embeddings()(block) * shape.embedding_scale
    cos, sin = drafter.rotary_emb(hidden, torch.arange(start + size).view(1, -1))
    cos, sin = cos[0], sin[0]

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    query_at, key_at = start + torch.arange(size).view(-1, 1), torch.arange(start + size)

    def convolved(x: torch.Tensor, conv: Any, told: torch.Tensor, side: int) -> torch.Tensor:
        """``x`` after one of a sublayer's convolutions, whose factors also depend on ``told``; written out."""
        if shape.convolution is None:
            return x
        (taps, group), found = shape.convolution, torch.zeros_like(x)
        own = (told @ conv.kernel_projection.weight.T).view(size, 2, taps, -1)
        for at, channel in np.ndindex(*x.shape):
            for tap in range(min(taps, at + 1)):
                factor = conv.base_kernel[side, tap, channel] + own[at, side, tap, channel // group]
                found[at, channel] += factor * x[at - tap, channel]
        return found

    for layer, window, causal in zip(drafter.layers, shape.windows, shape.causal, strict=True):
        attention: Any = layer.self_attn
        around, after = (getattr(layer, f"{part}_conv", None) for part in ("attention", "mlp"))
        told = layer.input_layernorm(hidden)
        normed = convolved(told, around, told, 0)
        source = torch.cat([context, normed])
        query = attention.q_norm(attention.q_proj(normed).view(size, -1, 8)).transpose(0, 1)
        key = attention.k_norm(attention.k_proj(source).view(len(source), -1, 8)).transpose(0, 1)
        value = attention.v_proj(source).view(len(source), -1, 8).transpose(0, 1)
        query, key = rotate(query, cos[start:], sin[start:]), rotate(key, cos, sin)
        key, value = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
        sees = torch.ones(size, start + size, dtype=torch.bool)
        if causal:
            sees &= key_at <= query_at
        if window is not None:
            sees &= (query_at - key_at).abs() < window
        weight = (query @ key.transpose(1, 2) / 8**0.5).masked_fill(~sees, -torch.inf).softmax(-1)
        attended = attention.o_proj((weight @ value).transpose(0, 1).reshape(size, -1))
        hidden = hidden + convolved(attended, around, told, 1)
        told = layer.post_attention_layernorm(hidden)
        hidden = hidden + convolved(layer.mlp(convolved(told, after, told, 0)), after, told, 1)
    logits = model.get_output_embeddings()(drafter.norm(hidden)) * shape.logit_scale
    return torch.tanh(logits / shape.softcap) * shape.softcap if shape.softcap else logits


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal windows": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "two-sided windows": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3, "is_causal": False},
    "windows by name": {"dflash_config": {"use_swa": True, "swa_window_size": 5, "causal": True}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "old rope scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "two taps": {"dflash_config": {"conv_kernel_size": 2, "conv_group_size": 8}, "is_causal": False},
    "three taps in windows": {
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 6,
        "dflash_config": {"conv_kernel_size": 3, "conv_group_size": 16},
    },
    "scales": {
        "dflash_config": {"input_embedding_scale": 3.0, "output_multiplier": 0.5, "final_logit_softcapping": 2.0}
    },
}


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_pass_is_the_published_forward(variant: str, attention: str, tmp_path: Path) -> None:
    """Two rows of different lengths, what is read absorbed in pieces, against one sequence at a time."""
    own = {"target_layer_ids": [1, 3], "mask_token_id": MASK, **VARIANTS[variant].get("dflash_config", {})}
    write(tmp_path, published(**{**VARIANTS[variant], "dflash_config": own}))
    model = target()
    drafter = load_drafter(tmp_path, model)
    texts = [torch.arange(20) % 37, (3 * torch.arange(11)) % 38]
    blocks = [torch.tensor([7, MASK, MASK, MASK]), torch.tensor([9, MASK, MASK, MASK])]
    expected = [by_hand(drafter, model, text, block) for text, block in zip(texts, blocks, strict=True)]

    tap = FeatureTap(model.model, drafter.shape.layer_ids)
    runner = Runner(drafter, attention)  # type: ignore[arg-type]
    runner.reserve(2, 32)
    for slot, text in enumerate(texts):
        model(text.view(1, -1))
        for part in (torch.arange(0, 6), torch.arange(6, len(text))):
            runner.cache.write_to(slot * runner.cache.capacity + part)
            drafter.absorb(tap.features()[part], part.view(1, -1), runner.cache)
        runner.cache.lengths[slot] = len(text)
    layout = Layout(np.arange(2), np.array([BLOCK, BLOCK]))
    positions = torch.cat([len(text) + torch.arange(BLOCK) for text in texts])
    everybody = torch.ones(2, BLOCK, BLOCK, dtype=torch.bool)
    request = Pass(layout, torch.cat(blocks), positions, everybody, torch.arange(2 * BLOCK), np.zeros(2, dtype=int))
    torch.testing.assert_close(runner.forward(request), torch.cat(expected), rtol=0, atol=1e-9)
    assert runner.cache.lengths.tolist() == [20, 11], "a block is never kept"


def test_features_are_the_hidden_states_of_transformers() -> None:
    model, text = target(), torch.arange(9).view(1, -1)
    tap = FeatureTap(model.model, (0, 2, 4))
    states = model(text, output_hidden_states=True).hidden_states
    kept = torch.tensor([1, 4, 8])
    expected = torch.cat([states[index + 1][0, kept] for index in (0, 2, 4)], -1)
    assert torch.equal(tap.features()[kept], expected)


def test_layers_that_the_configuration_does_not_name() -> None:
    assert default_layer_ids(5, 36) == [1, 9, 17, 25, 33]
    assert default_layer_ids(1, 36) == [18]
    shape = drafter_shape(published(dflash_config={"mask_token_id": MASK}), "here")
    assert shape.layer_ids == (1, 2)
    assert (
        drafter_shape(published(block_size=None, dflash_config={"mask_token_id": 1, "block_size": 8}), "").block_length
        == 8
    )


OWN = {"mask_token_id": 1, "target_layer_ids": [1]}
REFUSED = [
    ({"dflash_config": {**OWN, "conv_kernel_size": 2}}, "must name conv_kernel_size and conv_group_size"),
    ({"dflash_config": {**OWN, "conv_kernel_size": 2, "conv_group_size": 5}}, "does not divide hidden_size"),
    ({"dflash_config": {**OWN, "selector_top_k": 16}}, "must name selector_rank and selector_top_k"),
    ({"dflash_config": {**OWN, "projector_type": "domino", "emb_dim": 4}}, "must name emb_dim and gru_hidden_dim"),
    ({"dflash_config": {**OWN, "pure_draft_prefix_len": 1}}, "no Domino head"),
    (
        {"dflash_config": {**OWN, "selector_rank": 4, "selector_top_k": 16}, "markov_rank": 4},
        r"several heads \(vanilla and selector\)",
    ),
    ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [1], "attention_sink_bias": True}}, "attention sinks"),
    ({"dflash_config": {**OWN, "projector_type": "causal_v5"}}, "projector 'causal_v5'"),
    ({"markov_rank": 4, "markov_head_type": "fir"}, "Markov head of the kind 'fir'"),
    ({"markov_rank": -1}, "markov_rank=-1"),
    ({"dflash_config": {"target_layer_ids": [1]}}, "not a DFlash drafter"),
    ({"dflash_config": {"mask_token_id": 1}, "num_target_layers": None}, "not a DFlash drafter"),
    ({"layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
    ({"hidden_size": 64}, "hidden states of size 64, and the target's are 32"),
    ({"num_target_layers": 36}, "made for 36 layers, and the target has 5"),
    ({"num_target_layers": None, "dflash_config": {"mask_token_id": 1, "target_layer_ids": [1, 5]}}, "reads layer 5"),
    ({"vocab_size": 41}, "vocabulary has 41 tokens, and the target's 40"),
    ({"dflash_config": {"mask_token_id": 40, "target_layer_ids": [1, 3]}}, "mask token id 40"),
    ({"block_size": 1}, "drafts nothing"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_unfit_drafters_are_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    config = {name: value for name, value in published(**changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said) as caught:
        load_drafter(folder, target())
    assert "\n" not in str(caught.value)


def test_weights_must_be_those_of_a_drafter(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")

    def refused(changed: dict[str, torch.Tensor], said: str) -> None:
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=said):
            load_drafter(folder, target())

    refused({name: value for name, value in weights.items() if name != "fc.weight"}, "fc.weight has no such weight")
    refused({**weights, "mask_embedding": torch.ones(32)}, "mask_embedding has")
    refused({**weights, "norm.weight": torch.ones(31)}, r"norm.weight has \[31\], needs \[32\]")
    refused({**weights, "layers.0.attention_conv.base_kernel": torch.ones(3)}, "attention_conv.base_kernel has")


def test_load_with_a_drafter(folder: Path, tmp_path: Path) -> None:
    model = target()
    model.requires_grad_(False)
    engine = s2d2_lmeval.load(model, draft=folder)
    assert engine.facts.family == "qwen3"
    assert engine.facts.drafter is not None
    assert engine.facts.drafter.block_length == BLOCK
    assert engine.facts.decoders == ("ddtree", "dflash", "ar", "sliding")
    ids = engine.generate([[1, 2, 3]], max_new_tokens=8)[0].token_ids
    expected = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert ids == expected[0, 3:].tolist()
    assert engine.score([([1, 2], [3])])[0][0] == pytest.approx(
        float(model(torch.tensor([[1, 2]])).logits.log_softmax(-1)[0, -1, 3])
    )


def test_a_cache_that_was_begun_from_another_slot() -> None:
    cache = SlotCache(2, 8)
    cache.write_to(torch.arange(4))
    cache.update(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), 0)
    cache.begin(1, 0, 3)
    assert cache.lengths[1] == 3
    assert cache._layers[0][0][1, :3].eq(1).all()


def test_loading_leaves_the_global_generator_alone() -> None:
    """A published function that is given a drafter's folder loads it between the user's seed and the first draw."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    s2d2_lmeval.load("toy", draft="toy")
    assert torch.equal(torch.get_rng_state(), before)
