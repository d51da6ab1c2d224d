"""What may be asked for, where an answer ends, and that bad input gets one clear error and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2d2_lmeval import Generation, load
from s2d2_lmeval.errors import ConfigError, NumericalError, RequestError, S2D2Error

from .drawn import MASK
from .oracle import Draws, FixedSource, decode
from .tiny import engine, oracle_options, tiny_model

PROMPT = [3, 1, 4, 1, 5]
FIXED: dict[str, Any] = {"block_length": 4, "random_source": "fixed", "max_new_tokens": 12}
DECODERS = ("s2d2", "ar", "static", "dynamic", "sequential", "entropy_bounded")


def answer(prompt: list[int], **options: Any) -> Generation:
    return engine().generate([prompt], {**FIXED, **options})[0]


def setting(decoder: str) -> dict[str, Any]:
    """``FIXED`` as far as ``decoder`` has these options."""
    options = {"decoder": decoder, **FIXED}
    if decoder == "ar":
        options.pop("block_length")
    if decoder == "entropy_bounded":
        options["eb_threshold"] = 1.0
    return options


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("length", [1, 4, 6])
@pytest.mark.parametrize("new", [0, 1, 4, 6])
def test_every_prompt_length_and_budget(decoder: str, length: int, new: int) -> None:
    prompt = [(5 * i + 2) % MASK for i in range(length)]
    config = engine().config({**setting(decoder), "max_new_tokens": new, "schedule": "reference"})
    expected = decode(tiny_model(), prompt, oracle_options(config), Draws(FixedSource()), mask_id=MASK)
    got = engine().generate([prompt], config)[0]
    assert got.canvas == expected.canvas
    assert got.token_ids == expected.canvas[length : length + new]
    assert got.stats["nfe"] == (new if decoder == "ar" else expected.nfe)
    assert got.stats["new_tokens"] == new == len(got.token_ids)
    assert got.finish_reason == "length"


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("where", [0, 2, 5])
def test_a_stop_token_ends_the_answer_wherever_it_falls_in_its_block(decoder: str, where: int) -> None:
    free = engine().generate([PROMPT], setting(decoder))[0]
    stop = free.token_ids[where]
    first = free.token_ids.index(stop)
    config = {**setting(decoder), "stop_token_ids": (stop,)}
    got = engine().generate([PROMPT], config)[0]
    assert got.token_ids == free.token_ids[:first]
    assert got.finish_reason == "stop"
    assert got.stats["new_tokens"] == first + 1  # the stop token was decoded too
    shown = engine().generate([PROMPT], {**config, "trim_stop_tokens": False})[0]
    assert shown.token_ids == free.token_ids[: first + 1]
    assert len(got.canvas) <= len(PROMPT) + first + 4
    assert got.stats["nfe"] <= free.stats["nfe"]


def test_a_stop_token_in_the_prompt_or_behind_the_budget_stops_nothing() -> None:
    free = answer(PROMPT, max_new_tokens=6)  # canvas: 5 + 6, filled up to 12
    assert answer([*PROMPT[:-1], 5], max_new_tokens=6, stop_token_ids=(3, 1)).finish_reason in ("length", "stop")
    behind = free.canvas[-1]
    if behind not in free.token_ids:
        got = answer(PROMPT, max_new_tokens=6, stop_token_ids=(behind,))
        assert (got.token_ids, got.finish_reason) == (free.token_ids, "length")


def test_a_stop_rule_is_asked_after_each_block_and_decides_how_much_stays() -> None:
    seen: list[tuple[int, list[int]]] = []

    def stop(index: int, new: list[int]) -> int | None:
        seen.append((index, list(new)))
        return 5 if index == 1 and len(new) >= 5 else None

    free = engine().generate([PROMPT, PROMPT[::-1]], FIXED)
    got = engine().generate([PROMPT, PROMPT[::-1]], FIXED, stop=stop)
    assert got[0].token_ids == free[0].token_ids
    assert (got[1].token_ids, got[1].finish_reason) == (free[1].token_ids[:5], "stop_string")
    assert [len(new) for index, new in seen if index == 1] == [3, 7]
    assert [len(new) for index, new in seen if index == 0] == [3, 7, 11, 15]
    assert all(new == free[index].canvas[5 : 5 + len(new)] for index, new in seen)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stop_rule_that_ends_just_before_a_stop_token_comes_first(decoder: str) -> None:
    """One token at a time the stop token would not have been decoded: it does not count, whatever the block."""
    sampled = {**setting(decoder), "random_source": "keyed", "do_sample": True, "temperature": 2.0}
    free = engine().generate([PROMPT], sampled)[0].token_ids
    first = next(place for place in range(1, 12) if free[place] not in free[:place])
    config = {**sampled, "stop_token_ids": (free[first],)}
    (got,) = engine().generate([PROMPT], config, stop=lambda _, new: first if len(new) >= first else None)
    assert (got.token_ids, got.finish_reason, got.stats["new_tokens"]) == (free[:first], "stop_string", first)


@pytest.mark.parametrize("kept", [-1, 99])
def test_a_stop_rule_cannot_keep_what_there_is_not(kept: int) -> None:
    with pytest.raises(RequestError, match=f"stop answered {kept} of "):
        engine().generate([PROMPT], FIXED, stop=lambda *_: kept)
    with pytest.raises(RequestError, match="is not a function"):
        engine().generate([PROMPT], FIXED, stop="7")  # type: ignore[arg-type]


def test_answers_come_in_order_and_are_announced_as_they_finish() -> None:
    announced: list[int] = []
    prompts = [[i + 1] for i in range(7)]
    budgets = [12, 1, 9, 2, 0, 3, 4]
    answers = engine(max_batch=2).generate(
        prompts, FIXED, max_new_tokens=budgets, on_finished=lambda i, one: announced.append(i)
    )
    assert [len(one.token_ids) for one in answers] == budgets
    assert [one.canvas[0] for one in answers] == [prompt[0] for prompt in prompts]
    assert set(announced) >= {i for i, budget in enumerate(budgets) if budget}
    assert announced.index(1) < announced.index(0)


def test_no_prompts_no_answers() -> None:
    assert engine().generate([], FIXED) == []


def test_statistics_add_up() -> None:
    got = answer(PROMPT, schedule="reference", max_new_tokens=16)
    kinds = ("prefill", "draft", "verify", "commit")
    assert got.stats["nfe"] == sum(got.stats[f"{kind}_forwards"] for kind in kinds)
    assert got.stats["tokens_per_forward"] == pytest.approx(16 / got.stats["nfe"])
    drafts = [step for step in got.steps if step.kind == "draft"]
    verifies = [step for step in got.steps if step.kind == "verify"]
    assert (got.stats["draft_forwards"], got.stats["verify_forwards"]) == (len(drafts), len(verifies))
    end = len(PROMPT) + 16
    assert got.stats["accepted"] == sum(step.marks[: end - step.start].count(1) for step in verifies)
    assert got.stats["routed"] == pytest.approx(len(verifies) / len(drafts))
    assert 0 < got.stats["acceptance"] <= 1
    rebuilt = [token for step in got.steps if MASK not in step.tokens for token in step.tokens]
    assert got.canvas == [*PROMPT[:4], *rebuilt]


BAD: list[tuple[list[list[int]], dict[str, Any], str]] = [
    ([[]], {}, "empty"),
    ([PROMPT, []], {}, "Prompt 1"),
    ([[1, MASK, 2]], {}, "mask"),
    ([[1, MASK + 1]], {}, "vocabulary"),
    ([[1, -1]], {}, "vocabulary"),
    ([[1] * 257], {"max_new_tokens": 0}, "context"),
    ([PROMPT], {"max_new_tokens": 252}, "context"),
    ([PROMPT], {"max_new_tokens": [1, 2]}, "budgets"),
    ([PROMPT], {"seeds": [1, 2]}, "seeds"),
    ([PROMPT], {"max_new_tokens": -1}, "negative"),
]


@pytest.mark.parametrize(("prompts", "arguments", "names"), BAD)
def test_a_request_that_cannot_be_decoded_is_refused_before_anything_runs(
    prompts: list[list[int]], arguments: dict[str, Any], names: str
) -> None:
    model = engine()
    model.trace.reset(keep_records=True)
    with pytest.raises(RequestError, match=names) as caught:
        model.generate(prompts, FIXED, **arguments)
    assert isinstance(caught.value, S2D2Error)
    assert caught.value.__cause__ is None
    assert not model.trace.records


def test_the_whole_context_can_be_used() -> None:
    prompt = [i % 7 for i in range(250)]
    assert len(answer(prompt, max_new_tokens=6).token_ids) == 6


@pytest.mark.parametrize("decoder", ["s2d2", "dynamic", "ar"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_no_numbers_are_refused_and_the_model_goes_on(decoder: str, do_sample: bool) -> None:
    plain = tiny_model(seed=11)
    model = load(plain, mask_token_id=MASK, block_length=4)
    config = {**setting(decoder), "do_sample": do_sample, "random_source": "keyed"}
    before = model.generate([PROMPT], config)[0]
    weight = plain.model.norm.weight.data
    kept = weight.clone()
    weight[0] = torch.nan
    with pytest.raises(NumericalError, match="not numbers"):
        model.generate([PROMPT], config)
    weight.copy_(kept)
    assert model.generate([PROMPT], config)[0].token_ids == before.token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"decoder": "s3d3"},
        {"confidence_treshold": 0.5},
        {"decoder": "dynamic", "do_verify_policy": "score_threshold"},
        {"do_verify_policy": "score_hysteresis", "hysteresis_threshold_on": 0.0, "hysteresis_threshold_off": 1.0},
        {"block_length": 4, "denoising_steps": 5},
        {"decoder": "entropy_bounded"},
        {"schedule": "lookahead", "cache_ver": False},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        engine().generate([PROMPT], options)
