"""The sub-block oracle writes what the published code wrote: recorded runs, ids, forwards and decoding order."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from s2d2_lmeval.families import load_checkpoint

from .oracle_inputs import Draws, FixedSource, TorchSource
from .subblocks_oracle import SubblockOptions, SubblockOracle, published_budget
from .tiny import DATA

CHECKPOINT = Path(__file__).parents[1] / "families" / "data" / "fast_dllm_v2" / "checkpoint"
RUNS = [json.loads(line) for line in (DATA / "fast_dllm_v2_goldens.jsonl").read_text().splitlines()]
FEW = ("base_L32", "base_SB4_bc1_th0.5_am0", "base_sample", "ssd_det_noresample", "ssd_torch_SB4_ucb")


@cache
def model() -> Qwen2ForCausalLM:
    """The checkpoint on transformers' own attention."""
    loaded, _ = load_checkpoint(CHECKPOINT)
    config = copy.deepcopy(loaded.config)
    config._attn_implementation = "sdpa"
    plain = Qwen2ForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    return plain.eval()


def options(run: dict[str, Any]) -> SubblockOptions:
    """Published arguments as options."""
    given = {"block_size": 32, "small_block_size": 8, "threshold": 1.0, "top_p": 0.95, "temperature": 0.0}
    given |= {name: value for name, value in run["kwargs"].items() if name != "use_attention_mask"}
    block, temperature = given.pop("block_size"), given.pop("temperature")
    budget = published_budget(len(run["prompt"]), given.pop("max_new_tokens"), block)
    return SubblockOptions(
        decoder="dynamic" if run["fn"] == "generate" else "s2d2",
        block_length=block,
        max_new_tokens=budget,
        confidence_threshold=given.pop("threshold"),
        stop_token_ids=(given.pop("stop_token"),),
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        suppress_mask_token=False,
        **given,
    )


def check(run: dict[str, Any]) -> None:
    plain = model()  # its random initialisation draws
    torch.manual_seed(run["seed"])
    source = TorchSource() if run["rng"] == "torch" else FixedSource()
    oracle = SubblockOracle(plain, options(run), Draws(source), 96)
    result = oracle.run(run["prompt"])
    assert run["prompt"] + oracle.new_tokens() == run["output"]
    assert result.nfe == run["nfe"]
    assert result.decoding_order == run["decoding_order"]


@pytest.mark.parametrize("run", [run for run in RUNS if run["name"] in FEW], ids=lambda run: run["name"])
def test_recorded_run(run: dict[str, Any]) -> None:
    check(run)


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in RUNS if run["name"] not in FEW], ids=lambda run: run["name"])
def test_every_other_recorded_run(run: dict[str, Any]) -> None:
    check(run)
