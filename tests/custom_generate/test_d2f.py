"""The published D2F entry points: recorded runs of the published code, call and return conventions, arguments."""

from __future__ import annotations

import inspect
import json
from functools import cache
from typing import Any

import pytest
import torch

import s2d2_lmeval
from s2d2_lmeval.custom_generate import d2f
from s2d2_lmeval.errors import ConfigError, RequestError

from .checkpoints import DATA, MASK, REPOSITORY

FAMILIES = ("llada", "dream")
RUNS = [json.loads(line) for name in FAMILIES for line in (DATA / f"d2f_{name}_goldens.jsonl").read_text().splitlines()]
PROMPT = torch.tensor([[15, 78, 85, 37, 67, 57, 8, 26, 53, 24, 75, 22, 25]])
CALL: dict[str, Any] = {"max_length": 160, "max_new_tokens": 16, "block_size": 8, "mask_token_id": MASK}


@cache
def model(name: str = "llada") -> s2d2_lmeval.BlockDiffusionModel:
    # The loading tests keep the checkpoints that the recorded runs were made with.
    return s2d2_lmeval.load(REPOSITORY / "tests" / "families" / "data" / name / "checkpoint")


def call(run: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(run["seed"])
    arguments = {"random_source": run["rng"], **run["kwargs"], **options}
    return getattr(d2f, run["fn"])(model(run["kwargs"]["model_type"]), torch.tensor([run["prompt"]]), **arguments)


def test_there_are_as_many_recorded_runs_as_there_were() -> None:
    assert len(RUNS) == 46
    assert sum(run["rng"] == "fixed" for run in RUNS) == 18


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_recorded_run(run: dict[str, Any]) -> None:
    ids, stats = call(run, return_forward_stats=True)
    assert ids.tolist() == run["output"]
    assert stats.pop("decoding_order") == run["decoding_order"]
    assert {str(block): count for block, count in stats.pop("per_block_forwards").items()} == run["stats"].pop(
        "per_block_forwards"
    )
    assert stats == run["stats"]


@pytest.mark.parametrize("run", RUNS[::7], ids=lambda run: run["name"])
def test_fused_schedule_gives_the_same_ids(run: dict[str, Any]) -> None:
    assert call(run, schedule="fused").tolist() == run["output"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_transformers_model_shares_its_weights_and_stays_as_it_is(name: str) -> None:
    native = model(name).hf_model
    plain = type(native)._from_config(type(native.config).from_dict(native.config.to_dict()), dtype=torch.float32)
    plain.load_state_dict(native.state_dict())
    plain.eval().set_attn_implementation("sdpa")
    expected = plain(input_ids=PROMPT).logits
    options = {**CALL, "model_type": name, "random_source": "fixed"}
    for entry_point in (d2f.generate_block_single, d2f.generate_block_speculative):
        assert torch.equal(entry_point(plain, PROMPT, **options), entry_point(model(name), PROMPT, **options))
    assert torch.equal(plain(input_ids=PROMPT).logits, expected)


def test_new_ids_alone_or_with_the_prompt() -> None:
    ids = d2f.generate_block_single(model(), PROMPT, **CALL)
    assert isinstance(ids, torch.Tensor)
    assert (ids.shape, ids.dtype) == ((16,), torch.long)
    whole = d2f.generate_block_single(model(), PROMPT, include_prompt=True, **CALL)
    assert torch.equal(whole, torch.cat([PROMPT, ids[None]], dim=1))


@pytest.mark.parametrize(
    ("limits", "length"),
    [
        ({"max_new_tokens": 23}, 16),
        ({"max_new_tokens": 7}, 0),
        ({"max_length": 13 + 16}, 16),
        ({"max_length": 13 + 15}, 8),
        ({"max_length": 5}, 0),
        ({"max_gen_toks": 24}, 24),
    ],
)
def test_only_whole_blocks_within_both_limits(limits: dict[str, int], length: int) -> None:
    for entry_point in (d2f.generate_block_single, d2f.generate_block_speculative):
        ids, stats = entry_point(model(), PROMPT, return_forward_stats=True, **{**CALL, **limits})
        assert ids.shape == (length,)
        assert (stats["total_forwards"] == 0) == (length == 0)


@pytest.mark.parametrize("entry_point", [d2f.generate_block_single, d2f.generate_block_speculative])
def test_what_a_harness_hands_over_is_taken_and_has_no_effect(entry_point: Any) -> None:
    options = {**CALL, "random_source": "fixed"}
    busy = entry_point(
        model(),
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        use_cache=True,
        pad_token_id=0,
        do_sample=False,
        until=["\n"],
        device="cpu",
        dtype=torch.float16,
        **options,
    )
    assert torch.equal(busy, entry_point(model(), PROMPT, **options))


def test_several_stop_tokens() -> None:
    whole = d2f.generate_block_single(model(), PROMPT, **CALL).tolist()
    first = d2f.generate_block_single(model(), PROMPT, eos_token_id=[whole[-1], whole[3]], **CALL).tolist()
    assert first == whole[: min(whole.index(whole[-1]), whole.index(whole[3]))]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"skip_treshold": 0.5}, "skip_treshold.*skip_threshold"),
        ({"block_add_threshold": 2.0}, "block_add_threshold"),
        ({"block_size": 0}, "block_length"),
        ({"temperature": -1.0}, "temperature"),
        ({"random_source": "numpy"}, "numpy"),
        ({"shift_logits": True}, "shift_logits"),
        ({"model_type": "dream"}, "model_type=llada"),
        ({"remasking_strategy": "sequential"}, "remasking_strategy"),
    ],
)
@pytest.mark.parametrize("entry_point", [d2f.generate_block_single, d2f.generate_block_speculative])
def test_bad_arguments_are_refused(entry_point: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        entry_point(model(), PROMPT, **{**CALL, **wrong})


def test_arguments_of_the_verifier_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="target_block_size"):
        d2f.generate_block_single(model(), PROMPT, target_block_size=2, **CALL)
    with pytest.raises(ConfigError, match="target_block_size=3"):
        d2f.generate_block_speculative(model(), PROMPT, target_block_size=3, **CALL)
    with pytest.raises(ConfigError, match="must be equal"):
        d2f.generate_block_speculative(model(), PROMPT, cache_ver=True, **CALL)
    both = d2f.generate_block_speculative(model(), PROMPT, cache_ver=True, draft_ver=True, **CALL)
    assert both.shape == (16,)


