"""The published Fast-dLLM v2 entry points: recorded runs of the published code, call and return conventions."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM
from transformers.generation import GenerateDecoderOnlyOutput

import s2d2_lmeval
from s2d2_lmeval.custom_generate import fast_dllm_v2
from s2d2_lmeval.custom_generate.fast_dllm_v2 import generate, generate_ssd_policy
from s2d2_lmeval.errors import ConfigError, RequestError

REPOSITORY = Path(__file__).parents[2]
CHECKPOINT = REPOSITORY / "tests" / "families" / "data" / "fast_dllm_v2" / "checkpoint"
GOLDENS = REPOSITORY / "tests" / "decoding" / "data" / "fast_dllm_v2_goldens.jsonl"
RUNS = [json.loads(line) for line in GOLDENS.read_text().splitlines()]
ENTRY_POINTS = [generate, generate_ssd_policy]
MASK = 96
PROMPT = torch.tensor([[2, 30, 56, 52, 84, 22, 28, 24, 33, 2, 26, 41, 51]])
SMALL: dict[str, Any] = {"block_size": 8, "small_block_size": 4, "threshold": 0.5, "random_source": "fixed"}


@cache
def model() -> s2d2_lmeval.BlockDiffusionModel:
    return s2d2_lmeval.load(CHECKPOINT)


@cache
def native() -> Qwen2ForCausalLM:
    """A plain transformers model with the checkpoint's weights."""
    config = copy.deepcopy(model().hf_model.config)
    config._attn_implementation = "sdpa"
    plain = Qwen2ForCausalLM(config)
    plain.load_state_dict(model().hf_model.state_dict())
    return plain.eval()


def test_there_are_as_many_recorded_runs_as_there_were() -> None:
    assert len(RUNS) == 67
    assert sum(run["kwargs"].get("use_block_cache", False) for run in RUNS) == 6
    assert sum(run["rng"] == "fixed" for run in RUNS) == 28


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_recorded_run(run: dict[str, Any]) -> None:
    torch.manual_seed(run["seed"])
    ids, stats = getattr(fast_dllm_v2, run["fn"])(
        model(),
        torch.tensor([run["prompt"]]),
        mask_id=MASK,
        return_decoding_order=True,
        random_source=run["rng"],
        **run["kwargs"],
    )
    assert ids.tolist() == [run["output"]]
    assert stats["total_forward_steps"] == run["nfe"]
    assert stats["decoding_order"] == run["decoding_order"]


@pytest.mark.parametrize("run", [run for run in RUNS if run["rng"] == "torch"][::9], ids=lambda run: run["name"])
def test_fused_schedule_and_a_transformers_model_give_the_same_ids(run: dict[str, Any]) -> None:
    plain = native()  # its random initialisation draws
    torch.manual_seed(run["seed"])
    fused = getattr(fast_dllm_v2, run["fn"])(
        plain, torch.tensor([run["prompt"]]), mask_id=MASK, schedule="fused", **run["kwargs"]
    )
    assert fused.tolist() == [run["output"]]


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_prompt_of_exactly_one_block_is_not_lost(entry_point: Any) -> None:
    prompt = torch.tensor([RUNS[0]["prompt"][:16]])
    call = {**SMALL, "block_size": 16, "max_new_tokens": 16, "return_decoding_order": True}
    ids, stats = entry_point(model(), prompt, **call)
    other, _ = entry_point(model(), prompt.flip(1), **call)
    assert ids.shape == (1, 33)
    assert ids[0, 16:].tolist() != other[0, 16:].tolist()
    assert stats["decoding_order"][0] == [-16.5]


