"""The published entry points of Nemotron-Labs-Diffusion, Stable-DiffCoder, Tiny-A2D, I-DLM and WeDLM: recorded runs."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

import s2d2_lmeval
from s2d2_lmeval.custom_generate import idlm, nemotron, stable_diffcoder, tiny_a2d, wedlm
from s2d2_lmeval.errors import ConfigError

from .checkpoints import REPOSITORY

DATA = REPOSITORY / "tests" / "families" / "data"
ENTRY_POINTS = {
    ("nemotron_labs_diffusion", "ar_generate"): nemotron.ar_generate,
    ("nemotron_labs_diffusion", "generate"): nemotron.generate,
    ("nemotron_labs_diffusion", "linear_spec_generate"): nemotron.linear_spec_generate,
    ("stable_diffcoder", "generate_block"): stable_diffcoder.generate_block,
    ("tiny_a2d", "BD3LMSampler.sample"): tiny_a2d.sample,
    ("idlm", "IDLMPipeline.__call__"): idlm.generate,
    ("idlm", "isd_greedy_verify (ours)"): idlm.generate,
    ("wedlm", "LLM.generate"): wedlm.generate,
    ("wedlm", "generate_wedlm"): wedlm.generate_wedlm,
}
REFUSED = {"causal_context", "remasking", "stochastic_transfer", "right_shift_logits"}
EVERY = [
    (family, run)
    for family in ("nemotron_labs_diffusion", "stable_diffcoder", "tiny_a2d", "idlm", "wedlm")
    for run in map(json.loads, (DATA / family / "runs.jsonl").read_text().splitlines())
    if (family, run["fn"]) in ENTRY_POINTS and not run.get("reference_fault") and isinstance(run["prompt"][0], int)
]
RUNS = [(family, run) for family, run in EVERY if not REFUSED & run["kwargs"].keys()]


@cache
def model(family: str, adapter: str | None = None) -> s2d2_lmeval.BlockDiffusionModel:
    given: dict[str, Any] = {"mask_token_id": 96, "block_length": 8} if family == "tiny_a2d" else {}
    if adapter is not None:
        given["adapter"] = DATA / family / "checkpoint" / adapter
    return s2d2_lmeval.load(DATA / family / "checkpoint", device="cpu", **given)


def call(family: str, run: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    arguments = {name: value for name, value in run["kwargs"].items() if name != "greedy_verify"}
    if family == "tiny_a2d":
        arguments["eos_id"] = run["eos_id"]
    torch.manual_seed(run["seed"])
    function = ENTRY_POINTS[family, run["fn"]]
    engine = model(family, run.get("adapter"))
    if run["fn"] != "generate_wedlm":  # it draws nothing
        arguments["random_source"] = run["rng"]
    ids, stats = function(engine, torch.tensor([run["prompt"]]), **arguments)
    return ids[0].tolist(), stats


def test_there_are_as_many_recorded_runs_as_there_were() -> None:
    assert len(RUNS) == 93
    assert sum(bool(run["kwargs"].get("temperature", 0.2)) for _, run in RUNS) > 12


@pytest.mark.parametrize(("family", "run"), RUNS, ids=lambda value: value if isinstance(value, str) else value["name"])
def test_recorded_run(family: str, run: dict[str, Any]) -> None:
    ids, stats = call(family, run)
    padding = run["left_padding"][0] if "left_padding" in run else 0
    expected = run["output"] if run.get("output_has_prompt", True) else run["prompt"] + run["output"]
    assert ids == expected[padding:]
    assert stats["nfe"] == run["nfe"]
    if run.get("decoding_order") and "decoding_order" in stats:
        order = [sorted(place + padding for place in step) for step in stats["decoding_order"]]
        assert order == [sorted(step) for step in run["decoding_order"]]


@pytest.mark.parametrize(
    ("family", "name"), [("tiny_a2d", "T0_random_s0"), ("nemotron_labs_diffusion", "dlm_B8_full_context")]
)
def test_what_is_not_decoded_is_refused(family: str, name: str) -> None:
    run = next(run for of, run in EVERY if of == family and run["name"] == name)
    with pytest.raises(ConfigError):
        call(family, run)


@pytest.mark.parametrize("family", ["nemotron_labs_diffusion", "idlm"])
def test_batched_decoders_with_the_law_of_ar_give_its_output(family: str) -> None:
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7, 1], [61, 60, 59, 58, 57], [18, 81] * 20]
    decoder = "linear_spec" if family == "nemotron_labs_diffusion" else "strided"
    engine = model(family)
    for temperature in (0.0, 1.0) if decoder == "linear_spec" else (0.0,):
        options = {"max_new_tokens": 20, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ours = engine.generate(prompts, {**options, "decoder": decoder, "block_length": 4}, seeds=[1, 2, 3, 4])
        plain = engine.generate(prompts, {**options, "decoder": "ar"}, seeds=[1, 2, 3, 4])
        assert [one.token_ids for one in ours] == [one.token_ids for one in plain]


@pytest.mark.parametrize("budget", [0, 1, 6, 30])
def test_thoughts_end_within_their_budget(budget: int) -> None:
    """By whichever decoder: the token comes once, after that many; an end that comes by itself changes nothing."""
    ids, engine = torch.tensor([[39, 60, 39, 60, 68, 60]]), model("nemotron_labs_diffusion")
    shared = {"max_new_tokens": 16, "eos_token_id": 95, "return_stats": False}
    free = nemotron.ar_generate(engine, ids, **shared)[0, 6:].tolist()
    given = {**shared, "max_thinking_tokens": budget, "end_think_token_id": 3}
    ar = nemotron.ar_generate(engine, ids, **given)[0, 6:].tolist()
    assert ar[:budget] == free[:budget]
    assert ar == free if budget >= 16 else ar[budget] == 3
    spec = nemotron.linear_spec_generate(engine, ids, block_length=8, **given)[0, 6:].tolist()
    assert spec[:16] == ar
    blocks = nemotron.generate(engine, ids, block_length=8, **given)[0, 6:].tolist()
    assert budget >= 16 or blocks[budget] == 3
    early = {**given, "end_think_token_id": free[0], "max_thinking_tokens": max(budget, 1)}
    assert nemotron.ar_generate(engine, ids, **early)[0, 6:].tolist() == free


def test_half_a_budget_is_refused() -> None:
    for function in (nemotron.ar_generate, nemotron.generate, nemotron.linear_spec_generate):
        with pytest.raises(ConfigError, match="go together"):
            function(model("nemotron_labs_diffusion"), torch.tensor([[3]]), max_new_tokens=32, max_thinking_tokens=4)
