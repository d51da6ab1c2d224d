"""Spiffy writes what its base decoder writes, through the same states, in a forward less for each that came true."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from s2d2_lmeval import BlockDiffusionModel, DecodingConfig, load
from s2d2_lmeval.decoding.engine import Engine
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.passes import Sent
from s2d2_lmeval.decoding.spiffy.decoder import Spiffy
from s2d2_lmeval.decoding.spiffy.graph import DraftGraph, load_graph, parse_graph
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.harness.report import Totals
from s2d2_lmeval.runtime.costs import CostCurve
from s2d2_lmeval.toy import checkpoint_path, held_out

from . import editing_tiny, pipelined_cases, subblocks_drawn
from .spiffy_drawn import BLOCK_BASES, SUBBLOCKS, Case, cases
from .tiny import VOCABULARY, engine, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The draft graph")
ENGINES: dict[str, Callable[[int], BlockDiffusionModel]] = {
    "block": lambda seed: engine(seed=seed),
    "editing": editing_tiny.engine,
    "subblock": lambda seed: subblocks_drawn.engine(seed),
}
BASES = {"block": BLOCK_BASES, "editing": ("editing",), "subblock": (SUBBLOCKS,)}
TRACED = ("token_ids", "canvas", "steps", "decoding_order", "finish_reason")


def check_same_states(case: Case, scheme: str, folder: Path) -> tuple[int, int]:
    """Base and spiffy agree in everything but the forwards; returns steps and states accepted."""
    model = ENGINES[scheme](case.model_seed)
    path = folder / "graph.json"
    case.graph.save(path)
    seeds = [11 * n - 3 for n in range(len(case.prompts))]

    def decode(**options: Any) -> list[Generation]:
        config = DecodingConfig(**options, **case.options)
        return model.generate(case.prompts, config, max_new_tokens=case.budgets, seeds=seeds)

    plain = decode(decoder=case.base)
    model.trace.reset()
    fast = decode(decoder="spiffy", base=case.base, draft_graph=str(path), draft_nodes=case.nodes)
    steps = accepted = 0
    for base, spiffy in zip(plain, fast, strict=True):
        for name in TRACED:
            assert getattr(spiffy, name) == getattr(base, name), name
        if not base.stats["nfe"]:
            continue
        stats = spiffy.stats
        assert stats["steps"] == base.stats["draft_forwards"] == sum(step.kind == "draft" for step in base.steps)
        assert stats["draft_forwards"] == stats["steps"] - stats["states_accepted"]
        assert stats["nfe"] == base.stats["nfe"] - stats["states_accepted"] <= base.stats["nfe"]
        assert 0 <= stats["states_accepted"] <= stats["states_drafted"]
        steps, accepted = steps + int(stats["steps"]), accepted + int(stats["states_accepted"])
    totals = model.trace.totals()
    assert totals.get("states_accepted", 0) == accepted
    return steps, accepted


@pytest.mark.parametrize("scheme", list(BASES))
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_states_and_output_are_those_of_the_base_decoder(
    scheme: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_same_states(data.draw(cases(BASES[scheme])), scheme, tmp_path_factory.mktemp("graph"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", list(BASES))
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_states_and_output_are_those_of_the_base_decoder_at_length(
    scheme: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_same_states(data.draw(cases(BASES[scheme])), scheme, tmp_path_factory.mktemp("graph"))


PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [20], [3] * 11]


def fixed_case(base: str, graph: DraftGraph, **options: Any) -> Case:
    return Case(base, {"block_length": 8, **options}, graph, len(graph.nodes), PROMPTS, [24] * len(PROMPTS), 0, 2)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.3}])
@pytest.mark.parametrize("base", ["static", "dynamic"])
def test_the_chain_of_best_tokens_saves_forwards(base: str, sampling: dict[str, Any], tmp_path: Path) -> None:
    steps, accepted = check_same_states(fixed_case(base, DraftGraph.chain(8, 4), **sampling), "block", tmp_path)
    assert 0.1 * steps < accepted < steps


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sub_blocks_finished_by_a_draft_go_on_in_the_next(seed: int, caching: bool, tmp_path: Path) -> None:
    options = {"small_block_size": 4, "confidence_threshold": 0.85, "cache_ver": caching, "draft_ver": caching}
    case = replace(fixed_case("dynamic", DraftGraph.chain(4, 4), **options), model_seed=seed)
    steps, accepted = check_same_states(case, "subblock", tmp_path)
    assert accepted > 0.05 * steps


@pytest.mark.parametrize("post_steps", [0, 2])
def test_edited_blocks_are_drafted_whole(post_steps: int, tmp_path: Path) -> None:
    options = {"editing_threshold": 0.9, "confidence_threshold": 0.9, "max_post_steps": post_steps}
    steps, accepted = check_same_states(fixed_case("editing", DraftGraph.chain(8, 4), **options), "editing", tmp_path)
    assert accepted > 0.05 * steps


def test_all_successors_as_drafts_skip_every_second_forward_or_more(tmp_path: Path) -> None:
    """With every single decision drafted, one step ahead is always known."""
    every = DraftGraph.of([[(place, rank)] for place in range(4) for rank in range(VOCABULARY - 1)], 4)
    steps, accepted = check_same_states(fixed_case("static", every, block_length=4), "block", tmp_path)
    # A block's first forward has no distribution to draft from, unless the block before carried it along.
    assert accepted >= steps // 2 - 3 * len(PROMPTS)


@pytest.mark.parametrize("schedule", ["reference", "fused"])
def test_only_fused_runs_the_next_blocks_masks_behind_a_finished_draft(schedule: str, tmp_path: Path) -> None:
    """Sequential decoding of one token a step: a block of one mask left has one draft, which finishes it."""
    graph = DraftGraph.of([[(0, 0)]], 2)
    case = fixed_case("sequential", graph, block_length=2, schedule=schedule)
    _, accepted = check_same_states(case, "block", tmp_path)
    assert (accepted > 0) == (schedule == "fused")


@pytest.mark.parametrize("caching", [True, False])
def test_keys_of_a_block_finished_by_a_draft_are_those_of_its_commit(caching: bool, tmp_path: Path) -> None:
    """Of blocks of two decided left to right with one draft, every accepted state finishes a block."""
    path = tmp_path / "graph.json"
    DraftGraph.of([[(0, 0)]], 2).save(path)
    model = load(tiny_model(seed=0), max_batch=1, mask_token_id=VOCABULARY - 1, block_length=2)
    options = {"block_length": 2, "cache_ver": caching, "draft_ver": caching}
    spiffy = {"decoder": "spiffy", "base": "sequential", "draft_graph": str(path), "draft_nodes": 1}
    kept, crossings = [], 0
    for decoder in (spiffy, {"decoder": "sequential"}):
        model.trace.reset(keep_records=True)
        model.generate([PROMPTS[1]], DecodingConfig(**decoder, **options), max_new_tokens=40)
        cache = model._runner.cache
        crossings += model.trace.totals().get("states_accepted", 0)
        kept.append([keys[0, : cache.lengths[0]].clone() for keys, _ in cache._layers.values()])
    assert crossings > 5
    for ours, plain in zip(*kept, strict=True):
        shared = min(len(ours), len(plain))
        assert shared > 40
        torch.testing.assert_close(ours[:shared], plain[:shared], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("caching", [True, False])
def test_packed_states_have_the_logits_of_states_run_alone(
    caching: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draft state of every forward, against a forward of its own on the same prefix (float64)."""
    compared: list[float] = []

    class Watching(Spiffy):
        def decide(self, sent: Sent, logits: torch.Tensor) -> Any:
            if sent.fixed[0]:
                compared.extend(_differences(self, sent, logits, model))
            return super().decide(sent, logits)

    model = load(tiny_model(seed=0), max_batch=3, mask_token_id=VOCABULARY - 1, block_length=4)
    path = tmp_path / "graph.json"
    DraftGraph.chain(4, 3).save(path)
    options = {"block_length": 4, "cache_ver": caching, "draft_ver": caching}
    monkeypatch.setattr(Engine, "decoder_class", lambda engine: Watching)
    model.generate(
        PROMPTS,
        DecodingConfig(decoder="spiffy", base="static", draft_graph=str(path), draft_nodes=3, **options),
        max_new_tokens=16,
    )
    assert len(compared) > 50
    assert max(compared) < 1e-9


