"""Heads that know the tokens before: their formulas, how drafts follow them, and that no answer changes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.hints import Hints
from s2d2_lmeval.families import adopt
from s2d2_lmeval.runtime.drafting.dflash import DFlash, DraftingRunner
from s2d2_lmeval.runtime.drafting.heads import AfterToken, Head, HeadShape
from s2d2_lmeval.runtime.drafting.loading import drafter_shape, load_drafter

from .drafting_tiny import drafter_for, with_drafter
from .test_pairs import setup_of
from .test_trees import marginals, paths_of
from .tiny import tiny_model

PROMPTS = [[(5 * i + 3 * j) % 22 for j in range(1 + (7 * i) % 11)] for i in range(6)]
OPTIONS = {"stop_token_ids": (), "max_new_tokens": 14}


VOCABULARY, HIDDEN = 50, 8

HEADS: dict[str, HeadShape] = {
    "vanilla": HeadShape("vanilla", 4),
    "gated": HeadShape("gated", 4),
    "rnn": HeadShape("rnn", 4),
    "selector": HeadShape("selector", 4),
    "domino": HeadShape("domino", 4, state=5, uncorrected=1),
}


def head_of(kind: str) -> Head:
    generator = torch.Generator().manual_seed(0)
    target = SimpleNamespace(weight=torch.randn(VOCABULARY, HIDDEN, generator=generator))
    head = HEADS[kind].build(VOCABULARY, HIDDEN, [target])
    for weight in head.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    return head.requires_grad_(False)


def biases(head: Any, path: list[int], hidden: torch.Tensor) -> torch.Tensor:
    """What the published formula of ``head`` adds to the logits of the place after the tokens ``path``, the text's last
    one first; ``hidden`` (S, H) are the states of all places.
    """
    kind, place = head.shape.kind, len(path) - 1
    if kind == "domino":
        if place < head.shape.uncorrected:
            return torch.zeros(VOCABULARY)
        states, _ = head.prefix_gru(head._shared[0].weight[path].unsqueeze(0))
        first, _, second = head.embed_proj
        return second.weight @ torch.nn.functional.silu(first.weight @ torch.cat([hidden[place], states[0, -1]]))
    if kind == "selector":
        known = head.predecessor_codebook[path[-1]] * (head.hidden_projection.weight @ hidden[place])
        return head.successor_codebook @ known
    known = head.markov_w1.weight[path[-1]]
    if kind == "gated":
        known = torch.sigmoid(head.gate_proj(torch.cat([hidden[place], known]))) * known
    if kind == "rnn":
        state = torch.zeros(4)
        for one, at in zip(path, hidden, strict=False):
            joint = head.joint_proj.weight @ torch.cat([state, head.markov_w1.weight[one], at]) + head.joint_proj.bias
            gate, known = torch.sigmoid(joint[:4]), torch.tanh(joint[8:])
            state = gate * state + (1 - gate) * torch.tanh(joint[4:8])
    return head.markov_w2.weight @ known


@pytest.mark.parametrize("kind", HEADS)
def test_the_published_formula_along_paths(kind: str) -> None:
    """Two rows with two paths each, place by place from the states before."""
    head, hidden = head_of(kind), torch.randn(2, 4, HIDDEN)
    paths, every, state = torch.randint(VOCABULARY, (2, 2, 4)), torch.arange(VOCABULARY).expand(2, 1, -1), None
    for place in range(4):
        found, state = head(paths[:, :, place].unsqueeze(1), every, hidden[:, place : place + 1], state, place)
        for row, one in itertools.product(range(2), range(2)):
            wanted = biases(head, paths[row, one, : place + 1].tolist(), hidden[row])
            torch.testing.assert_close(found[row, 0, one], wanted, rtol=1e-4, atol=1e-4)
    assert (state is not None) == head.carries


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", HEADS)
def test_the_tree_is_the_best_of_all_paths(kind: str, seed: int) -> None:
    """Grown depth by depth, against every path's value by the formula: two rows, 3 places of 4 choices."""
    head, (log_p, token) = head_of(kind), marginals(seed, 2, 3, 4)
    log_p = log_p.double()
    after, hidden = AfterToken(head), torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(seed))
    after.drafted, read, root = hidden, torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[7], [11]])
    room, slots = torch.ones(2, 3, dtype=torch.bool), torch.arange(2)
    hints = Hints(setup_of(2), 3, of_text=False, after_token=after)
    choices, branches = hints.branches(log_p, token, root, room, slots, read)
    tree, chain = trees.grow(log_p, choices, 15, branches=branches), None
    _, again = hints.branches(log_p, token, root, room, slots, read)
    chain = trees.chain(log_p, choices, again)
    for row in range(2):
        values: dict[tuple[int, ...], float] = {(): 1.0}
        for path in itertools.chain(*(itertools.product(range(4), repeat=depth) for depth in (1, 2, 3))):
            place, said = len(path) - 1, [int(token[row, depth, own]) for depth, own in enumerate(path)]
            bias = biases(head, [int(root[row]), *said[:-1]], hidden[read[row]])[token[row, place]]
            given = log_p[row, place] + bias
            given += log_p[row, place].logsumexp(0) - given.logsumexp(0)
            values[tuple(said)] = values[tuple(said[:-1])] * given.exp()[path[-1]].item()
        del values[()]
        best = sorted(values.values(), reverse=True)[:15]
        assert tree.value[row].tolist() == pytest.approx(best, rel=1e-4)
        assert tree.value[row].tolist() == pytest.approx([values[path] for path in paths_of(tree, row)], rel=1e-4)
        walked: tuple[int, ...] = ()
        for one in chain.token[row].tolist():
            rivals = {path: value for path, value in values.items() if path[:-1] == walked}
            walked = (*walked, one)
            assert rivals[walked] == pytest.approx(max(rivals.values()), rel=1e-4)


