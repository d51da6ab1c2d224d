"""Token editing as such: what is edited and when, stops, batches, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2d2_lmeval import DecodingConfig, Generation, load
from s2d2_lmeval.decoding.generation import EDITED
from s2d2_lmeval.errors import ConfigError

from ..answers import told
from .drawn import MASK, prompts
from .editing_oracle import decode
from .editing_tiny import TARGETS, engine, engine_config, options, oracle_options, tiny_model
from .oracle_inputs import Draws, FixedSource

BUSY = {
    "block_length": 8,
    "max_new_tokens": 32,
    "editing_threshold": 0.3,
    "confidence_threshold": 0.5,
    "do_verify_policy": "mask_span_length",
}
PROMPT = [1, 2, 3, 4, 5]


def run(seed: int = 0, prompt: list[int] = PROMPT, **given: Any) -> Generation:
    names = dict(BUSY) if given.get("decoder") == "s2d2" else {k: v for k, v in BUSY.items() if "policy" not in k}
    return engine(seed).generate([prompt], {**names, **given}, seeds=[7])[0]


def edits(answer: Generation) -> list[tuple[int, int, int]]:
    """(position, old, new) of every edit."""
    return [
        (step.start + i, step.before[i], step.tokens[i])
        for step in answer.steps
        for i, mark in enumerate(step.marks)
        if mark == EDITED
    ]


@pytest.mark.parametrize("decoder", ["editing", "s2d2"])
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_tokens_are_edited_to_what_was_drafted_and_only_in_the_open_block(decoder: str, seed: int) -> None:
    answer = run(seed, decoder=decoder, max_post_steps=3)
    made = edits(answer)
    assert len(made) > 10
    assert all(position >= len(PROMPT) and old != new and MASK not in (old, new) for position, old, new in made)
    for step in answer.steps:
        for i, mark in enumerate(step.marks):
            assert mark != EDITED or step.kind == "draft"
            if step.before[i] != MASK and step.kind == "verify":
                assert step.tokens[i] == step.before[i]
    assert answer.canvas[: len(PROMPT)] == PROMPT
    published = [tuple(edit) for entry in answer.decoding_order for edit in entry["edit"]]
    assert published == made


def test_a_threshold_of_one_edits_nothing() -> None:
    for decoder in ("editing", "s2d2"):
        assert edits(run(decoder=decoder, editing_threshold=1.0, max_post_steps=5)) == []


@pytest.mark.parametrize("decoder", ["editing", "s2d2"])
def test_post_steps_go_on_until_nothing_changes_or_none_is_left(decoder: str) -> None:
    ends = set()
    for seed in (0, 3):
        for most in (0, 1, 4):
            answer = run(seed, decoder=decoder, max_post_steps=most)
            drafts = [step for step in answer.steps if step.kind == "draft"]
            starts = sorted({step.start for step in drafts})
            for start in starts:
                after = [s for s in drafts if s.start == start and MASK not in s.before]
                idle = [EDITED not in step.marks for step in after]
                assert len(after) <= most
                assert not any(idle[:-1])
                assert len(after) == most or idle[-1]
                ends.add("settled" if idle and idle[-1] else "cut off")
            assert answer.stats["draft_forwards"] == len(drafts)
    assert ends == {"settled", "cut off"}


def test_num_to_transfer_decides_that_many_masks_in_every_step() -> None:
    for decoder in ("editing", "s2d2"):
        answer = run(decoder=decoder, num_to_transfer=3, confidence_threshold=1.0, editing_threshold=1.0)
        for entry, step in zip(answer.decoding_order, [s for s in answer.steps if s.kind == "draft"], strict=True):
            assert len(entry["unmask"]) >= min(3, step.before.count(MASK))
    assert run(num_to_transfer=8, decoder="editing", editing_threshold=1.0).stats["draft_forwards"] == 5


@pytest.mark.parametrize("decoder", ["editing", "s2d2"])
def test_a_stop_token_ends_the_answer_or_only_cuts_it(decoder: str) -> None:
    whole = run(decoder=decoder)
    assert whole.finish_reason == "length"
    stop = whole.canvas[12]
    place = whole.token_ids.index(stop)
    early = run(decoder=decoder, stop_token_ids=[stop])
    late = run(decoder=decoder, stop_token_ids=[stop], eos_early_stop=False)
    assert early.token_ids == late.token_ids == whole.token_ids[:place]
    assert early.finish_reason == late.finish_reason == "stop"
    assert late.canvas == whole.canvas
    assert early.canvas == whole.canvas[: len(early.canvas)]
    assert len(early.canvas) < len(whole.canvas)
    assert early.stats["nfe"] < late.stats["nfe"] == whole.stats["nfe"]
    kept = run(decoder=decoder, stop_token_ids=[stop], eos_early_stop=False, trim_stop_tokens=False)
    assert kept.token_ids == whole.token_ids[: place + 1]


def test_the_first_cut_counts_where_decoding_goes_on_behind_a_stop_token() -> None:
    whole = run(decoder="editing").token_ids
    config = {**BUSY, "decoder": "editing", "stop_token_ids": [whole[9]], "eos_early_stop": False}
    config.pop("do_verify_policy")

    def stop(index: int, tokens: list[int]) -> int | None:
        return 25 if len(tokens) > 20 else None

    answer = engine().generate([PROMPT], config, seeds=[7], stop=stop)[0]
    assert answer.token_ids == whole[: whole.index(whole[9])]
    assert answer.finish_reason == "stop"
    assert len(answer.canvas) < len(PROMPT) + 32  # the stop string did end it


@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_an_answer_does_not_depend_on_its_batch(decoder: str, policy: str | None, data: st.DataObject) -> None:
    config = engine_config(
        data.draw(options(decoder, policy)),
        random_source=data.draw(st.sampled_from(["keyed", "fixed"])),
        schedule=data.draw(st.sampled_from(["reference", "fused"])),
    )
    texts = data.draw(st.lists(prompts(), min_size=2, max_size=6))
    budgets = data.draw(st.lists(st.integers(0, 14), min_size=len(texts), max_size=len(texts)))
    seeds = data.draw(st.lists(st.integers(-5, 50), min_size=len(texts), max_size=len(texts)))
    alone = [
        told(engine().generate([text], config, max_new_tokens=budget, seeds=[seed])[0])
        for text, budget, seed in zip(texts, budgets, seeds, strict=True)
    ]
    for rows in (2, 8):
        together = engine(max_batch=rows).generate(texts, config, max_new_tokens=budgets, seeds=seeds)
        assert [told(answer) for answer in together] == alone


@pytest.mark.parametrize("decoder", ["editing", "s2d2"])
def test_long_prompts_decode_the_same_in_chunks(decoder: str) -> None:
    prompt = [(7 * i + i // 5) % MASK for i in range(1030)]
    reference, fused = (run(prompt=prompt, decoder=decoder, schedule=name) for name in ("reference", "fused"))
    assert fused.canvas == reference.canvas
    assert fused.decoding_order == reference.decoding_order
    assert reference.stats["prefill_forwards"] == 1


@pytest.mark.parametrize("decoder", ["editing", "s2d2"])
def test_a_model_that_keeps_predicting_the_mask_comes_to_an_end(decoder: str) -> None:
    model = tiny_model.__wrapped__(seed=1)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 3 * model.lm_head.weight.abs().amax(0)
    stubborn = load(model, mask_token_id=MASK, block_length=4)
    config = engine_config(
        oracle_options(DecodingConfig(decoder=decoder, block_length=4, max_new_tokens=9, temperature=0.0)),
        random_source="fixed",
        suppress_mask_token=False,
        editing_threshold=0.1,
        max_post_steps=2,
        schedule="reference",
    )
    answer = stubborn.generate([PROMPT], config)[0]
    expected = decode(model, PROMPT, oracle_options(config), Draws(FixedSource()), mask_id=MASK)
    assert answer.canvas == expected.canvas
    assert MASK not in answer.canvas
    assert answer.stats["nfe"] == expected.nfe


def test_ar_decodes_editing_checkpoints_too() -> None:
    answer = engine().generate([PROMPT], {"decoder": "ar", "max_new_tokens": 9})[0]
    assert len(answer.token_ids) == 9
    assert engine().score([(PROMPT, answer.token_ids)])[0][1]


def test_the_family_decodes_by_its_published_setting() -> None:
    config = engine().config()
    assert (config.decoder, config.confidence_threshold, config.editing_threshold) == ("s2d2", 0.7, 0.5)
    assert (config.max_post_steps, config.num_to_transfer, config.eos_early_stop) == (0, 1, True)
    assert engine().config({"decoder": "editing"}).editing_threshold == 0.5
    assert "definition" in engine().config({"decoder": "editing"}).promise


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decoder": "static"}, "does not fit llada2"),
        ({"decoder": "dynamic"}, "does not fit llada2"),
        ({"decoder": "editing", "do_verify_policy": "score_threshold"}, "option of decoder s2d2"),
        ({"decoder": "ar", "editing_threshold": 0.3}, "editing_threshold is an option of"),
        ({"cache_ver": True}, "cache_ver does not apply to llada2"),
        ({"draft_ver": True}, "draft_ver does not apply to llada2"),
        ({"denoising_steps": 2}, "denoising_steps does not apply to llada2"),
        ({"allow_resample": False}, "allow_resample does not apply to llada2"),
        ({"small_block_size": 2}, "small_block_size does not apply to llada2"),
        ({"remasking_strategy": "sequential"}, "remasking_strategy does not apply to llada2"),
        ({"schedule": "lookahead"}, "use schedule=fused"),
        ({"editing_treshold": 0.3}, "Did you mean editing_threshold"),
        ({"editing_threshold": -0.1}, "editing_threshold=-0.1 is too small"),
        ({"editing_threshold": "high"}, "editing_threshold='high' is not of the right type"),
        ({"max_post_steps": -1}, "max_post_steps=-1 is too small"),
        ({"max_post_steps": 1.5}, "max_post_steps=1.5 is not of the right type"),
        ({"num_to_transfer": 0}, "num_to_transfer=0 is too small"),
        ({"eos_early_stop": "maybe"}, "takes true or false"),
    ],
)
def test_bad_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine().generate([PROMPT], given)


@pytest.mark.parametrize("name", ["cache_ver", "always_check_high_confidence"])
def test_a_complete_configuration_of_another_scheme_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} does not apply to llada2"):
        engine().generate([PROMPT], DecodingConfig(**{name: True}))


def test_the_options_of_a_configuration_can_be_given_again() -> None:
    for decoder in ("editing", "s2d2", "ar"):
        config = engine().config({"decoder": decoder, "max_new_tokens": 5})
        assert engine().config(config.to_dict()) == config
