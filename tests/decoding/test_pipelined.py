"""Pipelined decoding on the engine: what the oracle decodes, in any batch, under any schedule, from any prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2d2_lmeval import DecodingConfig, Generation
from s2d2_lmeval.decoding import engine as engine_module
from s2d2_lmeval.errors import ConfigError, NumericalError

from ..answers import told
from .drawn import prompts
from .oracle_inputs import Result
from .oracle_loop import draws_of
from .pipelined_cases import FAMILIES, MASK, POLICIES, Case, cases, engine, engine_options, options, tiny_model
from .pipelined_oracle import PipelinedOptions, decode_pipelined
from .tiny import KeyedDraws

TARGETS = [("pipelined", "mask_span_length"), *(("s2d2", policy) for policy in POLICIES)]
QUICK = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
LONG = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def by_oracle(family: str, case: Case) -> Result:
    draws = draws_of(case.random_source, KeyedDraws(case.seed, case.request))
    model = tiny_model(family, case.model_seed)  # made before seeding: it draws, the first time
    torch.manual_seed(case.seed)
    return decode_pipelined(model, case.prompt, case.options, draws, mask_id=MASK, shifted=family == "dream")


def by_engine(family: str, case: Case, schedule: str) -> Generation:
    model = engine(family, seed=case.model_seed)
    torch.manual_seed(case.seed)
    config = {**case.config, "schedule": schedule}
    return model.generate([case.prompt], config, seeds=[case.request])[0]


def check_case(family: str, case: Case) -> None:
    expected = by_oracle(family, case)
    answer = by_engine(family, case, "reference")
    assert answer.canvas == expected.canvas
    assert answer.token_ids == expected.new_tokens(case.options.stop_token_ids, case.options.max_new_tokens)
    assert answer.decoding_order == expected.decoding_order
    kinds = (answer.stats["draft_forwards"], answer.stats["verify_forwards"], answer.stats["nfe"])
    assert kinds == (expected.forwards["draft"], expected.forwards["verify"], expected.nfe)
    fused = by_engine(family, case, "fused")
    assert (fused.token_ids, fused.finish_reason) == (answer.token_ids, answer.finish_reason)
    assert fused.stats["nfe"] <= answer.stats["nfe"]
    assert fused.decoding_order == answer.decoding_order[: len(fused.decoding_order)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=8, **QUICK)
@given(data=st.data())
def test_engine_decodes_what_the_oracle_decodes(family: str, decoder: str, policy: str, data: st.DataObject) -> None:
    check_case(family, data.draw(cases(decoder, policy)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=400, **LONG)
@given(data=st.data())
def test_engine_decodes_what_the_oracle_decodes_at_length(
    family: str, decoder: str, policy: str, data: st.DataObject
) -> None:
    check_case(family, data.draw(cases(decoder, policy)))


def check_batches(family: str, data: st.DataObject, decoder: str, policy: str, schedules: list[str]) -> None:
    config = {
        **engine_options(data.draw(options(decoder, policy)), "pipelined"),
        "random_source": data.draw(st.sampled_from(["keyed", "keyed", "fixed"])),
        "schedule": data.draw(st.sampled_from(schedules)),
        "seed": data.draw(st.integers(0, 99)),
    }
    texts = data.draw(st.lists(prompts(), min_size=2, max_size=8))
    budgets = data.draw(st.lists(st.integers(0, 20), min_size=len(texts), max_size=len(texts)))
    seeds = data.draw(st.lists(st.integers(-5, 50), min_size=len(texts), max_size=len(texts)))
    alone = [
        told(engine(family).generate([text], config, max_new_tokens=budget, seeds=[seed])[0])
        for text, budget, seed in zip(texts, budgets, seeds, strict=True)
    ]
    order = data.draw(st.permutations(range(len(texts))))
    rows = data.draw(st.integers(2, 8))
    together = engine(family, max_batch=rows).generate(
        [texts[i] for i in order],
        config,
        max_new_tokens=[budgets[i] for i in order],
        seeds=[seeds[i] for i in order],
    )
    for seat, i in enumerate(order):
        assert told(together[seat]) == alone[i]


@pytest.mark.parametrize("chunk", [512, 6])  # longer prompts prefill by themselves under the fused schedule
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("decoder", "policy"), [TARGETS[0], TARGETS[3]])
@settings(max_examples=2, **QUICK)
@given(data=st.data())
def test_a_request_decodes_the_same_alone_and_in_any_batch(
    family: str, decoder: str, policy: str, chunk: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "PREFILL_CHUNK", chunk)
        check_batches(family, data, decoder, policy, ["fused"] if chunk == 6 else ["reference", "fused"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoder", ["pipelined", "s2d2"])
def test_a_long_prompt_shares_no_forward_with_other_phases(family: str, decoder: str) -> None:
    model = engine(family, max_batch=2)
    model.trace.reset(keep_records=True)
    prompts_of = [[1, 2, 3], [4] * 7, [5] * 40, [6] * 45, [7, 8]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "PREFILL_CHUNK", 16)
        model.generate(prompts_of, {"decoder": decoder, "max_new_tokens": 12})
    prefills = [record.widths.tolist() for record in model.trace.records if record.kept.max() >= 40]
    assert [width for widths in prefills for width in widths] == [44, 49]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoder", ["pipelined", "s2d2"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 33])
def test_prompts_of_any_length(family: str, decoder: str, length: int) -> None:
    case = Case(
        PipelinedOptions(decoder=decoder, max_new_tokens=10, confidence_threshold=0.5),
        prompt=[(7 * i + 3) % MASK for i in range(length)],
        model_seed=0,
        random_source="keyed",
        seed=3,
        request=length,
    )
    check_case(family, case)
    answer = by_engine(family, case, "fused")
    assert len(answer.token_ids) == 10  # a budget that is no whole number of blocks is filled
    assert answer.finish_reason == "length"


def test_the_family_setting_is_the_default() -> None:
    model = engine("dream")
    config = model.config({})
    assert (config.decoder, config.block_length, config.confidence_threshold) == ("s2d2", 4, 0.9)
    assert (config.block_add_threshold, config.decoded_token_threshold) == (0.5, 0.8)
    assert (config.allow_resample, config.draft_confidence_threshold) == (False, 0.5)
    assert engine("llada").config({}).allow_resample
    assert model.config({"decoder": "pipelined", "skip_threshold": 0.6}).confidence_threshold == 0.6


def forced_stop(family: str) -> tuple[list[int], Generation, int]:
    """A prompt, its answer, and a token that first appears early in it."""
    prompt = [5, 9, 2, 14]
    answer = engine(family).generate([prompt], {"max_new_tokens": 24, "decoder": "pipelined"})[0]
    return prompt, answer, answer.token_ids[5]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_token_ends_the_answer_and_the_fused_schedule_saves_what_is_behind_it(family: str) -> None:
    prompt, whole, token = forced_stop(family)
    config = {"max_new_tokens": 24, "decoder": "pipelined", "stop_token_ids": [token]}
    reference = engine(family).generate([prompt], {**config, "schedule": "reference"})[0]
    fused = engine(family).generate([prompt], config)[0]
    assert reference.finish_reason == fused.finish_reason == "stop"
    assert reference.token_ids == fused.token_ids == whole.token_ids[: whole.token_ids.index(token)]
    assert fused.stats["nfe"] <= reference.stats["nfe"] < whole.stats["nfe"]
    assert MASK not in fused.canvas
    shown = engine(family).generate([prompt], {**config, "trim_stop_tokens": False})[0]
    assert shown.token_ids == [*fused.token_ids, token]


@pytest.mark.parametrize("schedule", ["reference", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_rule_is_asked_after_finished_blocks_and_ends_the_request(family: str, schedule: str) -> None:
    prompt, whole, _ = forced_stop(family)
    asked: list[list[int]] = []

    def stop(index: int, tokens: list[int]) -> int | None:
        asked.append(list(tokens))
        return 6 if len(tokens) >= 8 else None

    config = {"max_new_tokens": 24, "decoder": "pipelined", "schedule": schedule}
    answer = engine(family).generate([prompt], config, stop=stop)[0]
    assert (answer.token_ids, answer.finish_reason) == (whole.token_ids[:6], "stop_string")
    assert all(len(tokens) % 4 == 0 for tokens in asked)
    assert answer.stats["nfe"] < whole.stats["nfe"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoder", ["pipelined", "s2d2"])
def test_a_model_that_predicts_its_mask_still_ends(family: str, decoder: str) -> None:
    model = engine(family, seed=5)
    head = model.hf_model.get_output_embeddings().weight
    kept = head[MASK].clone()
    try:
        with torch.no_grad():
            head[MASK] = head[5] * 6
        config = {"max_new_tokens": 12, "decoder": decoder, "suppress_mask_token": False, "confidence_threshold": 0.5}
        answer = model.generate([[3, 1, 4, 1]], config)[0]
        case = Case(resolved(model.config(config)), [3, 1, 4, 1], 5, "keyed", 0, 0)
        assert answer.token_ids == by_oracle(family, case).new_tokens(())
        assert len(answer.token_ids) == 12
        assert MASK not in answer.token_ids
    finally:
        with torch.no_grad():
            head[MASK] = kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoder", ["pipelined", "s2d2"])
def test_logits_that_are_no_numbers_are_refused(family: str, decoder: str) -> None:
    model = engine(family, seed=6)
    head = model.hf_model.get_output_embeddings().weight
    kept = head[3].clone()
    try:
        with torch.no_grad():
            head[3] = torch.nan
        with pytest.raises(NumericalError, match="not numbers"):
            model.generate([[1, 2, 3]], {"decoder": decoder, "max_new_tokens": 8})
    finally:
        with torch.no_grad():
            head[3] = kept


def resolved(config: DecodingConfig) -> PipelinedOptions:
    """The engine's options as the oracle's."""
    known = vars(config)
    return PipelinedOptions(**{name: known[name] for name in vars(PipelinedOptions()) if name in known})


@pytest.mark.parametrize("family", FAMILIES)
def test_one_read_of_the_device_per_step_and_one_record_per_forward(family: str) -> None:
    model = engine(family, max_batch=3)
    model.trace.reset()
    answers = model.generate([[i + 1] * (3 * i + 1) for i in range(7)], {"max_new_tokens": 10, "decoder": "s2d2"})
    totals = model.trace.totals()
    assert totals["nfe"] == sum(answer.stats["nfe"] for answer in answers)
    assert totals["new_tokens"] == sum(len(answer.token_ids) for answer in answers) == 70
    assert totals["accepted"] == sum(answer.stats["accepted"] for answer in answers)
    assert totals["draft_forwards"] + totals["verify_forwards"] == totals["nfe"]
    for answer in answers:
        assert answer.stats["nfe"] == len(answer.steps)
        assert answer.stats["blocks"] == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_add_treshold": 0.5}, "block_add_threshold"),
        ({"block_add_threshold": 1.5}, "at most 1"),
        ({"decoded_token_threshold": -0.1}, "at least 0"),
        ({"target_block_size": 3}, "does not divide block_length=4"),
        ({"min_tokens_per_step": "two"}, "whole number"),
        ({"skip_threshold": 0.9, "confidence_threshold": 0.8}, "another name of confidence_threshold"),
        ({"decoder": "pipelined", "target_block_size": 2}, "option of decoder s2d2"),
        ({"decoder": "pipelined", "allow_resample": True}, "option of decoder s2d2"),
        ({"decoder": "dynamic"}, "use one of: s2d2, pipelined"),
        ({"denoising_steps": 2}, "does not apply to llada"),
        ({"cache_ver": True}, "does not apply to llada"),
        ({"remasking_strategy": "sequential"}, "does not apply to llada"),
        ({"ucb_beta": 2.0}, "does not apply to llada"),
        ({"do_verify_policy": "contextual_bandit_ucb"}, "one block at a time"),
        ({"schedule": "lookahead"}, "lookahead"),
        ({"decoder": "pipelined", "schedule": "lookahead"}, "lookahead"),
    ],
)
def test_bad_options_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine("llada").generate([[1, 2, 3]], {"max_new_tokens": 8, **wrong})
