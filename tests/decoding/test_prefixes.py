"""Prompts that begin alike are run once; the answers are those of prompts run whole."""

from __future__ import annotations

from typing import Any

import pytest

from s2d2_lmeval import BlockDiffusionModel, Generation

from . import drafting_tiny, pipelined_cases, subblocks_drawn
from .tiny import engine

BLOCK = {"decoder": "s2d2", "block_length": 4, "do_sample": True}
AR_LIKE = {**BLOCK, "cache_ver": True, "draft_ver": True}
DECODERS: dict[str, dict[str, Any]] = {
    "ar": {"decoder": "ar", "do_sample": True},
    "dynamic": {"decoder": "dynamic", "block_length": 4},
    "s2d2": BLOCK,
    "token-causal": AR_LIKE,
    "lookahead": {**AR_LIKE, "schedule": "lookahead"},
    "sliding": {"decoder": "sliding", "do_sample": True},
}


def prompts(start: int, count: int, vocabulary: int = 22) -> list[list[int]]:
    """``count`` prompts that share their first ``start`` tokens."""
    shared = [(7 * i + i // 5) % vocabulary for i in range(start)]
    return [[*shared, *((3 * i + j) % vocabulary for j in range(i % 7))] for i in range(1, count + 1)]


def whole(model: BlockDiffusionModel, texts: list[list[int]], options: dict[str, Any]) -> list[Generation]:
    """Every prompt in a run of its own."""
    return [model.generate([text], options, seeds=[index])[0] for index, text in enumerate(texts)]


def ids(answers: list[Generation]) -> list[list[int]]:
    return [answer.canvas for answer in answers]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("rows", "start"), [(2, 9), (2, 131), (8, 100)])
def test_answers_are_those_of_prompts_run_whole(decoder: str, rows: int, start: int) -> None:
    options = {**DECODERS[decoder], "max_new_tokens": 9}
    texts = prompts(start, 9)
    expected = whole(engine(max_batch=1), texts, options)
    model = engine(max_batch=rows)
    model.trace.reset()
    together = model.generate(texts, options)
    assert ids(together) == ids(expected)
    if decoder != "sliding":  # its trees follow what the run has learned; its tokens do not
        assert [answer.steps for answer in together] == [answer.steps for answer in expected]
    totals, grain = model.trace.totals(), 1 if decoder in ("ar", "sliding") else 4
    assert totals["prompt_tokens"] == sum(map(len, texts))
    # Long beginnings are waited for; of short ones only what a freed seat or a neighbour holds by then is taken.
    least, most = len(texts) - 1 if start >= 64 else len(texts) - rows, len(texts) - 1
    assert least * ((start - 1) // grain * grain) <= totals["reused_tokens"] <= most * (start + 6)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_long_beginning_is_computed_once(decoder: str) -> None:
    options = {**DECODERS[decoder], "max_new_tokens": 4}
    texts = prompts(200, 8)
    model = engine()
    model.trace.reset(keep_records=True)
    model.generate(texts, options)
    kept = sum(int(record.kept.sum()) for record in model.trace.records)
    run = sum(len(text) for text in texts) - model.trace.reused_tokens
    assert 200 <= run < 200 + 8 * 12
    assert kept <= run + 8 * 8


def test_several_beginnings_in_one_run() -> None:
    first, second = prompts(100, 6), [[5, *text] for text in prompts(100, 6)]
    texts = [text for pair in zip(first, second, strict=True) for text in pair]
    options = {**BLOCK, "max_new_tokens": 8}
    model = engine(max_batch=4)
    model.trace.reset()
    assert ids(model.generate(texts, options)) == ids(whole(engine(max_batch=1), texts, options))
    assert model.trace.reused_tokens >= 10 * 96


def test_requests_with_another_beginning_do_not_wait() -> None:
    texts = [*prompts(100, 3), [1, 2, 3]]
    model = engine(max_batch=2)
    model.trace.reset(keep_records=True)
    finished: list[int] = []
    model.generate(texts, {**BLOCK, "max_new_tokens": 4}, on_finished=lambda index, answer: finished.append(index))
    assert len(model.trace.records[0].kinds) == 2  # the last prompt took the seat that the second waits for
    assert finished.index(3) < finished.index(2)


@pytest.mark.parametrize("decoder", DECODERS)
def test_chunks_of_a_very_long_prompt(decoder: str) -> None:
    options = {**DECODERS[decoder], "max_new_tokens": 5}
    texts = prompts(1100, 4)
    model = engine(max_batch=4, context=2048)
    expected = whole(engine(max_batch=1, context=2048), texts, options)
    model.trace.reset()
    assert ids(model.generate(texts, options)) == ids(expected)
    assert model.trace.reused_tokens >= 3 * 1100


def test_equal_prompts() -> None:
    text = prompts(100, 1)[0]
    options = {**BLOCK, "max_new_tokens": 8}
    answers = engine().generate([text] * 5, options, seeds=[0, 1, 2, 3, 0])
    assert ids(answers) == [engine().generate([text], options, seeds=[seed])[0].canvas for seed in (0, 1, 2, 3, 0)]


@pytest.mark.parametrize("options", [{"decoder": "s2d2", "block_length": 8}, {"decoder": "ar"}, {"decoder": "dynamic"}])
@pytest.mark.parametrize("start", [64, 96, 101])
def test_sub_blocks(options: dict[str, Any], start: int) -> None:
    options = {**options, "max_new_tokens": 12}
    texts = prompts(start, 6)
    model = subblocks_drawn.engine(max_batch=3)
    expected = whole(subblocks_drawn.engine(max_batch=1), texts, options)
    model.trace.reset()
    assert ids(model.generate(texts, options)) == ids(expected)
    assert model.trace.reused_tokens > 0


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_prompt_that_sees_all_of_itself_is_run_whole(family: str) -> None:
    model = pipelined_cases.engine(family, max_batch=2)
    texts = prompts(70, 4, vocabulary=20)
    model.trace.reset()
    model.generate(texts, {"block_length": 4, "max_new_tokens": 4})
    assert model.trace.prompt_tokens == sum(map(len, texts))
    assert model.trace.reused_tokens == 0


def test_the_reference_schedule_runs_every_prompt_whole() -> None:
    model = engine()
    model.trace.reset()
    model.generate(prompts(100, 4), {**BLOCK, "max_new_tokens": 4, "schedule": "reference"})
    assert model.trace.reused_tokens == 0
    assert model.trace.totals()["prefill_forwards"] == 4


@pytest.mark.parametrize("decoder", ["ar", "dflash", "ddtree"])
@pytest.mark.parametrize("shifted", [True, False])
def test_a_drafter_reads_a_shared_beginning_once_too(decoder: str, shifted: bool) -> None:
    # Hints are shared among rows, so they would make drafts depend on the batch.
    hints = {"pairs": 0, "lookup": False} if decoder == "ddtree" else {}
    options = {"decoder": decoder, "max_new_tokens": 9, **hints}
    texts = prompts(100, 5)
    expected = whole(drafting_tiny.pair(shifted=shifted, max_batch=1), texts, options)
    model = drafting_tiny.pair(shifted=shifted, max_batch=3)
    model.trace.reset()
    together = model.generate(texts, options)
    assert ids(together) == ids(expected)
    # What is drafted, and so what is accepted, is the same as well.
    assert [answer.stats["accepted"] for answer in together] == [answer.stats["accepted"] for answer in expected]
    assert model.trace.reused_tokens >= 4 * 99