def _differences(decoder: Spiffy, sent: Sent, logits: torch.Tensor, model: BlockDiffusionModel) -> list[float]:
    """Largest difference of the logits of each inside draft state from those of a plain forward of prefix and state."""
    rows, found = decoder.rows, []
    at_row, at_place = sent["slots_read"].tolist(), sent["places_read"].tolist()
    plan = decoder._plan
    plain = tiny_model(seed=0)
    for index, slot in enumerate(plan.layout.slots.tolist()):
        start = int(rows.start[slot])
        for state in range(int(plan.known["inside"][index])):
            block = decoder.states[slot, state].tolist()
            text = torch.tensor([[*rows.store[slot, :start].tolist(), *block]])
            visible = _visible(start, block, decoder.config)
            bias = torch.zeros(1, 1, *visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
            alone = plain(input_ids=text, attention_mask=bias).logits[0]
            for entry, (row, place) in enumerate(zip(at_row, at_place, strict=True)):
                if row == slot and rows.wanted[slot, place]:
                    packed = logits[sent["lookup"][state + 1, entry]]
                    found.append(float((packed - alone[start + place]).abs().max()))
    return found


def _visible(start: int, block: list[int], config: DecodingConfig) -> torch.Tensor:
    """Who sees whom in a text whose last block is an open one."""
    length, mask = config.block_length, VOCABULARY - 1
    place = torch.arange(start + length)
    reach = place if config.token_causal else (place // length + 1) * length - 1
    open_reach = torch.full((length,), start + length - 1)
    if config.draft_ver:
        first = block.index(mask)
        open_reach[:first] = place[start : start + first]
    reach = torch.cat([reach[:start], open_reach])
    return place[None, :] <= reach[:, None]


def test_how_many_states_pay_depends_on_what_width_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """draft_nodes=auto: all of the graph where width is free, none where it costs in proportion, the same output."""
    chain = DraftGraph.chain(4, 3).to_dict()
    for node in chain["nodes"]:
        node |= {"count": 1, "chances": 10}
    path = tmp_path / "graph.json"
    parse_graph(json.dumps(chain)).save(path)
    widths, answers = {}, {}
    for name, seconds in {"free": (1.0, 1.0), "linear": (1.0, 1e6)}.items():
        model = load(tiny_model(seed=0), max_batch=4, mask_token_id=VOCABULARY - 1, block_length=4)
        curve = CostCurve(np.array([1, 1_000_000]), np.array(seconds))
        monkeypatch.setattr(model._runner, "measure_costs", lambda slots, most, curve=curve: curve)
        config = DecodingConfig(decoder="spiffy", base="static", block_length=4, draft_graph=str(path))
        answers[name] = model.generate(PROMPTS, config, max_new_tokens=20)
        widths[name] = model.trace.totals()["queries"]
        drafted = model.trace.totals().get("states_drafted", 0)
        assert (drafted > 0) == (name == "free")
    assert [answer.canvas for answer in answers["free"]] == [answer.canvas for answer in answers["linear"]]
    assert widths["free"] > widths["linear"]


def test_one_read_of_the_device_per_engine_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    original = torch.Tensor.cpu

    def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal reads
        reads += 1
        return original(self, *args, **kwargs)

    model, path = engine(seed=0), tmp_path / "graph.json"
    DraftGraph.chain(4, 3).save(path)
    config = DecodingConfig(decoder="spiffy", base="static", block_length=4, draft_graph=str(path), draft_nodes=3)
    model.trace.reset(keep_records=True)
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    monkeypatch.setattr(torch.Tensor, "item", None)
    model.generate(PROMPTS, config, max_new_tokens=20)
    assert reads == len(model.trace.records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "s2d2"}, "two forwards"),
        ({"base": "ar"}, "no denoising steps"),
        ({"base": "static", "confidence_threshold": 0.9}, "base=static"),
        ({"base": "editing"}, "base=editing does not fit sdar"),
        ({"schedule": "lookahead"}, "schedule=lookahead"),
        ({"do_sample": True, "random_source": "torch"}, "lossless=false"),
        ({"draft_graph": "/nowhere.json"}, "cannot be read"),
        ({"draft_nodes": -1}, "at least 0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    model = engine(seed=0)
    with pytest.raises(ConfigError, match=message):
        model.generate([[1, 2]], {"decoder": "spiffy", "base": "dynamic", **options}, max_new_tokens=4)


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("family", pipelined_cases.FAMILIES)
def test_models_without_frozen_surroundings_are_refused_by_name(family: str, lossless: bool) -> None:
    options = {"decoder": "spiffy", "lossless": lossless}
    with pytest.raises(ConfigError, match=f"decoder=spiffy does not fit {family} checkpoints .*frozen prefix"):
        pipelined_cases.engine(family).generate([[1, 2]], options, max_new_tokens=4)


def test_keys_left_behind_by_an_earlier_forward_are_refused() -> None:
    options = {"decoder": "spiffy", "use_block_cache": True, "draft_ver": False}
    with pytest.raises(ConfigError, match="use_block_cache"):
        subblocks_drawn.engine().generate([[1, 2]], options, max_new_tokens=4)
    with pytest.raises(ConfigError, match="base=static does not fit fast_dllm_v2"):
        subblocks_drawn.engine().generate([[1, 2]], {"decoder": "spiffy", "base": "static"}, max_new_tokens=4)


def test_draws_in_the_order_of_calls_only_without_the_promise(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    DraftGraph.chain(4, 3).save(path)
    options = {"decoder": "spiffy", "base": "static", "draft_graph": str(path), "draft_nodes": 3, "do_sample": True}
    torch.manual_seed(0)
    answer = engine(seed=0).generate(
        [[1, 2]], {**options, "random_source": "torch", "lossless": False}, max_new_tokens=12
    )[0]
    assert len(answer.token_ids) == 12


def test_a_graph_of_another_configuration_warns_that_it_is_only_slower(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    graph = DraftGraph.chain(8, 3)
    calibrated = DraftGraph(graph.nodes, 8, {"family": "sdar"}, {"base": "static"})
    calibrated.save(path)
    options = {"decoder": "spiffy", "draft_graph": str(path), "draft_nodes": 3}
    with pytest.warns(UserWarning, match=r"base=dynamic here, static there; block_length=4 here, 8 there.*same"):
        engine(seed=0).generate([[1, 2]], {**options, "base": "dynamic"}, max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(seed=0).generate([[1, 2]], {**options, "base": "static", "block_length": 8}, max_new_tokens=4)


@pytest.mark.parametrize("base", ["static", "dynamic", "sequential", "entropy_bounded", "editing"])
def test_default_graphs_come_with_the_package_and_know_their_counts(base: str) -> None:
    graph = load_graph("default", base)
    assert graph.counted
    assert len(graph.nodes) >= 8
    assert graph.model["source"] == "toy"
    counts = [node.count for node in graph.nodes]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8}])
@pytest.mark.parametrize("base", ["static", "dynamic"])
def test_calibrated_graphs_go_through_the_states_of_the_base_decoder(base: str, sampling: dict[str, Any]) -> None:
    """The default graphs on the model that they were calibrated on."""
    model = load("toy", dtype="float64", max_batch=4)
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    prompts = [tokenizer.encode(problem.prompt).ids for problem in held_out("arithmetic")[:12]]
    options = {"block_length": 16, "max_new_tokens": 48, "seed": 5, **sampling}
    plain = model.generate(prompts, {"decoder": base, **options})
    fast = model.generate(prompts, {"decoder": "spiffy", "base": base, "draft_nodes": 8, **options})
    for one, other in zip(plain, fast, strict=True):
        assert all(getattr(one, name) == getattr(other, name) for name in TRACED)
    forwards = [sum(answer.stats["nfe"] for answer in answers) for answers in (plain, fast)]
    accepted = sum(answer.stats["states_accepted"] for answer in fast)
    assert forwards[0] - forwards[1] == accepted
    assert accepted > (0.3 * forwards[0] if base == "static" else 0)


def test_statistics_reach_the_results(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    DraftGraph.chain(8, 4).save(path)
    model = engine(seed=0)
    model.trace.reset(keep_records=True)
    config = DecodingConfig(decoder="spiffy", base="static", block_length=8, draft_graph=str(path), draft_nodes=4)
    answers = model.generate(PROMPTS, config, max_new_tokens=16)
    totals = Totals()
    totals.add_run({}, model.trace.totals(), 1.0)
    for answer in answers:
        totals.add_response("some task", answer.stats)
    summary = totals.summary()
    for counts in (summary["totals"], summary["tasks"]["some task"]):
        assert counts["steps"] == sum(len(answer.steps) for answer in answers)
        assert 0 < counts["states_accepted"] < counts["states_drafted"]
        assert counts["forwards_saved"] == counts["states_accepted"] / counts["steps"]
        assert counts["draft_forwards"] == counts["steps"] - counts["states_accepted"]
    assert summary["totals"]["queries"] >= 8 * (summary["totals"]["states_drafted"] + len(answers))
