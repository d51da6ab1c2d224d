"""The published SDAR entry points: recorded runs of the published code, call and return conventions, arguments."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from functools import cache
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

import s2d2_lmeval
from s2d2_lmeval.custom_generate import sdar
from s2d2_lmeval.errors import ConfigError, RequestError

from .checkpoints import MASK, REPOSITORY, SDAR, recorded_runs

RUNS = recorded_runs()
ENTRY_POINTS = {
    "generate": sdar.block_diffusion_generate_baseline,
    "generate_ssd_policy": sdar.block_diffusion_generate,
}
PROMPT = torch.tensor([[62, 88, 46, 88, 47, 49, 60, 15, 71, 78, 41, 26, 15]])


def decoded(*arguments: Any, **options: Any) -> torch.Tensor:
    """Ids alone, of the S2D2 entry point."""
    ids = sdar.block_diffusion_generate(*arguments, **options)
    assert isinstance(ids, torch.Tensor)
    return ids


@cache
def model() -> s2d2_lmeval.BlockDiffusionModel:
    return s2d2_lmeval.load(SDAR)


def native(dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """A plain transformers model with the checkpoint's weights."""
    config = copy.deepcopy(model().hf_model.config)
    config._attn_implementation = "sdpa"
    plain = Qwen3ForCausalLM(config)
    plain.load_state_dict(model().hf_model.state_dict())
    return plain.eval().to(dtype)


def test_there_are_as_many_recorded_runs_as_there_were() -> None:
    assert len(RUNS) == 123
    assert sum(run["rng"] == "fixed" for run in RUNS) == 59


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_recorded_run(run: dict[str, Any]) -> None:
    torch.manual_seed(run["seed"])
    ids, stats = ENTRY_POINTS[run["fn"]](
        model(),
        torch.tensor([run["prompt"]]),
        mask_id=MASK,
        return_forward_stats=True,
        random_source=run["rng"],
        **run["kwargs"],
    )
    assert ids.tolist() == [run["output"]]
    assert stats["total_forward_steps"] == run["nfe"]
    assert stats["decoding_order"] == run["decoding_order"]


@pytest.mark.parametrize("run", [run for run in RUNS if run["rng"] == "torch"][::9], ids=lambda run: run["name"])
def test_fused_schedule_and_a_transformers_model_give_the_same_ids(run: dict[str, Any]) -> None:
    plain = native_model()  # its random initialisation draws
    torch.manual_seed(run["seed"])
    fused = ENTRY_POINTS[run["fn"]](plain, torch.tensor([run["prompt"]]), schedule="fused", **run["kwargs"])
    assert isinstance(fused, torch.Tensor)
    assert fused.tolist() == [run["output"]]


@cache
def native_model() -> Qwen3ForCausalLM:
    return native()


def test_a_transformers_model_shares_its_weights_and_stays_as_it_is() -> None:
    plain = native()
    before = {name: value.data_ptr() for name, value in plain.named_parameters()}
    attention = plain.config._attn_implementation
    expected = plain(input_ids=PROMPT).logits
    first = decoded(plain, PROMPT, gen_length=8, block_length=4, denoising_steps=4)
    assert {name: value.data_ptr() for name, value in plain.named_parameters()} == before
    assert plain.config._attn_implementation == attention
    assert torch.equal(plain(input_ids=PROMPT).logits, expected)
    with torch.no_grad():
        plain.lm_head.weight.mul_(-1)  # in place: the next call must see it
    second = decoded(plain, PROMPT, gen_length=8, block_length=4, denoising_steps=4)
    assert not torch.equal(first, second)


def test_ids_alone_without_the_statistics_flag_and_on_the_device_of_the_prompt() -> None:
    ids = decoded(model(), PROMPT, gen_length=5, block_length=4, denoising_steps=4)
    assert ids.shape == (1, 20)
    assert ids.dtype == torch.long
    assert torch.equal(ids[:, : PROMPT.shape[1]], PROMPT)


def test_max_gen_toks_wins_over_gen_length() -> None:
    call: dict[str, Any] = {"block_length": 4, "denoising_steps": 4, "random_source": "fixed"}
    short = decoded(model(), PROMPT, gen_length=40, max_gen_toks=3, **call)
    assert short.shape == (1, 16)


