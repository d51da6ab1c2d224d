"""Padded shapes and split attention give the tokens of the plain path, for every decoder."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from s2d2_lmeval import BlockDiffusionModel, Generation
from s2d2_lmeval.decoding import scoring
from s2d2_lmeval.runtime import attention, graphs, shapes
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.graphs import upload
from s2d2_lmeval.runtime.passes import Layout
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.runtime.shapes import Frame, Shape
from s2d2_lmeval.runtime.trace import Trace

from . import editing_tiny, pipelined_cases, subblocks_drawn
from .test_attention import prefix_in_torch
from .tiny import engine

PROMPTS = [[(3 * i + j) % 19 for j in range(1 + (5 * i) % 23)] for i in range(7)]
AR_LIKE = {"block_length": 4, "cache_ver": True, "draft_ver": True, "do_sample": True}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ar": (engine, {"decoder": "ar", "do_sample": True}),
    "dynamic": (engine, {"decoder": "dynamic", "block_length": 4}),
    "s2d2": (engine, {"decoder": "s2d2", "block_length": 8, "do_sample": True}),
    "lookahead": (engine, {"schedule": "lookahead", **AR_LIKE}),
    "reference": (engine, {"schedule": "reference", **AR_LIKE}),
    "sliding": (engine, {"decoder": "sliding", "do_sample": True}),
    "editing": (editing_tiny.engine, {"decoder": "s2d2", "block_length": 4}),
    "sub-blocks": (subblocks_drawn.engine, {"decoder": "s2d2", "block_length": 8}),
    "pipelined": (lambda max_batch: pipelined_cases.engine("llada", max_batch), {"decoder": "s2d2", "block_length": 4}),
}


@cache
def answers(case: str) -> list[list[int]]:
    make, options = CASES[case]
    return canvases(make(max_batch=3).generate(PROMPTS, {**options, "max_new_tokens": 11}))


def canvases(generations: list[Generation]) -> list[list[int]]:
    return [generation.canvas for generation in generations]


def around(case: str, runner: Runner) -> BlockDiffusionModel:
    model = CASES[case][0](max_batch=3)
    return BlockDiffusionModel(model.hf_model, model.facts, max_batch=3, runner=runner)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "flash", "triton"])
def test_padded_shapes_change_no_token(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHORTEST_SPAN", 8)
    runner = Runner(CASES[case][0](max_batch=3).hf_model, static_shapes=True)
    assert runner.graphs is not None
    runner.attention = backend
    monkeypatch.setattr(attention, "prefix_kernel", lambda dtype: prefix_in_torch)
    got = around(case, runner).generate(PROMPTS, {**CASES[case][1], "max_new_tokens": 11})
    assert canvases(got) == answers(case)
    spans = {shape.span for key in runner.graphs.steps for shape in key if isinstance(shape, shapes.Shape)}
    assert backend == "sdpa" or len(spans) == 1, "whatever the lengths"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_another_attention_changes_no_token(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(CASES[case][0](max_batch=3).hf_model)
    runner.attention = backend
    monkeypatch.setattr(attention, "prefix_kernel", lambda dtype: prefix_in_torch)
    got = around(case, runner).generate(PROMPTS, {**CASES[case][1], "max_new_tokens": 11})
    assert canvases(got) == answers(case)


def test_scores_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 4)
    pairs = [([1, 2, 3], [4] * (1 + i)) for i in range(7)]
    runner = Runner(engine().hf_model, static_shapes=True)
    for (score, best), (expected, greedy) in zip(around("ar", runner).score(pairs), engine().score(pairs), strict=True):
        assert score == pytest.approx(expected)
        assert best == greedy


# ---- buckets ----


def bucket(slots: list[int], widths: list[int], wanted: int, cache: SlotCache) -> Shape | None:
    return Shape.bucket(Layout(np.array(slots), np.array(widths)), wanted, cache, cache.slots)


@pytest.mark.parametrize(
    ("slots", "widths", "wanted", "expected"),
    [
        ([0], [1], 1, Shape(1, 1, 1, 256, 1, padded=True)),
        ([0], [9], 0, Shape(12, 1, 12, 256, 0, padded=True)),  # a single row is as wide as its queries
        ([0, 2], [3, 5], 4, Shape(8, 4, 8, 256, 4, padded=True)),
        ([0, 2], [3, 5], 5, Shape(8, 4, 8, 256, 8, padded=True)),  # half of the logits, or all
        ([0, 1, 2, 3, 4], [16] * 5, 80, Shape(96, 6, 16, 256, 96, padded=True)),  # no more rows than slots
        ([0, 5], [512, 1], 2, Shape(768, 6, 512, 256, 2, padded=True)),
        ([0], [8193], 1, None),
    ],
)
def test_buckets(slots: list[int], widths: list[int], wanted: int, expected: Shape | None) -> None:
    assert bucket(slots, widths, wanted, SlotCache(6, 256)) == expected


def test_spans_double() -> None:
    cache = SlotCache(1, 1000)
    spans = []
    for length in (0, 255, 256, 600, 990):
        cache.lengths[0] = length
        found = bucket([0], [1], 1, cache)
        assert found is not None
        spans.append(found.span)
    assert spans == [256, 256, 512, 1000, 1000]


def test_numbers_of_queries_come_in_rungs() -> None:
    rungs = sorted({shapes.rung(least) for least in range(200)})
    assert rungs == [0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(shapes.rung(least) >= least for least in range(200))


def stored(cache: SlotCache) -> list[torch.Tensor]:
    return [part.clone() for layer in sorted(cache._layers) for part in cache._layers[layer]]


def test_padding_writes_to_no_slot_but_the_scratch_one() -> None:
    machines = [Runner(engine().hf_model) for _ in range(2)]
    layouts = Layout(np.arange(4), np.array([9, 8, 7, 6])), Layout(np.array([1, 3]), np.array([3, 1]))
    answers, before = [], []
    for machine, padded in zip(machines, (True, False), strict=True):
        machine.reserve(4, 64)
        for layout in layouts:
            before = stored(machine.cache) if padded else before
            shape = Shape.bucket(layout, 4, machine.cache, 4) if padded else Shape.tight(layout, 4, machine.cache)
            assert shape is not None
            frame = Frame(layout, shape)
            arrays = {**frame.attention(machine.cache), "tokens": frame.queries(np.arange(layout.queries) % 19)}
            arrays |= {"positions": frame.queries(layout.local), "read": frame.wanted(np.arange(4))}
            told = upload(torch.device("cpu"), arrays)
            visible = torch.ones(shape.widest, shape.widest, dtype=torch.bool).tril().repeat(shape.rows, 1, 1)
            logits = machine.run(told["tokens"], told["positions"], told["read"], visible, told, frame)
            machine.commit(layout.slots, layout.widths)
        answers.append(logits[:4])
    torch.testing.assert_close(*answers)
    touched = torch.zeros(5, 64, dtype=torch.bool)
    touched[1, 8:11] = touched[3, 6] = touched[4, 0] = True  # the two rows' queries, and scratch
    for old, new in zip(before, stored(machines[0].cache), strict=True):
        assert torch.equal(old[~touched], new[~touched])
    for mine, theirs in zip(*(stored(machine.cache) for machine in machines), strict=True):
        torch.testing.assert_close(mine[:4], theirs[:4])


class Recorded:
    """In place of a captured graph: replays by running the program again."""

    made: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, step: graphs.Step, program: graphs.Program) -> None:
        self.step, self.program = step, program

    def replay(self) -> None:
        self.step.table = self.program(self.step.mail.told)

    @staticmethod
    def capture(step: graphs.Step, program: graphs.Program, pool: object) -> None:
        Recorded.made.append(tuple(step.mail.device.shape))
        step.graph = Recorded(step, program)  # type: ignore[assignment]


def doubled(told: dict[str, torch.Tensor]) -> torch.Tensor:
    return told["x"] * 2


def test_a_bucket_is_captured_after_its_first_step_and_dropped_with_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.Step, "capture", Recorded.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(Recorded, "made", [])
    steps = graphs.Graphs(torch.device("cpu"), captures=True)
    for values in (3, 4):
        read = steps.run("narrow", {"x": np.array([values])}, doubled)
        assert read is not None
        assert read.tolist() == [2 * values]
    assert Recorded.made == [(1,)]
    steps.run("wide", {"x": np.arange(2)}, doubled)
    assert (Recorded.made, len(steps.steps)) == ([(1,), (2,)], 2)
    table = steps.tables.full("state", (3,), 7)
    steps.run("wide", {"x": np.arange(2)}, doubled)
    assert list(steps.steps) == ["wide"], "a new table has a new address"
    table.zero_()
    assert steps.tables.full("state", (3,), 7).data_ptr() == table.data_ptr()
    assert table.tolist() == [7, 7, 7]
    steps.run("wide", {"x": np.arange(2)}, doubled)
    assert len(Recorded.made) == 3, "an emptied table has the old address"


@pytest.mark.parametrize("case", ["ar", "lookahead", "sliding"])
def test_a_long_run_captures_its_graphs_before_its_first_request(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.Step, "capture", Recorded.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr("s2d2_lmeval.decoding.engine.WORTH_REHEARSING", 20)
    runner = Runner(CASES[case][0](max_batch=3).hf_model, static_shapes=True)
    assert runner.graphs is not None
    runner.graphs.captures = True
    model, options = around(case, runner), {**CASES[case][1], "max_new_tokens": 11}
    told: list[int] = []
    first = Trace.admitted
    monkeypatch.setattr(
        Trace, "admitted", lambda trace, *counts: (told.append(len(Recorded.made)), first(trace, *counts))
    )
    got = model.generate(PROMPTS, options)
    assert canvases(got) == answers(case)
    assert model.trace.requests == len(PROMPTS), "a rehearsal counts nowhere"
    before, after = told[-len(PROMPTS)], len(Recorded.made)
    assert before >= 1.5 * (after - before), "most of what the run needs"
    model.generate(PROMPTS, options)
    assert len(Recorded.made) == after, "nothing is captured twice"
    assert runner.graphs.on_captured is None


def test_the_least_recently_used_bucket_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    steps = graphs.Graphs(torch.device("cpu"), captures=False)
    for name in ("a", "b", "a", "c"):
        steps.run(name, {"x": np.arange(1)}, doubled)
    assert list(steps.steps) == ["a", "c"]


def test_a_model_that_cannot_be_captured_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def capture(step: graphs.Step, program: graphs.Program, pool: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs.Step, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    steps = graphs.Graphs(torch.device("cpu"), captures=True)
    for _ in range(3):
        read = steps.run("narrow", {"x": np.array([3])}, doubled)
        assert read is not None
        assert read.tolist() == [6]
    assert caplog.text.count("cannot be captured") == 1


def test_graphs_and_old_cache_are_gone_before_a_new_cache_is_made() -> None:
    runner = Runner(engine().hf_model, static_shapes=True)
    around("ar", runner).generate(PROMPTS[:2], {**CASES["ar"][1], "max_new_tokens": 4})
    assert runner.graphs is not None
    assert runner.graphs.steps
    runner.reserve(5, 4096)
    assert not runner.graphs.steps


# ---- on a device ----

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", ["ar", "dynamic", "s2d2", "lookahead", "sliding"])
def test_captured_graphs_change_no_token(case: str) -> None:
    from copy import deepcopy

    plain = deepcopy(CASES[case][0](max_batch=3).hf_model).to("cuda")
    runner = Runner(plain)
    assert runner.graphs is not None
    for _ in range(2):
        got = around(case, runner).generate(PROMPTS, {**CASES[case][1], "max_new_tokens": 11})
        assert canvases(got) == answers(case)
    assert all(step.graph is not None for step in runner.graphs.steps.values())