def test_requests_that_cannot_be_decoded_are_refused() -> None:
    with pytest.raises(RequestError, match="one prompt"):
        d2f.generate_block_single(model(), PROMPT.repeat(2, 1), **CALL)
    with pytest.raises(RequestError, match="mask"):
        d2f.generate_block_single(model(), torch.tensor([[1, MASK]]), **CALL)
    with pytest.raises(RequestError, match="mask_id=95"):
        d2f.generate_block_single(model(), PROMPT, **{**CALL, "mask_token_id": 95})
    with pytest.raises(RequestError, match="context"):
        d2f.generate_block_single(model(), PROMPT, **{**CALL, "max_length": 9999, "max_new_tokens": 9000})


PUBLISHED_DEFAULTS = {
    "model_type": "llada",
    "eos_token_id": None,
    "device": None,
    "dtype": None,
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "block_add_threshold": 0.1,
    "decoded_token_threshold": 0.5,
    "skip_threshold": 0.9,
    "margin_confidence": False,
    "neg_entropy": False,
    "shift_logits": None,
    "return_forward_stats": False,
}
PUBLISHED_VERIFIER_DEFAULTS = {
    "draft_confidence_threshold": None,
    "verify_confidence_threshold": None,
    "min_tokens_per_step": 1,
    "target_block_size": 1,
    "ssd_partial_ar_span": 0,
    "ssd_threshold_draft_confidence": False,
    "ssd_ratio_tempering_factor": 1.0,
    "min_ssd_span_length": 1,
    "cache_ver": False,
    "draft_ver": False,
    "allow_resample": True,
}


@pytest.mark.parametrize(
    ("entry_point", "defaults"),
    [
        (d2f.generate_block_single, PUBLISHED_DEFAULTS),
        (d2f.generate_block_speculative, {**PUBLISHED_DEFAULTS, **PUBLISHED_VERIFIER_DEFAULTS}),
    ],
)
def test_the_published_arguments_have_their_published_defaults(entry_point: Any, defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(entry_point).parameters
    assert list(parameters)[:6] == [
        "model",
        "input_ids",
        "max_length",
        "max_new_tokens",
        "block_size",
        "mask_token_id",
    ]
    assert {name: parameters[name].default for name in defaults} == defaults
    assert parameters["random_source"].default == "torch"
    assert parameters["schedule"].default == "reference"
