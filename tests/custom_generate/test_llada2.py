"""The published LLaDA2 entry points: recorded runs of the published code, call and return conventions, arguments."""

from __future__ import annotations

import copy
import inspect
import json
from functools import cache
from typing import Any

import pytest
import torch
from transformers import Glm4MoeForCausalLM

import s2d2_lmeval
from s2d2_lmeval.custom_generate import llada2
from s2d2_lmeval.errors import ConfigError, RequestError

from .checkpoints import DATA, MASK, REPOSITORY

CHECKPOINT = REPOSITORY / "tests" / "families" / "data" / "llada2" / "checkpoint"
RUNS = [json.loads(line) for line in (DATA / "llada2_goldens.jsonl").read_text().splitlines()]
ENTRY_POINTS = {"generate_cached": llada2.generate_cached, "generate_ssd_policy": llada2.generate_ssd_policy}
PROMPT = torch.tensor([[62, 88, 46, 88, 47, 49, 60, 15, 71, 78, 41, 26, 15]])
SHORT = {"gen_length": 12, "block_length": 8, "random_source": "fixed", "threshold": 0.5, "max_post_steps": 1}


@cache
def model() -> s2d2_lmeval.BlockDiffusionModel:
    return s2d2_lmeval.load(CHECKPOINT, device="cpu")


@cache
def native() -> Glm4MoeForCausalLM:
    """A plain transformers model with the checkpoint's weights."""
    config = copy.deepcopy(model().hf_model.config)
    config._attn_implementation = "sdpa"
    plain = Glm4MoeForCausalLM(config)
    plain.load_state_dict(model().hf_model.state_dict())
    return plain.eval()


def test_there_are_as_many_recorded_runs_as_there_were() -> None:
    assert len(RUNS) == 38
    assert sum(run["rng"] == "fixed" for run in RUNS) == 18
    assert sum(bool(entry["edit"]) for run in RUNS for entry in run["decoding_order"]) > 500


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_recorded_run(run: dict[str, Any]) -> None:
    call = dict(run["kwargs"])
    if run["fn"] == "generate":
        # The published function without a cache: a forward per draft, which is what the fused schedule takes.
        call["schedule"] = "fused"
    torch.manual_seed(run["seed"])
    ids, stats = ENTRY_POINTS.get(run["fn"], llada2.generate_cached)(
        model(),
        torch.tensor([run["prompt"]]),
        mask_id=MASK,
        record_decoding_order=True,
        random_source=run["rng"],
        **call,
    )
    assert ids.tolist() == [run["output"]]
    assert stats["nfe"] == run["nfe"]
    assert json.loads(json.dumps(stats["decoding_order"])) == run["decoding_order"]


@pytest.mark.parametrize("name", ["generate_cached_sample", "ssd_torch_sample", "ssd_torch_hyst", "ssd_det_L16_eos"])
def test_fused_schedule_and_a_transformers_model_give_the_same_ids(name: str) -> None:
    run = next(run for run in RUNS if run["name"] == name)
    plain = native()  # its random initialisation draws
    torch.manual_seed(run["seed"])
    ids = ENTRY_POINTS[run["fn"]](
        plain,
        torch.tensor([run["prompt"]]),
        mask_id=MASK,
        schedule="fused",
        return_stats=False,
        random_source=run["rng"],
        **run["kwargs"],
    )
    assert ids.tolist() == [run["output"]]


@pytest.mark.parametrize("entry_point", ENTRY_POINTS.values())
def test_what_comes_back(entry_point: Any) -> None:
    ids, stats = entry_point(model(), PROMPT, **SHORT)
    assert ids.shape == (1, 25)
    assert ids.dtype == torch.long
    assert torch.equal(ids[:, : PROMPT.shape[1]], PROMPT)
    assert set(stats) == {"nfe"}
    alone = entry_point(model(), PROMPT, return_stats=False, **SHORT)
    assert torch.equal(alone, ids)
    _, told = entry_point(model(), PROMPT, record_decoding_order=True, **SHORT)
    assert set(told) == {"nfe", "decoding_order"}
    assert all(set(entry) == {"edit", "unmask"} for entry in told["decoding_order"])


@pytest.mark.parametrize("entry_point", ENTRY_POINTS.values())
def test_the_answer_ends_with_the_end_token_within_the_length(entry_point: Any) -> None:
    whole = entry_point(model(), PROMPT, return_stats=False, **SHORT)[0].tolist()
    end = whole[-1]
    first = whole.index(end, PROMPT.shape[1])
    for early in (False, True):
        ids = entry_point(model(), PROMPT, eos_id=end, eos_early_stop=early, return_stats=False, **SHORT)
        assert ids[0].tolist() == whole[: first + 1]
    nowhere = entry_point(model(), PROMPT, eos_id=None, return_stats=False, **SHORT)
    assert nowhere[0].tolist() == whole