@pytest.mark.parametrize(("length", "budget", "new"), [(13, 24, 20), (16, 24, 25), (5, 15, 4), (5, 7, 0), (16, 7, 1)])
def test_whole_blocks_are_decoded_and_the_token_behind_them(length: int, budget: int, new: int) -> None:
    prompt = torch.tensor([RUNS[0]["prompt"][:length]])
    assert generate(model(), prompt, max_new_tokens=budget, **SMALL).shape == (1, length + new)
    assert generate(model(), prompt, max_new_tokens=1, max_gen_toks=budget, **SMALL).shape == (1, length + new)
    assert generate(model(), prompt, max_length=length + budget, **SMALL).shape == (1, length + new)


def test_the_stop_token_is_part_of_the_answer() -> None:
    free = generate(model(), PROMPT, max_new_tokens=24, **SMALL)[0].tolist()
    stop = free[19]
    cut = generate(model(), PROMPT, max_new_tokens=24, stop_token=stop, **SMALL)[0].tolist()
    assert cut == free[: free.index(stop, 13) + 1]


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_return_conventions(entry_point: Any) -> None:
    ids = entry_point(model(), PROMPT, max_new_tokens=8, **SMALL)
    assert isinstance(ids, torch.Tensor)
    assert ids.dtype == torch.long
    assert torch.equal(ids[:, :13], PROMPT)
    out = entry_point(model(), PROMPT, max_new_tokens=8, return_dict_in_generate=True, **SMALL)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert torch.equal(out.sequences, ids)
    pair = entry_point(model(), PROMPT, max_new_tokens=8, return_decoding_order=True, **SMALL)
    assert torch.equal(pair[0], ids)
    assert set(pair[1]) == {"decoding_order", "total_forward_steps"}


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_what_a_harness_hands_to_every_model_has_no_effect(entry_point: Any) -> None:
    plain = entry_point(model(), PROMPT, max_new_tokens=8, **SMALL)
    busy = entry_point(
        model(),
        input_ids=PROMPT,
        max_gen_toks=8,
        attention_mask=torch.ones_like(PROMPT),
        do_sample=False,
        use_cache=True,
        use_attention_mask=True,
        pad_token_id=0,
        eos_token_id=1,
        stopping_criteria=[],
        until=["\n"],
        tokenizer=object(),
        **SMALL,
    )
    assert torch.equal(plain, busy)


def test_the_verifier_is_filtered_at_temperature_zero_and_the_draft_is_not() -> None:
    call = {**SMALL, "max_new_tokens": 40, "random_source": "torch"}
    answers = []
    for top_p in (1.0, 0.3):
        torch.manual_seed(1)
        answers.append(generate_ssd_policy(model(), PROMPT, top_p=top_p, **call))
    assert not torch.equal(*answers)
    assert torch.equal(*(generate(model(), PROMPT, top_p=top_p, **call) for top_p in (1.0, 0.3)))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"treshold": 1}, "confidence_threshold|threshold"),
        ({"max_new_tokens": None}, "max_new_tokens"),
        ({"small_block_size": 3}, "small_block_size=3 does not divide"),
        ({"small_block_size": 0}, "small_block_size=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"output_scores": True}, "output_scores"),
        ({"random_source": "numpy"}, "random_source"),
        ({"schedule": "lookahead", "cache_ver": True, "draft_ver": True}, "lookahead"),
        ({"remasking_strategy": "sequential"}, "remasking_strategy"),
        ({"denoising_steps": 2}, "denoising_steps"),
    ],
)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_bad_options_are_refused(entry_point: Any, options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        entry_point(model(), PROMPT, **{**SMALL, "max_new_tokens": 8, **options})


def test_options_of_the_verifier_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="do_verify_policy"):
        generate(model(), PROMPT, max_new_tokens=8, do_verify_policy="score_threshold")
    with pytest.raises(ConfigError, match="use_ssd_cache"):
        generate_ssd_policy(model(), PROMPT, max_new_tokens=8, use_block_cache=True, use_ssd_cache=True)
    with pytest.raises(ConfigError, match="draft_ver"):
        generate_ssd_policy(model(), PROMPT, max_new_tokens=8, use_block_cache=True, draft_ver=True)
    with pytest.raises(ConfigError, match="hysteresis"):
        generate_ssd_policy(
            model(), PROMPT, max_new_tokens=8, do_verify_policy="score_hysteresis", hysteresis_threshold_on=-2.0
        )


