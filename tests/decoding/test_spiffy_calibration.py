"""Calibration: traces are the base decoder's, counts are what followed, graphs are the best connected ones."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest

from s2d2_lmeval import DecodingConfig
from s2d2_lmeval.decoding.spiffy.graph import DraftGraph, parse_graph, reachable
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.studies.calibrate import Counts, RankedStep, calibrate, choose, count, trace

from . import editing_tiny
from .tiny import engine

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [20], [3] * 11]
MASK = 22


def config(base: str = "static", **options: object) -> DecodingConfig:
    return DecodingConfig(
        decoder="spiffy",
        base=base,
        **{"block_length": 4, "max_new_tokens": 24, **options},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.3}])
def test_traces_are_the_steps_of_the_base_decoder(sampling: dict[str, object], tmp_path: Path) -> None:
    plain = engine().generate(PROMPTS, DecodingConfig(decoder="static", block_length=4, max_new_tokens=24, **sampling))
    traced = trace(engine(), config(**sampling), PROMPTS, tmp_path / "traces.jsonl")
    for answer, steps in zip(plain, traced, strict=True):
        names = ("start", "before", "tokens", "marks")
        shown = [[getattr(step, name) for name in names] for step in (*answer.steps, *steps)]
        assert shown[: len(steps)] == shown[len(steps) :]
        for step in steps:
            assert sorted(step.places) == [0, 1, 2, 3]
            masks = [place for place, token in enumerate(step.tokens) if token == MASK]
            assert sorted(step.places[: len(masks)]) == masks


def test_best_ranks_are_what_the_next_step_decides_if_the_distribution_stays(tmp_path: Path) -> None:
    """The next state is mostly the place and token that were ranked first, which is what drafts rest on."""
    traced = trace(engine(), config(), PROMPTS, tmp_path / "traces.jsonl")
    counts = count(traced, 3, MASK)
    first = counts.states[((0, 0),)]
    singles = sum(n for pairs, n in counts.states.items() if len(pairs) == 1)
    assert first > 0.3 * singles
    assert first == max(n for pairs, n in counts.states.items() if len(pairs) == 1)


def test_an_interrupted_calibration_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    traces = trace(engine(), config(), PROMPTS, whole)
    trace(engine(), config(), PROMPTS[:2], parts)
    with parts.open("a") as file:
        file.write('{"prompt": "cut o')  # killed while it wrote
    done: list[int] = []
    model = engine()
    model.trace.reset()
    again = trace(model, config(), PROMPTS, parts, lambda: done.append(1))
    assert again == traces
    assert len(done) == len(PROMPTS)
    assert sorted(whole.read_text().splitlines()) == sorted(parts.read_text().splitlines())
    with pytest.raises(ConfigError, match="another model or decoder"):
        trace(engine(), config(base="dynamic"), PROMPTS, whole)


def test_only_spiffy_is_calibrated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base=static"):
        trace(engine(), DecodingConfig(decoder="static"), PROMPTS, tmp_path / "traces.jsonl")


def step(tokens: list[int], places: list[int], start: int = 0) -> RankedStep:
    ranks = [[10 * place + rank for rank in range(4)] for place in range(len(tokens))]
    return RankedStep("draft", start, [], [], tokens, [], places=places, ranks=ranks)


def test_counts_of_a_trace_by_hand() -> None:
    trace_of_one = [
        step([MASK, MASK, MASK, MASK], [2, 0, 3, 1]),
        step([MASK, MASK, 20, MASK], [3, 0, 1, 2]),  # place 2, ranked first, got its best token
        step([1, MASK, 20, 30], [1, 0, 2, 3]),  # 0 and 3: second and first; 0 got its second-best
        step([1, 19, 20, 30], [0, 1, 2, 3]),  # a token that nobody ranked
        step([MASK, MASK, MASK, MASK], [0, 1, 2, 3], start=4),  # another block
    ]
    counts = count([trace_of_one], 3, MASK)
    assert counts.anchors == Counter({4: 2, 3: 1, 1: 1})
    # From the first state, ranks 2, 0, 3, 1 of the places: place 2 is first, 0 second, 3 third.
    both = ((0, 0), (1, 1), (2, 0))
    assert counts.states == Counter({((0, 0),): 1, both: 1, ((0, 0), (1, 1)): 1})
    assert counts.parents[both] == Counter({((0, 0),): 1})
    assert counts.parents[((0, 0), (1, 1))] == Counter({(): 1})
    assert counts.chances(((0, 0),)) == 4
    assert counts.chances(both) == 3


def counted(**states: int) -> Counts:
    """Sets named by their place ranks; every set one smaller that is there is a parent."""
    sets = {tuple((int(place), 0) for place in name[1:]): n for name, n in states.items()}
    parents: defaultdict = defaultdict(Counter)
    for pairs, n in sets.items():
        smaller = [part for part in combinations(pairs, len(pairs) - 1) if part in sets or not part]
        for part in smaller:
            parents[pairs][part] += n
    return Counts(Counter(sets), parents, Counter({4: 100}))


def test_nodes_are_chosen_by_score_and_connected() -> None:
    counts = counted(_0=50, _1=20, _01=30, _02=5, _012=25, _3=4)
    own = [node.pairs for node in choose(counts, 4)]
    assert [len(pairs) for pairs in own] == [1, 2, 3, 1]
    assert own[3] == ((1, 0),)
    # As published, a child of a frequent parent counts for more than a state of its own.
    published = [node.pairs for node in choose(counts, 4, "parents")]
    assert ((0, 0), (2, 0)) in published
    assert ((1, 0),) not in published
    for score in ("own", "parents"):
        nodes = choose(counts, 6, score)
        assert reachable([node.parents for node in nodes]) == set(range(1, len(nodes) + 1))
        assert {node.count for node in nodes} == {50, 20, 30, 5, 25, 4}
        for size in range(1, 7):
            first = choose(counts, size, score)
            assert [node.pairs for node in first] == [node.pairs for node in nodes[:size]]


@pytest.mark.parametrize("scheme", ["block", "editing"])
def test_a_calibrated_graph_saves_more_than_it_costs_and_fits_without_a_warning(
    scheme: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    import json

    model = engine() if scheme == "block" else editing_tiny.engine()
    asked = config() if scheme == "block" else config("editing", confidence_threshold=0.6, editing_threshold=0.9)
    graph = calibrate(model, asked, PROMPTS, nodes=6, depth=3, traces=tmp_path / "traces.jsonl", source="tiny")
    assert 1 <= len(graph.nodes) <= 6
    assert parse_graph(json.dumps(graph.to_dict())) == graph
    path = tmp_path / "graph.json"
    graph.save(path)
    answers = model.generate(PROMPTS, asked.replace(draft_graph=str(path), draft_nodes=6))
    # Calibrated on what it decodes: a state counts once for every state that it follows, and some of these are skipped.
    accepted = sum(answer.stats["states_accepted"] for answer in answers)
    assert accepted > 0.2 * sum(answer.stats["steps"] for answer in answers)
    assert not [warning for warning in recwarn if "draft graph" in str(warning.message)]
    path.write_text(json.dumps({**graph.to_dict(), "block_length": 8}))
    with pytest.warns(UserWarning, match="block_length=4 here, 8 there"):
        model.generate(PROMPTS, asked.replace(draft_graph=str(path), draft_nodes=6))


def test_an_empty_graph_is_a_graph() -> None:
    assert choose(counted(), 5) == []
    assert DraftGraph.of([], 4).counted
