"""Heads that know the token before: their formula, how drafts follow them, and that no answer changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.families import adopt
from s2d2_lmeval.runtime.drafting.dflash import DFlash, DraftingRunner
from s2d2_lmeval.runtime.drafting.heads import MarkovHead
from s2d2_lmeval.runtime.drafting.loading import drafter_shape, load_drafter

from .drafting_tiny import drafter_for, with_drafter
from .tiny import tiny_model

PROMPTS = [[(5 * i + 3 * j) % 22 for j in range(1 + (7 * i) % 11)] for i in range(6)]
OPTIONS = {"stop_token_ids": (), "max_new_tokens": 20}


def head_of(kind: str, vocabulary: int = 23, hidden: int = 8) -> MarkovHead:
    head = MarkovHead(vocabulary, 4, hidden, kind)
    generator = torch.Generator().manual_seed(0)
    for weight in head.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    return head.requires_grad_(False)


@pytest.mark.parametrize("kind", ["vanilla", "gated"])
def test_the_published_formula(kind: str) -> None:
    head, hidden = head_of(kind), torch.randn(2, 3, 8)
    above, token = torch.randint(23, (2, 3, 5)), torch.randint(23, (2, 3, 6))
    found = head(above, token, hidden)
    for r, s, a, b in torch.cartesian_prod(*map(torch.arange, (2, 3, 5, 6))).tolist():
        latent = head.markov_w1.weight[above[r, s, a]]
        if kind == "gated":
            gate = head.gate_proj.weight @ torch.cat([hidden[r, s], latent]) + head.gate_proj.bias
            latent = torch.sigmoid(gate) * latent
        assert found[r, s, a, b].item() == pytest.approx((head.markov_w2.weight[token[r, s, b]] @ latent).item(), 1e-4)


def test_a_chain_takes_the_best_token_after_the_one_it_took() -> None:
    generator = torch.Generator().manual_seed(1)
    log_p = torch.randn(4, 5, 6, generator=generator).log_softmax(2).sort(dim=2, descending=True).values
    token = torch.rand(4, 5, 30, generator=generator).argsort(2)[:, :, :6]
    given = torch.randn(4, 5, 6, 6, generator=generator).log_softmax(3)
    given[:, 0] = given[:, 0, :1]
    found = trees.chain(log_p, token, trees.Branches(*given.sort(dim=3, descending=True)))
    for row in range(4):
        own, value = 0, 0.0
        for depth in range(5):
            worth = given[row, depth, own]
            own = int(worth.argmax())
            value += worth[own].item()
            assert found.token[row, depth] == token[row, depth, own]
            assert found.value[row, depth].log().item() == pytest.approx(value, abs=1e-5)
    plain = trees.chain(log_p, token)
    assert torch.equal(plain.token, token[:, :, 0])


SHAPES: dict[str, dict[str, Any]] = {
    "vanilla": {"markov": (4, "vanilla")},
    "gated": {"markov": (4, "gated")},
    "DSpark": {"markov": (4, "gated"), "shifted": True},
    "shifted": {"shifted": True},
}


@pytest.mark.parametrize("shifted_target", [True, False], ids=["autoregressive", "block"])
@pytest.mark.parametrize("name", SHAPES)
def test_answers_are_those_of_ar(name: str, shifted_target: bool) -> None:
    plain = tiny_model()
    names = {"family": "qwen3"} if shifted_target else {"mask_token_id": plain.config.vocab_size - 1, "block_length": 4}
    native, facts = adopt(plain, **names)
    model = with_drafter(native, facts, drafter_for(native, **SHAPES[name]))
    runner, seen = model._runner, []
    assert isinstance(runner, DraftingRunner)
    assert (runner.after_token is None) == (name == "shifted")
    if runner.after_token is not None:
        inner = runner.after_token

        def spied(above: torch.Tensor, token: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
            seen.append(read.shape[1])
            logits = native.get_output_embeddings()(runner._drafted[read])
            assert torch.equal(logits.gather(2, token).argsort(2, descending=True)[:, :, 0], 0 * read)
            return inner(above, token, read)

        runner.after_token = spied
    expected = [one.token_ids for one in model.generate(PROMPTS, {"decoder": "ar", **OPTIONS})]
    for decoder in ({"decoder": "dflash"}, {"decoder": "ddtree", "tree_budget": 12, "pairs": 0, "lookup": False}):
        found = model.generate(PROMPTS, {**decoder, **OPTIONS})
        assert [one.token_ids for one in found] == expected
    depths = 6 if SHAPES[name].get("shifted") else 5
    assert set(seen) == ({depths} if runner.after_token is not None else set())


def test_a_dspark_checkpoint(tmp_path: Path) -> None:
    """As it is published: labels shifted, with weights that drafting does not read."""
    native = tiny_model()
    config = {**native.config.to_dict(), "architectures": ["Qwen3DSparkModel"], "num_hidden_layers": 1, "block_size": 7}
    config |= {"mask_token_id": 3, "target_layer_ids": [0, 1], "markov_rank": 4, "markov_head_type": "gated"}
    config |= {"enable_confidence_head": True, "num_target_layers": native.config.num_hidden_layers}
    config = {name: value for name, value in config.items() if name not in ("layer_types", "dtype")}
    shape = drafter_shape(config, "here")
    assert shape.facts.block_length == 8
    assert shape.facts.shifted
    assert not replace(shape, shifted=False).facts.shifted
    weights = {name: torch.randn(weight.shape) for name, weight in DFlash(shape).state_dict().items()}
    unread = {"confidence_head.proj.weight": torch.ones(1, 4), "lm_head.weight": torch.ones(2, 2)}
    save_file({**weights, **unread}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    drafter = load_drafter(tmp_path, native)
    assert drafter.markov_head is not None
    assert torch.equal(drafter.markov_head.gate_proj.bias.float(), weights["markov_head.gate_proj.bias"])
