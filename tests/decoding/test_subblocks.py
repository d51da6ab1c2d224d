"""Sub-blocks in a batch: schedules, seats, the block cache, where an answer ends, and what may be asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2d2_lmeval import DecodingConfig, load
from s2d2_lmeval.errors import ConfigError, NumericalError

from .oracle_inputs import Draws, FixedSource
from .subblocks_drawn import MASK, Case, cases, engine, shifted_model
from .subblocks_oracle import SubblockOptions, SubblockOracle
from .test_batching import told
from .test_subblocks_against_oracle import TARGETS
from .tiny import engine as unshifted_engine

PROMPT = [3, 1, 4, 1, 5]
SMALL: dict[str, Any] = {
    "block_length": 4,
    "small_block_size": 2,
    "confidence_threshold": 0.5,
    "random_source": "fixed",
    "max_new_tokens": 12,
}


def setting(decoder: str, **others: Any) -> dict[str, Any]:
    """``SMALL`` as far as ``decoder`` has these options."""
    options = {"decoder": decoder, **SMALL, **others}
    if decoder == "ar":
        options = {name: value for name, value in options.items() if name in DecodingConfig(decoder="ar").to_dict()}
        options.pop("block_length", None)
    return options


def text(length: int) -> list[int]:
    return [(5 * i + i // 3 + 2) % MASK for i in range(length)]


# schedules


@pytest.mark.parametrize("decoder", ["s2d2", "dynamic"])
@pytest.mark.parametrize("length", [3, 4, 9])
@pytest.mark.parametrize("beyond", [0, 1])
def test_fused_schedule_saves_the_last_commit_and_a_prefill_that_can_ride(
    decoder: str, length: int, beyond: int
) -> None:
    budget = 12 - length % 4 + beyond  # to the end of a block, or to the first token of the next
    runs = {
        schedule: engine(seed=1).generate([text(length)], setting(decoder, schedule=schedule, max_new_tokens=budget))[0]
        for schedule in ("reference", "fused")
    }
    reference, fused = runs["reference"], runs["fused"]
    assert fused.token_ids == reference.token_ids
    assert len(fused.token_ids) == budget
    rides = length > 4 and length % 4 > 0
    assert reference.stats["prefill_forwards"] == (length >= 4)
    assert fused.stats["prefill_forwards"] == (length >= 4 and not rides)
    assert reference.stats["commit_forwards"] == 3
    assert fused.stats["commit_forwards"] == 2 + beyond
    assert fused.stats["nfe"] == reference.stats["nfe"] - rides - (1 - beyond)


def test_fused_schedule_ends_with_the_last_token_that_is_asked_for() -> None:
    reference, fused = (
        engine().generate([PROMPT], setting("dynamic", schedule=schedule, block_length=8, max_new_tokens=1))[0]
        for schedule in ("reference", "fused")
    )
    assert fused.token_ids == reference.token_ids
    assert fused.stats["commit_forwards"] == 0
    assert fused.stats["draft_forwards"] < reference.stats["draft_forwards"]


@pytest.mark.parametrize("length", [512, 519])
def test_prompts_longer_than_a_chunk_decode_the_same(length: int) -> None:
    model = load(shifted_model(context=1024), family="fast_dllm_v2", mask_token_id=MASK, block_length=8)
    for decoder in ("s2d2", "ar"):
        reference, fused = (
            model.generate([text(length)], setting(decoder, schedule=schedule, block_length=8))[0]
            for schedule in ("reference", "fused")
        )
        assert fused.token_ids == reference.token_ids


# batches


def check_batch(data: st.DataObject, decoder: str, policy: str | None) -> None:
    case: Case = data.draw(cases(decoder, policy))
    source = data.draw(st.sampled_from(["keyed", "fixed"]))
    schedule = data.draw(st.sampled_from(["reference", "fused"]))
    config = engine().config(case.engine_options(random_source=source, schedule=schedule))
    texts = data.draw(st.lists(st.lists(st.integers(0, MASK - 1), min_size=1, max_size=20), min_size=2, max_size=7))
    budgets = data.draw(st.lists(st.integers(0, 14), min_size=len(texts), max_size=len(texts)))
    alone = [
        told(engine().generate([prompt], config, max_new_tokens=budget, seeds=[seed])[0])
        for seed, (prompt, budget) in enumerate(zip(texts, budgets, strict=True))
    ]
    order = data.draw(st.permutations(range(len(texts))))
    together = engine(max_batch=data.draw(st.integers(2, 7))).generate(
        [texts[i] for i in order], config, max_new_tokens=[budgets[i] for i in order], seeds=list(order)
    )
    assert [told(answer) for answer in together] == [alone[i] for i in order]


@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_request_decodes_the_same_alone_and_in_any_batch(
    decoder: str, policy: str | None, data: st.DataObject
) -> None:
    check_batch(data, decoder, policy)


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_request_decodes_the_same_alone_and_in_any_batch_at_length(
    decoder: str, policy: str | None, data: st.DataObject
) -> None:
    check_batch(data, decoder, policy)


@pytest.mark.parametrize("decoder", ["s2d2", "dynamic", "ar"])
def test_the_device_is_read_once_a_step(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine(max_batch=3)
    reads = []
    copied = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        reads.append(tensor.shape)
        return copied(tensor)

    def refused(tensor: torch.Tensor) -> None:
        raise AssertionError("a value was read from the device in passing")

    config = model.config(setting(decoder, random_source="keyed", use_block_cache=True))
    model.trace.reset(keep_records=True)
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    model.generate([text(length) for length in (3, 8, 11, 5)], config)
    assert len(reads) == len(model.trace.records)


# the block cache


@pytest.mark.parametrize("decoder", ["s2d2", "dynamic"])
@pytest.mark.parametrize("length", [1, 13])
def test_the_block_cache_changes_nothing_where_keys_do_not_depend_on_the_rest_of_the_block(
    decoder: str, length: int
) -> None:
    options = setting(decoder, block_length=8, max_new_tokens=24, min_ssd_span_length=2)
    if decoder == "dynamic":
        options.pop("min_ssd_span_length")
    for layers, part in ((1, 2), (2, 8)):  # keys of a single layer know only their own token; or there is no rest
        answers = [
            engine(seed=3, layers=layers).generate(
                [text(length)], {**options, "small_block_size": part, "use_block_cache": cached, "schedule": schedule}
            )[0]
            for cached in (False, True)
            for schedule in ("reference", "fused")
        ]
        assert len({tuple(answer.token_ids) for answer in answers}) == 1
        assert answers[0].stats["nfe"] == answers[2].stats["nfe"]


def test_with_the_block_cache_most_drafts_forward_the_sub_block_alone() -> None:
    model = engine(seed=3)
    widths = {}
    for cached in (False, True):
        model.trace.reset(keep_records=True)
        options = setting("dynamic", block_length=8, small_block_size=4, confidence_threshold=1.0, max_new_tokens=16)
        model.generate([text(8)], {**options, "use_block_cache": cached, "schedule": "fused"})
        records = [record for record in model.trace.records if record.kinds == ("draft",)]
        widths[cached] = [int(record.widths[0]) for record in records]
        assert sum(int(record.kept[0]) for record in model.trace.records) == 16  # what was lent is given back
    # 3 masks in a block's first sub-block (whole, then alone), 4 in its second (whole till its first token is there)
    assert widths[False] == [8] * 14
    assert widths[True].count(4) > 6
    assert widths[True][:3] == [8, 4, 4]


# where an answer begins and ends


@pytest.mark.parametrize("decoder", ["s2d2", "dynamic", "ar"])
@pytest.mark.parametrize("length", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("new", [0, 1, 7])
def test_every_prompt_length_and_budget(decoder: str, length: int, new: int) -> None:
    fixed = SubblockOptions(
        decoder=decoder, block_length=4, small_block_size=2, confidence_threshold=0.5, max_new_tokens=new
    )
    oracle = SubblockOracle(shifted_model(), fixed, Draws(FixedSource()), MASK)
    expected = oracle.run(text(length))
    options = {"max_new_tokens": new, "schedule": "reference", "temperature": 1.0}
    if decoder == "s2d2":
        options["do_verify_policy"] = "mask_span_length"
    answer = engine().generate([text(length)], setting(decoder, **options))[0]
    assert answer.token_ids == oracle.new_tokens()
    assert answer.canvas == expected.canvas
    assert answer.stats["nfe"] == expected.nfe
    assert answer.stats["new_tokens"] == new == len(answer.token_ids)
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("decoder", ["s2d2", "dynamic", "ar"])
@pytest.mark.parametrize("where", [0, 3, 8])
def test_a_stop_token_ends_the_answer_as_soon_as_no_mask_is_before_it(decoder: str, where: int) -> None:
    free = engine(seed=1).generate([PROMPT], setting(decoder))[0]
    stop = free.token_ids[where]
    first = free.token_ids.index(stop)
    config = setting(decoder, stop_token_ids=(stop,))
    got = engine(seed=1).generate([PROMPT], config)[0]
    assert got.token_ids == free.token_ids[:first]
    assert got.finish_reason == "stop"
    assert got.stats["new_tokens"] == first + 1
    assert got.canvas == [*PROMPT, *free.token_ids[: first + 1]]
    assert got.stats["nfe"] <= free.stats["nfe"]
    shown = engine(seed=1).generate([PROMPT], {**config, "trim_stop_tokens": False})[0]
    assert shown.token_ids == free.token_ids[: first + 1]


def test_a_stop_token_in_the_prompt_stops_nothing() -> None:
    free = engine().generate([PROMPT], setting("dynamic"))[0]
    inside = next(token for token in range(MASK) if token not in free.token_ids)
    free = engine().generate([[*PROMPT, inside]], setting("dynamic"))[0]
    got = engine().generate([[*PROMPT, inside]], setting("dynamic", stop_token_ids=(inside,)))[0]
    assert got.finish_reason == ("stop" if inside in free.token_ids else "length")
    assert len(got.token_ids) > 0


def test_a_stop_rule_is_asked_after_each_sub_block_and_decides_how_much_stays() -> None:
    seen: list[tuple[int, list[int]]] = []

    def stop(index: int, new: list[int]) -> int | None:
        seen.append((index, list(new)))
        return 4 if index == 1 and len(new) >= 5 else None

    prompts = [PROMPT, PROMPT[::-1]]
    free = engine().generate(prompts, setting("s2d2"))
    got = engine().generate(prompts, setting("s2d2"), stop=stop)
    assert got[0].token_ids == free[0].token_ids
    assert (got[1].token_ids, got[1].finish_reason) == (free[1].token_ids[:4], "stop_string")
    assert [len(new) for index, new in seen if index == 1] == [1, 3, 5]
    assert got[1].stats["nfe"] < free[1].stats["nfe"]


def test_the_autoregressive_decoder_takes_one_forward_per_token() -> None:
    plain, tokens = shifted_model(seed=1), list(PROMPT)
    for _ in range(9):
        logits = plain(input_ids=torch.tensor([tokens])).logits[0, -1]
        logits[MASK] = -torch.inf
        tokens.append(int(logits.argmax()))
    for schedule in ("reference", "fused"):
        answer = engine(seed=1).generate([PROMPT], setting("ar", max_new_tokens=9, schedule=schedule))[0]
        assert answer.canvas == tokens
        assert answer.stats["nfe"] == 9


def test_statistics_add_up() -> None:
    config = setting("s2d2", do_verify_policy="mask_span_length", schedule="reference")
    got = engine().generate([PROMPT], config)[0]
    kinds = ("prefill", "draft", "verify", "commit")
    assert got.stats["nfe"] == sum(got.stats[f"{kind}_forwards"] for kind in kinds)
    assert [step.kind for step in got.steps].count("commit") == got.stats["commit_forwards"] == 3
    verifies = [step for step in got.steps if step.kind == "verify"]
    assert got.stats["verify_forwards"] == len(verifies)
    assert got.stats["accepted"] == sum(step.marks.count(1) for step in verifies)
    assert got.stats["blocks"] == 3


# what may be asked for


def test_the_family_setting_is_the_default_and_its_sub_blocks_divide_every_block() -> None:
    assert engine().config().small_block_size == 4
    assert engine().config().do_verify_policy == "score_hysteresis"
    for length in (1, 2, 3, 6, 7, 32):
        config = engine().config({"block_length": length})
        assert config.small_block_size is not None
        assert length % config.small_block_size == 0
    assert engine().config({"decoder": "ar"}).small_block_size is None


@pytest.mark.parametrize(
    "options",
    [
        {"small_block_size": 3, "block_length": 8},
        {"small_block_size": 0},
        {"decoder": "static"},
        {"decoder": "ar", "small_block_size": 4},
        {"decoder": "dynamic", "do_verify_policy": "score_threshold"},
        {"use_block_cache": True, "draft_ver": True},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        engine().generate([PROMPT], {"max_new_tokens": 8, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"denoising_steps": 4},
        {"remasking_strategy": "sequential"},
        {"ssd_ratio_threshold": 0.5},
        {"always_check_high_confidence": True},
        {"schedule": "lookahead", "cache_ver": True, "draft_ver": True},
    ],
)
def test_options_of_other_schemes_are_refused(options: dict[str, Any]) -> None:
    complete = DecodingConfig(**{"max_new_tokens": 8, "block_length": 8, **options})
    for config in ({"max_new_tokens": 8, **options}, complete):
        with pytest.raises(ConfigError, match=next(iter(options))):
            engine().generate([PROMPT], config)


@pytest.mark.parametrize("options", [{"small_block_size": 2}, {"use_block_cache": True}, {"sample_first_token": True}])
def test_sub_blocks_are_refused_where_a_model_has_none(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        unshifted_engine().generate([PROMPT], options)


@pytest.mark.parametrize("decoder", ["s2d2", "dynamic", "ar"])
@pytest.mark.parametrize("length", [3, 4])
def test_logits_that_are_no_numbers_are_refused_and_the_model_goes_on(decoder: str, length: int) -> None:
    plain = shifted_model(seed=11)
    model = load(plain, family="fast_dllm_v2", mask_token_id=MASK, block_length=8)
    before = model.generate([text(length)], setting(decoder))[0]
    weight = plain.model.norm.weight.data
    kept = weight.clone()
    weight[0] = torch.nan
    with pytest.raises(NumericalError, match="not numbers"):
        model.generate([text(length)], setting(decoder))
    weight.copy_(kept)
    assert model.generate([text(length)], setting(decoder))[0].token_ids == before.token_ids
    assert np.all(np.array(before.token_ids) != MASK)