def test_requests_that_cannot_be_decoded_are_refused() -> None:
    for entry_point in ENTRY_POINTS:
        with pytest.raises(RequestError, match="one prompt"):
            entry_point(model(), PROMPT.repeat(2, 1), max_new_tokens=8)
        with pytest.raises(RequestError, match="empty"):
            entry_point(model(), PROMPT[:, :0], max_new_tokens=32)
        with pytest.raises(RequestError, match="mask"):
            entry_point(model(), torch.tensor([[1, MASK, 2]]), max_new_tokens=32)
        with pytest.raises(RequestError, match="context"):
            entry_point(model(), PROMPT, max_new_tokens=100_000)
        with pytest.raises(RequestError, match="mask_id=95"):
            entry_point(model(), PROMPT, mask_id=95, max_new_tokens=8)


def test_a_model_that_predicts_its_mask_still_ends() -> None:
    plain = copy.deepcopy(native())
    with torch.no_grad():
        plain.lm_head.weight[MASK] = plain.lm_head.weight[91] * 6
    for entry_point in ENTRY_POINTS:
        ids = entry_point(plain, PROMPT, mask_id=MASK, max_new_tokens=16, **SMALL)
        assert ids.shape == (1, 25)
        assert MASK not in ids[0].tolist()


def test_the_file_can_be_loaded_by_its_path() -> None:
    path = REPOSITORY / "custom_generate" / "fast_dllm_v2.py"
    spec = importlib.util.spec_from_file_location("loaded_by_path", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.generate(model(), PROMPT, max_new_tokens=8, **SMALL).shape == (1, 17)


PUBLISHED_DEFAULTS = {
    "max_new_tokens": None,
    "max_gen_toks": None,
    "max_length": None,
    "tokenizer": None,
    "threshold": 1.0,
    "small_block_size": 8,
    "block_size": 32,
    "stop_token": 151645,
    "stopping_criteria": None,
    "top_p": 0.95,
    "temperature": 0.0,
    "use_block_cache": False,
    "return_decoding_order": False,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_hidden_states": False,
    "use_attention_mask": False,
}
PUBLISHED_ROUTING_DEFAULTS = {
    "use_ssd_cache": False,
    "ssd_ratio_tempering_factor": 1.0,
    "min_ssd_span_length": 1,
    "allow_resample": True,
    "cache_ver": False,
    "draft_ver": False,
    "do_verify_policy": "mask_span_length",
    "do_verify_score_threshold": 0.0,
    "hysteresis_threshold_on": 0.0,
    "hysteresis_threshold_off": -1.0,
    "token_acceptance_estimator": "hard_margin_threshold",
    "ssd_confidence_margin_threshold": 0.05,
    "ssd_entropy_temperature": 1.0,
    "ucb_beta": 1.0,
    "ucb_span_length_bins": 2,
    "ucb_block_progress_bins": 2,
    "ucb_entropy_bins": 2,
    "ucb_entropy_source": "span",
    "do_verify_score_type": "difference_dynamic",
    "score_penalty_coef": 2.0,
}


@pytest.mark.parametrize(
    ("entry_point", "defaults"),
    [(generate, PUBLISHED_DEFAULTS), (generate_ssd_policy, {**PUBLISHED_DEFAULTS, **PUBLISHED_ROUTING_DEFAULTS})],
)
def test_the_published_arguments_have_their_published_defaults(entry_point: Any, defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(entry_point).parameters
    assert list(parameters)[:2] == ["model", "input_ids"]
    assert {name: parameters[name].default for name in defaults} == defaults
    assert parameters["random_source"].default == "torch"
    assert parameters["schedule"].default == "reference"