def test_more_steps_than_tokens_are_as_many_steps_as_tokens() -> None:
    answers = [
        decoded(model(), PROMPT, gen_length=12, block_length=4, denoising_steps=steps, random_source="fixed").tolist()
        for steps in (4, 8)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("entry_point", list(ENTRY_POINTS.values()))
def test_what_a_harness_hands_to_every_model_has_no_effect(entry_point: Any) -> None:
    call = {"gen_length": 8, "block_length": 4, "denoising_steps": 4, "random_source": "fixed"}
    plain = entry_point(model(), PROMPT, **call)
    busy = entry_point(
        model(),
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        use_cache=True,
        pad_token_id=0,
        eos_token_id=1,
        stopping_criteria=[],
        max_length=99,
        until=["\n"],
        tokenizer=object(),
        **call,
    )
    assert torch.equal(plain, busy)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("confidence_treshold", "confidence_threshold"),
        ("do_verify_polcy", "do_verify_policy"),
        ("min_span_length", "min_ssd_span_length"),
        ("blocklength", "block_length"),
    ],
)
def test_a_misspelt_option_is_refused_by_name(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"{wrong}.*{nearest}"):
        decoded(model(), PROMPT, **{wrong: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"remasking_strategy": "low_confidence"},
        {"remasking_strategy": "entropy_bounded"},  # needs eb_threshold
        {"block_length": 0},
        {"denoising_steps": 0},
        {"temperature": -1.0},
        {"random_source": "numpy"},
    ],
)
@pytest.mark.parametrize("entry_point", list(ENTRY_POINTS.values()))
def test_options_out_of_range_are_refused(entry_point: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        entry_point(model(), PROMPT, **options)


def test_what_is_not_returned_is_refused() -> None:
    with pytest.raises(ConfigError, match="logprobs: published functions return ids and counts"):
        sdar.block_diffusion_generate(s2d2_lmeval.load("toy"), torch.tensor([[1, 2, 3]]), logprobs=True)


def test_an_option_of_the_other_entry_point_is_refused() -> None:
    with pytest.raises(ConfigError, match="do_verify_policy"):
        sdar.block_diffusion_generate_baseline(model(), PROMPT, do_verify_policy="score_threshold")


def test_requests_that_cannot_be_decoded_are_refused() -> None:
    with pytest.raises(RequestError, match="one prompt"):
        decoded(model(), PROMPT.repeat(2, 1))
    with pytest.raises(RequestError, match="empty"):
        decoded(model(), PROMPT[:, :0])
    with pytest.raises(RequestError, match="mask"):
        decoded(model(), torch.tensor([[1, MASK, 2]]))
    with pytest.raises(RequestError, match="context"):
        decoded(model(), PROMPT, gen_length=100_000)
    with pytest.raises(RequestError, match="mask_id=95"):
        decoded(model(), PROMPT, mask_id=95)


class Counting:
    """A source of the caller's own, in the published order of draws."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def uniform(self, n: int) -> torch.Tensor:
        self.calls.append(("uniform", n))
        return torch.rand(n)

    def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
        self.calls.append(("categorical", len(probabilities)))
        return torch.multinomial(probabilities, 1)[:, 0]


def test_an_own_random_source_draws_in_the_order_of_torch() -> None:
    call: dict[str, Any] = {"gen_length": 24, "block_length": 8, "do_sample": True, "confidence_threshold": 0.5}
    torch.manual_seed(3)
    by_torch = decoded(model(), PROMPT, **call)
    source = Counting()
    torch.manual_seed(3)
    assert torch.equal(decoded(model(), PROMPT, random_source=source, **call), by_torch)
    assert source.calls[:2] == [("categorical", 8), ("uniform", 3)]  # the whole block, then the span
    assert ("categorical", 1) in source.calls  # a replacement


def test_keyed_randomness_needs_no_generator() -> None:
    call: dict[str, Any] = {"gen_length": 24, "block_length": 4, "denoising_steps": 4, "random_source": "keyed"}
    first = decoded(model(), PROMPT, **call)
    torch.rand(5)
    assert torch.equal(decoded(model(), PROMPT, **call), first)


def test_a_model_that_predicts_its_mask_still_ends() -> None:
    plain = native()
    with torch.no_grad():
        plain.lm_head.weight[MASK] = plain.lm_head.weight[5] * 6
    for entry_point in ENTRY_POINTS.values():
        ids = entry_point(plain, PROMPT, gen_length=8, block_length=4, denoising_steps=4, random_source="fixed")
        assert MASK not in ids[0].tolist()


def test_the_file_can_be_loaded_by_its_path() -> None:
    path = REPOSITORY / "custom_generate" / "sdar.py"
    spec = importlib.util.spec_from_file_location("loaded_by_path", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ids = module.block_diffusion_generate(model(), PROMPT, gen_length=4, block_length=4, denoising_steps=4)
    assert ids.shape == (1, 20)


PUBLISHED_DEFAULTS = {
    "attention_mask": None,
    "gen_length": 128,
    "max_gen_toks": None,
    "block_length": 8,
    "denoising_steps": 8,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": 0.85,
    "eb_threshold": None,
    "stopping_criteria_idx": None,
    "return_forward_stats": False,
    "do_sample": False,
    "trim_stop_tokens": True,
}
PUBLISHED_ROUTING_DEFAULTS = {
    "cache_ver": False,
    "draft_ver": False,
    "min_ssd_span_length": 1,
    "ssd_ratio_tempering_factor": 1.0,
    "ssd_ratio_threshold": -1.0,
    "ssd_threshold_all_spans": False,
    "always_check_high_confidence": False,
    "legacy_ssd_span_strategy": False,
    "allow_resample": True,
    "do_verify_policy": "mask_span_length",
    "do_verify_score_threshold": -1.0,
    "hysteresis_threshold_on": 0.0,
    "hysteresis_threshold_off": -1.0,
    "token_acceptance_estimator": "hard_margin_threshold",
    "ssd_confidence_margin_threshold": 0.05,
    "ssd_confidence_power": 1.0,
    "ssd_entropy_threshold": 0.5,
    "ssd_confidence_margin_coef": 1.0,
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
    [
        (sdar.block_diffusion_generate, {**PUBLISHED_DEFAULTS, **PUBLISHED_ROUTING_DEFAULTS}),
        (sdar.block_diffusion_generate_baseline, PUBLISHED_DEFAULTS),
    ],
)
def test_the_published_arguments_have_their_published_defaults(entry_point: Any, defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(entry_point).parameters
    by_position = [name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert by_position == ["model", "input_ids", "attention_mask", "mask_id", *list(defaults)[1:]]
    assert {name: parameters[name].default for name in defaults} == defaults
    assert parameters["random_source"].default == "torch"
    assert parameters["schedule"].default == "reference"
