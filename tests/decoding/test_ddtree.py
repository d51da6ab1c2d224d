"""Chains and trees from a drafter: the target's own output, whatever was drafted, in fewer of its forwards."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from s2d2_lmeval import BlockDiffusionModel, load
from s2d2_lmeval.decoding.generation import ACCEPTED
from s2d2_lmeval.decoding.passes import Sent
from s2d2_lmeval.decoding.rounds import target as rounds
from s2d2_lmeval.decoding.rounds.acceptance import Keyed
from s2d2_lmeval.decoding.rounds.rows import RoundRows
from s2d2_lmeval.errors import ConfigError, NumericalError
from s2d2_lmeval.families import adopt
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.passes import TARGET, Layout, Pass
from s2d2_lmeval.runtime.runner import Runner

from .ddtree_recorded import DATA
from .drafting_tiny import BLOCK, drafter_for, pair, with_drafter
from .test_device_reads import counted
from .tiny import VOCABULARY, tiny_model

MASK = VOCABULARY - 1
SAMPLING = (
    {},
    {"do_sample": True, "temperature": 0.6},
    {"do_sample": True, "temperature": 1.0, "top_k": 8, "top_p": 0.9},
    {
        "do_sample": True,
        "temperature": 0.8,
        "min_p": 0.05,
        "typical_p": 0.9,
        "logit_bias": {3: 2.0, 5: -1.5},
        "suppress_tokens": (1, 7),
    },
    {"logit_bias": {3: 2.0, 5: -1.5}, "suppress_tokens": (1, 7)},
)
DRAFTS = (
    {"decoder": "dflash"},
    {"decoder": "dflash", "couple_drafts": True},
    {"decoder": "dflash", "draft_block_size": 3},
    {"decoder": "ddtree", "tree_budget": 1},
    {"decoder": "ddtree", "tree_budget": 12},
    {"decoder": "ddtree", "tree_budget": 12, "tree_seed_chain": True, "couple_drafts": True},
    {"decoder": "ddtree", "tree_budget": 90, "tree_sharpen": 2.0},
    {"decoder": "ddtree", "tree_budget": "auto"},
    {"decoder": "ddtree", "tree_budget": 12, "schedule": "reference"},
)
SHIFTS = pytest.mark.parametrize("shifted", [True, False], ids=["autoregressive", "sdar"])


def drawn_case(rng: random.Random) -> tuple[list[list[int]], list[int], dict[str, Any]]:
    prompts = [[rng.randrange(MASK) for _ in range(rng.randrange(1, 30))] for _ in range(rng.randrange(1, 5))]
    shared = {
        **rng.choice(SAMPLING),
        "seed": rng.randrange(1000),
        "stop_token_ids": tuple(rng.sample(range(MASK), rng.randrange(3))),
        "trim_stop_tokens": rng.random() < 0.5,
    }
    return prompts, [rng.randrange(1, 24) for _ in prompts], shared


@SHIFTS
@pytest.mark.parametrize("number", range(len(DRAFTS)))
def test_equals_ar(shifted: bool, number: int) -> None:
    model, rng = pair(shifted), random.Random(number)
    for _ in range(2):
        prompts, budgets, shared = drawn_case(rng)
        model.max_batch = rng.choice([1, 2, 8])
        expected = model.generate(prompts, {"decoder": "ar", **shared}, max_new_tokens=budgets)
        model.max_batch = rng.choice([1, 2, 8])
        answers = model.generate(prompts, {**DRAFTS[number], **shared}, max_new_tokens=budgets)
        for one, other in zip(expected, answers, strict=True):
            assert one.token_ids == other.token_ids
            assert one.finish_reason == other.finish_reason
            assert other.stats["new_tokens"] == one.stats["new_tokens"]
            assert other.stats["verify_forwards"] + other.stats["draft_forwards"] <= one.stats["nfe"]


def test_long_prompts_come_in_chunks_and_like_prompts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2d2_lmeval.decoding.engine.PREFILL_CHUNK", 16)
    model = pair()
    model.max_batch = 2
    shared = [(7 * i) % MASK for i in range(70)]
    prompts = [[*shared, 1], [*shared, 2, 3], [5] * 40, [*shared, 4]]
    expected = model.generate(prompts, {"decoder": "ar"}, max_new_tokens=10)
    model.trace.reset()
    with checked_caches(model):
        answers = model.generate(prompts, {"decoder": "ddtree", "tree_budget": 12}, max_new_tokens=10)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert model.trace.reused_tokens >= 70, "what prompts share is run once, for the drafter too"


@SHIFTS
@pytest.mark.parametrize("budget", [5, 40])
def test_every_node_says_what_a_plain_forward_of_its_path_says(shifted: bool, budget: int) -> None:
    model, plain, checked = pair(shifted), tiny_model(), 0

    def check(tree: Sent, logits: torch.Tensor, rows: RoundRows) -> int:
        for row, node, said in zip(*tree.at("verify"), logits, strict=True):
            if tree["depth"][row, node] < 0:
                continue  # a place without a node
            path, place = [], int(node)
            while place:
                path.append(int(tree["token"][row, place]))
                place = int(tree["parent"][row, place])
            text = [*rows.tokens[int(row)], *reversed(path), *([] if shifted else [MASK])]
            with torch.no_grad():
                expected = plain(torch.tensor([text])).logits[0, -1]
            expected[MASK] = said[MASK]
            torch.testing.assert_close(said, expected, rtol=0, atol=1e-9)
        return len(logits)

    judge, admitted, holder = Keyed.judge, rounds.Target.admitted, {}

    def judging(self: Keyed, logits: torch.Tensor, sent: Sent) -> Any:
        nonlocal checked
        checked += check(sent, logits, holder["rows"])
        return judge(self, logits, sent)

    def admitting(self: rounds.Target, slot: int) -> None:
        holder["rows"] = self.rows
        admitted(self, slot)

    with patch.object(Keyed, "judge", judging), patch.object(rounds.Target, "admitted", admitting):
        prompts = [[3, 1, 4, 1, 5], [2, 7]]
        model.generate(prompts, {"decoder": "ddtree", "tree_budget": budget, "lookup": False}, max_new_tokens=5)
    assert checked > 4 * budget


def compare(cache: SlotCache, slot: int, fresh: SlotCache, length: int) -> None:
    for layer, storages in fresh._layers.items():
        for mine, expected in zip(cache._layers[layer], storages, strict=True):
            torch.testing.assert_close(mine[slot, :length], expected[0, :length])


@contextmanager
def checked_caches(model: BlockDiffusionModel) -> Iterator[None]:
    """After every round both caches hold what a fresh prefill of the same tokens does."""
    runner = model._runner
    fresh = Runner(tiny_model_copy(model), "sdpa")
    drafter = runner.drafter.model  # type: ignore[attr-defined]
    commit = runner.commit

    def committing(slots: np.ndarray, keep: np.ndarray, model: str) -> None:
        commit(slots, keep, model)
        if model != TARGET:
            return
        for slot in slots.tolist() if committed else []:
            length = int(runner.cache.lengths[slot])
            assert runner.drafter.cache.lengths[slot] == length  # type: ignore[attr-defined]
            text = torch.tensor(committed[slot](length))
            fresh.reserve(1, length)
            fresh.forward(prefill(text))
            compare(runner.cache, slot, fresh.cache, length)
            with torch.no_grad():
                states = plain(text.view(1, -1), output_hidden_states=True).hidden_states
            features = torch.cat([states[index + 1][0] for index in drafter.shape.layer_ids], -1)
            scratch = type(runner.cache)(1, length)
            scratch.write_to(torch.arange(length))
            drafter.absorb(features, torch.arange(length).view(1, -1), scratch)
            compare(runner.drafter.cache, slot, scratch, length)  # type: ignore[attr-defined]

    committed: dict[int, Any] = {}
    plain = tiny_model(layers=model.hf_model.config.num_hidden_layers)
    settle = rounds.Target.settle

    def settling(self: rounds.Target, table: Any) -> Any:
        kept = settle(self, table)
        for slot in range(self.rows.count):
            committed[slot] = lambda length, slot=slot: self.rows.tokens[slot][:length]
        return kept

    with patch.object(runner, "commit", committing), patch.object(rounds.Target, "settle", settling):
        yield


def tiny_model_copy(model: BlockDiffusionModel) -> Any:
    return adopt(tiny_model(layers=model.hf_model.config.num_hidden_layers), family="qwen3")[0]


def prefill(text: torch.Tensor) -> Pass:
    width = len(text)
    layout = Layout(np.zeros(1, dtype=np.int64), np.array([width]))
    causal = torch.ones(1, width, width, dtype=torch.bool).tril()
    return Pass(layout, text, torch.arange(width), causal, torch.tensor([width - 1]), keep=np.array([width]))


@pytest.mark.parametrize("options", [{"decoder": "dflash"}, {"decoder": "ddtree", "tree_budget": 40}])
def test_caches_after_every_round_are_those_of_a_fresh_prefill(options: dict[str, Any]) -> None:
    model = pair()
    with checked_caches(model):
        answers = model.generate([[3, 1, 4, 1, 5], [2, 7], [9] * 20], options, max_new_tokens=12)
    if options["decoder"] == "ddtree":
        assert sum(a.stats["accepted"] for a in answers) > 0, "nothing accepted, nothing compacted"


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("options", [{"decoder": "dflash"}, {"decoder": "ddtree", "tree_budget": 9}])
def test_the_law_is_the_targets(options: dict[str, Any], coupled: bool) -> None:
    """Chi-square of three-token answers against their exact probabilities, 4 tokens and a mask."""
    model = pair(vocabulary=5, max_batch=64)
    options = {**options, "couple_drafts": coupled, "do_sample": True, "temperature": 0.9}
    prompt, samples = [1, 2, 0], 1024
    answers = model.generate([prompt] * samples, options, max_new_tokens=3)
    seen: dict[tuple[int, ...], int] = {}
    for answer in answers:
        seen[tuple(answer.token_ids)] = seen.get(tuple(answer.token_ids), 0) + 1
    plain, statistic, cells, rest, rare = tiny_model(vocabulary=5), 0.0, 0, 0.0, 0
    for continuation in itertools.product(range(5), repeat=3):
        probability, text = 1.0, list(prompt)
        for token in continuation:
            with torch.no_grad():
                logits = plain(torch.tensor([text])).logits[0, -1] / 0.9
            probability *= float(logits.softmax(-1)[token])
            text.append(token)
        expected, count = samples * probability, seen.get(continuation, 0)
        if expected < 5:
            rest, rare = rest + expected, rare + count
        else:
            statistic, cells = statistic + (count - expected) ** 2 / expected, cells + 1
    if rest >= 5:
        statistic, cells = statistic + (rare - rest) ** 2 / rest, cells + 1
    degrees = cells - 1
    # Wilson and Hilferty: the cube root of chi-square per degree is nearly normal; 3.3 deviations are p = 0.0005.
    deviations = ((statistic / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / (2 / (9 * degrees)) ** 0.5
    assert cells > 8
    assert deviations < 3.3
    assert sum(step.marks.count(ACCEPTED) for answer in answers for step in answer.steps) > samples / 40


def test_noise_that_is_known_makes_better_drafts() -> None:
    native, facts = adopt(tiny_model(), family="qwen3")
    model = with_drafter(native, facts, drafter_for(native))
    options = {"decoder": "ddtree", "tree_budget": 24, "do_sample": True, "temperature": 1.0}
    options |= {"pairs": 0, "lookup": False}

    def accepted(coupled: bool) -> float:
        answers = model.generate([[1, 2, 3]] * 24, {**options, "couple_drafts": coupled}, max_new_tokens=12)
        return sum(answer.stats["accepted"] for answer in answers)

    assert accepted(True) > 1.1 * accepted(False)


class Oracle:
    """A drafter's runner that knows what the target will say."""

    def __init__(self, runner: Runner, answers: dict[tuple[int, ...], list[int]], tokens: Any) -> None:
        self.runner, self.answers, self.tokens = runner, answers, tokens

    def answer(self, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        logits = Runner._answer(self.runner, tokens, *others)
        known = torch.zeros_like(logits)
        at, context = 0, others[-1]
        slots = range(context.rows) if context.slots is None else context.slots.tolist()
        for slot in slots:
            done = self.tokens(slot)
            ahead = self.answers[tuple(done[:3])][len(done) - 3 :]
            for token in [*ahead, *[0] * BLOCK][: BLOCK - 1]:
                known[at, token] = 9.0
                at += 1
        return known


@pytest.mark.parametrize("options", [{"decoder": "dflash"}, {"decoder": "ddtree", "tree_budget": 12}])
def test_a_drafter_that_knows_is_accepted_whole(options: dict[str, Any]) -> None:
    native, facts = adopt(tiny_model(), family="qwen3")
    model = with_drafter(native, facts, drafter_for(native))
    prompts = [[1, 2, 3], [4, 5, 6]]
    truth = model.generate(prompts, {"decoder": "ar"}, max_new_tokens=40)
    answers = {tuple(prompt): one.token_ids for prompt, one in zip(prompts, truth, strict=True)}
    holder: dict[str, Any] = {}
    admitted = rounds.Target.admitted

    def admitting(self: rounds.Target, slot: int) -> None:
        holder["rows"] = self.rows
        admitted(self, slot)

    runner = model._runner.drafter  # type: ignore[attr-defined]
    oracle = Oracle(runner, answers, lambda slot: holder["rows"].tokens[slot])
    with patch.object(runner, "_answer", oracle.answer), patch.object(rounds.Target, "admitted", admitting):
        drafted = model.generate(prompts, options, max_new_tokens=1 + 3 * BLOCK)
    for one, other in zip(drafted, truth, strict=True):
        assert one.token_ids == other.token_ids[: 1 + 3 * BLOCK]
        assert [len(step.tokens) for step in one.steps] == [1, BLOCK, BLOCK, BLOCK]
        assert one.stats["verify_forwards"] == one.stats["drafter_forwards"] == one.stats["rounds"] == 3
        assert one.stats["round_tokens"] == 3 * BLOCK
        assert one.stats["round_accepted"] == 3 * (BLOCK - 1)


def test_acceptance_is_counted_up_to_the_stop() -> None:
    model = load(DATA / "target", draft=DATA / "draft")
    options, prompt = {"decoder": "ddtree", "tree_budget": 32, "stop_token_ids": ()}, [3, 1, 4, 1, 5, 9, 2, 6]
    whole = model.generate([prompt], options, max_new_tokens=40)[0]
    new = whole.token_ids
    first = next(
        step.start - len(prompt)
        for step in whole.steps[1:]
        if len(step.tokens) > 2 and step.tokens[0] not in new[: step.start - len(prompt)]
    )
    model.trace.reset()
    cut = model.generate([prompt], {**options, "stop_token_ids": (new[first],)}, max_new_tokens=40)[0]
    assert cut.token_ids == new[:first]
    assert cut.stats["round_tokens"] == first, "up to the stop and with it, without the token that the prefill gave"
    marked = sum(step.marks.count(ACCEPTED) for step in cut.steps)
    assert cut.stats["accepted"] == cut.stats["round_accepted"] < marked, "more was accepted after the stop"
    assert len(cut.steps) - 1 == cut.stats["rounds"]
    totals = model.trace.totals()
    assert totals["target_forwards"] == totals["nfe"] - totals["drafter_forwards"]
    assert totals["tokens_per_target_forward"] == (first + 1) / totals["target_forwards"]
    assert totals["drafter_seconds"] > 0
    assert totals["target_seconds"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoder": "ddtree", "tree_budget": -1}, "tree_budget=-1 is too small"),
        ({"decoder": "ddtree", "tree_budget": "many"}, "whole number or auto"),
        ({"decoder": "dflash", "tree_budget": 16}, "tree_budget is an option of decoder ddtree"),
        ({"decoder": "dflash", "draft_block_size": 1}, "too small"),
        ({"decoder": "ddtree", "block_length": 8}, "block_length is an option of decoder"),
    ],
)
def test_refused_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pair().config(options)