def test_a_chain_takes_the_best_token_after_the_one_it_took() -> None:
    generator = torch.Generator().manual_seed(1)
    log_p = torch.randn(4, 5, 6, generator=generator).log_softmax(2).sort(dim=2, descending=True).values
    token = torch.rand(4, 5, 30, generator=generator).argsort(2)[:, :, :6]
    given = torch.randn(4, 5, 6, 6, generator=generator).log_softmax(3)
    given[:, 0] = given[:, 0, :1]
    found = trees.chain(log_p, token, trees.PairBranches(given))
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
    **{kind: {"head": head} for kind, head in HEADS.items()},
    "DSpark": {"head": HEADS["gated"], "shifted": True},
    "Domino": {"head": HEADS["domino"], "shifted": True},
    "DFlash 2": {"head": HEADS["selector"], "convolution": (2, 4)},
    "shifted": {"shifted": True},
}


def drafted(name: str, shifted_target: bool = True, max_batch: int = 4, **model: Any) -> Any:
    """A random target and a random drafter of the kind ``name``."""
    plain = tiny_model(**model)
    names = {"family": "qwen3"} if shifted_target else {"mask_token_id": plain.config.vocab_size - 1, "block_length": 4}
    native, facts = adopt(plain, **names)
    return with_drafter(native, facts, drafter_for(native, **SHAPES[name]), max_batch)


@pytest.mark.parametrize("shifted_target", [True, False], ids=["autoregressive", "block"])
@pytest.mark.parametrize("name", SHAPES)
def test_answers_are_those_of_ar(name: str, shifted_target: bool) -> None:
    model = drafted(name, shifted_target)
    runner, seen = model._runner, set()
    assert isinstance(runner, DraftingRunner)
    assert (runner.after_token is None) == (name == "shifted")
    if runner.after_token is not None:
        inner = runner.after_token.head.forward

        def spied(above: torch.Tensor, token: torch.Tensor, hidden: torch.Tensor, *state: Any) -> Any:
            seen.add(state[1])
            logits = runner.model.get_output_embeddings()(hidden)
            assert (logits.gather(2, token).argmax(2) == 0).all(), "these are the states that the choices come from"
            return inner(above, token, hidden, *state)

        runner.after_token.head.forward = spied  # type: ignore[method-assign]
    expected = [one.token_ids for one in model.generate(PROMPTS, {"decoder": "ar", **OPTIONS})]
    for decoder in ({"decoder": "dflash"}, {"decoder": "ddtree", "tree_budget": 12, "pairs": 0, "lookup": False}):
        found = model.generate(PROMPTS, {**decoder, **OPTIONS})
        assert [one.token_ids for one in found] == expected
    if runner.after_token is not None:
        depths = 6 if SHAPES[name].get("shifted") else 5
        assert seen == (set(range(depths)) if runner.after_token.carries else {0})


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["vanilla", "rnn", "DSpark", "Domino", "DFlash 2"])
def test_answers_with_all_hints(name: str, sampling: dict[str, Any], batch: int) -> None:
    """As the options are by default, and where drafts have the target's noise."""
    model = drafted(name, max_batch=batch)
    prompts, options = PROMPTS[:5], {**OPTIONS, **sampling, "max_new_tokens": 10}
    expected = [one.token_ids for one in model.generate(prompts, {"decoder": "ar", **options})]
    coupled = {"couple_drafts": bool(sampling)}
    for decoder in ({"decoder": "dflash", **coupled}, {"decoder": "ddtree", "tree_budget": 12, **coupled}):
        found = model.generate(prompts, {**decoder, **options})
        assert [one.token_ids for one in found] == expected