@pytest.mark.parametrize("entry_point", ENTRY_POINTS.values())
def test_max_gen_toks_wins_over_gen_length(entry_point: Any) -> None:
    assert entry_point(model(), PROMPT, max_gen_toks=3, return_stats=False, **SHORT).shape == (1, 16)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS.values())
def test_what_a_harness_hands_to_every_model_has_no_effect(entry_point: Any) -> None:
    plain = entry_point(model(), PROMPT, return_stats=False, **SHORT)
    busy = entry_point(
        model(),
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        use_cache=True,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=1,
        stopping_criteria=[],
        max_length=99,
        until=["\n"],
        tokenizer=object(),
        return_stats=False,
        **SHORT,
    )
    assert torch.equal(plain, busy)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS.values())
def test_samples_at_temperature_zero_are_a_contradiction(entry_point: Any) -> None:
    with pytest.raises(ConfigError, match="do_sample=true contradicts temperature=0"):
        entry_point(model(), PROMPT, do_sample=True, **SHORT)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS.values())
def test_the_temperature_alone_says_whether_to_sample(entry_point: Any) -> None:
    call = {**SHORT, "random_source": "torch", "threshold": 0.9, "return_stats": False, "do_sample": False}
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        answers.add(tuple(entry_point(model(), PROMPT, temperature=1.5, **call)[0].tolist()))
    assert len(answers) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"editing_treshold": 0.5}, "editing_threshold"),
        ({"cache_ver": True}, "cache_ver does not apply to llada2"),
        ({"num_to_transfer": 0}, "too small"),
        ({"max_post_steps": -1}, "too small"),
        ({"temperature": -1.0}, "too small"),
        ({"top_p": 1.5}, "too large"),
        ({"block_length": 0}, "too small"),
        ({"random_source": "numpy"}, "random_source"),
        ({"schedule": "lookahead"}, "fused"),
    ],
)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS.values())
def test_bad_options_are_refused(entry_point: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        entry_point(model(), PROMPT, **{"gen_length": 8, **options})


def test_an_option_of_the_other_entry_point_is_refused() -> None:
    with pytest.raises(ConfigError, match="do_verify_policy"):
        llada2.generate_cached(model(), PROMPT, do_verify_policy="score_threshold")


@pytest.mark.parametrize("entry_point", ENTRY_POINTS.values())
def test_requests_that_cannot_be_decoded_are_refused(entry_point: Any) -> None:
    for prompt, message in (
        (PROMPT.repeat(2, 1), "one prompt"),
        (PROMPT[:, :0], "empty"),
        (torch.tensor([[1, MASK, 2]]), "mask"),
    ):
        with pytest.raises(RequestError, match=message):
            entry_point(model(), prompt, gen_length=8)
    with pytest.raises(RequestError, match="mask_id=95"):
        entry_point(model(), PROMPT, gen_length=8, mask_id=95)
    with pytest.raises(RequestError, match="context"):
        entry_point(model(), PROMPT)  # the published default of 2048 new tokens


PUBLISHED_DEFAULTS = {
    "eos_id": 156892,
    "gen_length": 2048,
    "max_gen_toks": None,
    "block_length": 32,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "threshold": 0.95,
    "editing_threshold": 0.9,
    "max_post_steps": 16,
    "num_to_transfer": 1,
    "eos_early_stop": False,
    "record_decoding_order": False,
    "return_stats": True,
}
PUBLISHED_ROUTING_DEFAULTS = {
    "min_ssd_span_length": 1,
    "legacy_ssd_span_strategy": False,
    "ssd_ratio_tempering_factor": 1.0,
    "do_verify_policy": "mask_span_length",
    "do_verify_score_threshold": 0.0,
    "hysteresis_threshold_on": 0.0,
    "hysteresis_threshold_off": -1.0,
    "do_verify_score_type": "difference_dynamic",
    "score_penalty_coef": 2.0,
    "token_acceptance_estimator": "hard_margin_threshold",
    "ssd_confidence_margin_threshold": 0.05,
    "ssd_entropy_temperature": 1.0,
}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("generate_cached", PUBLISHED_DEFAULTS),
        ("generate_ssd_policy", {**PUBLISHED_DEFAULTS, **PUBLISHED_ROUTING_DEFAULTS}),
    ],
)
def test_arguments_and_defaults_are_the_published_ones(name: str, published: dict[str, Any]) -> None:
    parameters = inspect.signature(getattr(llada2, name)).parameters
    own = {"model", "input_ids", "mask_id", "random_source", "schedule", "kwargs"}
    assert {key: value.default for key, value in parameters.items() if key not in own} == published
    assert parameters["random_source"].default == "torch"
    assert parameters["schedule"].default == "reference"