def test_without_a_drafter() -> None:
    native, facts = adopt(tiny_model(), family="qwen3")
    model = BlockDiffusionModel(native, facts)
    assert model.config({}).decoder == "ar"
    assert pair().config({}).decoder == "ddtree"
    with pytest.raises(ConfigError, match=r"without a drafter.*draft="):
        model.config({"decoder": "ddtree"})


def test_a_drafter_that_breaks_is_told_of() -> None:
    native, facts = adopt(tiny_model(), family="qwen3")
    drafter = drafter_for(native)
    drafter.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError):
        with_drafter(native, facts, drafter).generate([[1, 2]], {"decoder": "dflash"}, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "reads_drafts"),
    [({"decoder": "dflash"}, False), ({"tree_budget": 12}, False), ({"tree_budget": "auto"}, True)],
)
def test_a_draft_stays_on_the_device(
    options: dict[str, Any], reads_drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads the device once per step of the target; of a draft only how many nodes ``auto`` has chosen."""
    model = pair()
    prompts = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
    model.generate(prompts, options, max_new_tokens=8)
    model.trace.reset()
    with counted(monkeypatch) as seen:
        model.generate(prompts, {"decoder": "ddtree", **options}, max_new_tokens=8)
    totals = model.trace.totals()
    steps = totals["target_steps"] + totals["drafter_steps"] * reads_drafts
    assert len(seen) == steps, "forwards were timed before the first run, and are not again"