W1_W2 = {"markov_head.markov_w1.weight": (23, 4), "markov_head.markov_w2.weight": (23, 4)}
CONVOLUTION = {"base_kernel": (2, 2, 32), "kernel_projection.weight": (16, 32)}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "DSpark": (
        {"architectures": ["Qwen3DSparkModel"], "markov_rank": 4, "markov_head_type": "gated"},
        {**W1_W2, "markov_head.gate_proj.weight": (4, 36), "markov_head.gate_proj.bias": (4,)},
    ),
    "DSpark rnn": (
        {"architectures": ["Qwen3DSparkModel"], "markov_rank": 4, "markov_head_type": "rnn"},
        {**W1_W2, "markov_head.joint_proj.weight": (12, 40), "markov_head.joint_proj.bias": (12,)},
    ),
    "Domino": (
        {"dflash_config": {"projector_type": "domino", "emb_dim": 4, "gru_hidden_dim": 6, "shift_label": True}},
        {
            "prefix_gru.weight_ih_l0": (18, 32),
            "prefix_gru.weight_hh_l0": (18, 6),
            "embed_proj.0.weight": (4, 38),
            "embed_proj.2.weight": (23, 4),
        },
    ),
    "DFlash 2": (
        {"dflash_config": {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 8}},
        {
            **{
                f"layers.0.{part}_conv.{name}": size
                for part in ("attention", "mlp")
                for name, size in CONVOLUTION.items()
            },
            **{f"candidate_selector.{side}_codebook": (23, 4) for side in ("predecessor", "successor")},
            "candidate_selector.hidden_projection.weight": (4, 32),
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint(name: str, tmp_path: Path) -> None:
    """Its names and shapes, with weights that drafting does not read."""
    native, facts = adopt(tiny_model(), family="qwen3")
    own, parts = PUBLISHED[name]
    config = {**native.config.to_dict(), "num_hidden_layers": 1, "block_size": 7, "target_layer_ids": [0, 1], **own}
    config |= {"mask_token_id": 3, "num_target_layers": native.config.num_hidden_layers}
    config = {key: value for key, value in config.items() if key not in ("layer_types", "dtype")}
    shape = drafter_shape(config, "here")
    shifted = name != "DFlash 2"
    assert (shape.facts.block_length, shape.facts.shifted) == (7 + shifted, shifted)
    plain = DFlash(replace(shape, head=None, convolution=None)).state_dict()
    sizes = {**{key: weight.shape for key, weight in plain.items()}, **parts}
    weights = {key: torch.randn(size, dtype=torch.float64) for key, size in sizes.items()}
    unread = {"confidence_head.proj.weight": torch.ones(1, 4), "lm_head.weight": torch.ones(2, 2)}
    save_file({**weights, **unread}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    drafter = load_drafter(tmp_path, native)
    assert drafter.head is not None
    assert drafter.head.shape.choices == (8 if name == "DFlash 2" else 16)
    assert all(torch.equal(drafter.state_dict()[key], weight) for key, weight in weights.items())
    model = with_drafter(native, facts, drafter)
    expected = model.generate(PROMPTS[:2], {"decoder": "ar", **OPTIONS})
    for decoder in ("dflash", "ddtree"):
        answers = model.generate(PROMPTS[:2], {"decoder": decoder, **OPTIONS})
        assert [one.token_ids for one in answers] == [one.token_ids for one in expected]
