"""The published entry points of DFlash and DDTree."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from custom_generate.ddtree import ddtree_generate, dflash_generate
from s2d2_lmeval import load
from s2d2_lmeval.errors import ConfigError, RequestError

DATA = Path(__file__).parents[1] / "decoding" / "data" / "ddtree"
RUNS = [run for run in json.loads(gzip.decompress((DATA / "runs.json.gz").read_bytes())) if run["method"] != "ar"]
CHOSEN = [run for run in RUNS if run["budget"] in (None, 16, 64) and len(run["prompt"]) in (9, 17)]
MASK, NEW = 63, 20


@pytest.fixture(scope="module")
def target() -> Any:
    return Qwen3ForCausalLM.from_pretrained(DATA / "target").eval()


@pytest.mark.parametrize("run", CHOSEN, ids=lambda run: f"{run['method']}-{run['budget']}-{run['temperature']}")
def test_published_arguments_give_the_published_answer(target: Any, run: dict[str, Any]) -> None:
    if run["seed"] is not None:
        torch.manual_seed(run["seed"])
    arguments = {"mask_token_id": MASK, "block_size": 8, "stop_token_ids": [62], "temperature": run["temperature"]}
    function = dflash_generate
    if run["method"] == "ddtree":
        function, arguments["tree_budget"] = ddtree_generate, run["budget"]
    prompt = torch.tensor([run["prompt"]])
    answer = function(model=target, input_ids=prompt, max_new_tokens=NEW, draft=DATA / "draft", **arguments)
    assert answer.output_ids.tolist() == [run["prompt"] + run["new"][:NEW]]
    assert (answer.num_input_tokens, answer.num_output_tokens) == (len(run["prompt"]), NEW)
    assert answer.acceptance_lengths == run["lengths"][: len(answer.acceptance_lengths)]
    assert sum(answer.acceptance_lengths) >= NEW
    assert answer.stats["rounds"] == len(answer.acceptance_lengths)


def test_a_stop_token_is_part_of_the_answer_and_ends_it() -> None:
    model = load(DATA / "target", draft=DATA / "draft")
    run = CHOSEN[0]
    stop = run["new"][6]
    whole = run["new"][: run["new"].index(stop) + 1]
    for function in (dflash_generate, ddtree_generate):
        answer = function(model, torch.tensor([run["prompt"]]), max_new_tokens=NEW, stop_token_ids=[stop])
        assert answer.output_ids[0, len(run["prompt"]) :].tolist() == whole


def test_a_block_of_one_drafts_nothing() -> None:
    model = load(DATA / "target", draft=DATA / "draft")
    answer = ddtree_generate(model, torch.tensor([CHOSEN[0]["prompt"]]), max_new_tokens=5, block_size=1)
    assert answer.acceptance_lengths == [1] * 4
    assert answer.stats["drafter_forwards"] == 0


def test_refusals(target: Any) -> None:
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(ConfigError, match="a drafter is needed"):
        dflash_generate(target, prompt)
    with pytest.raises(ConfigError, match="not the drafter's"):
        dflash_generate(target, prompt, mask_token_id=5, draft=DATA / "draft")
    with pytest.raises(ConfigError, match=r"not a decoding option. Did you mean tree_budget"):
        ddtree_generate(target, prompt, draft=DATA / "draft", tree_budgets=4)
    with pytest.raises(RequestError, match="one prompt"):
        dflash_generate(target, prompt.repeat(2, 1), draft=DATA / "draft")
    with pytest.raises(ConfigError, match="has no drafter"):
        dflash_generate(load(DATA / "target"), prompt)
