"""The oracle of pipelined decoding answers as the published code did, on every recorded run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from s2d2_lmeval.families import load_checkpoint

from .oracle_inputs import Draws, FixedSource, TorchSource
from .pipelined_cases import CHECKPOINTS, FAMILIES, RECORDED_MASK, recorded_runs
from .pipelined_oracle import PipelinedOptions, decode_pipelined

RUNS = [(family, run) for family in FAMILIES for run in recorded_runs(family)]
NOT_DECODING = ("max_length", "mask_token_id", "model_type", "dtype", "block_size", "skip_threshold", "eos_token_id")


@cache
def plain(family: str) -> PreTrainedModel:
    model, _ = load_checkpoint(CHECKPOINTS[family], device="cpu")
    model.set_attn_implementation("sdpa")
    return model


def test_there_are_as_many_recorded_runs_as_there_were() -> None:
    assert [sum(name == family for name, _ in RUNS) for family in FAMILIES] == [23, 23]


@pytest.mark.parametrize(("family", "run"), RUNS, ids=lambda value: value if isinstance(value, str) else value["name"])
def test_recorded_run(family: str, run: dict[str, Any]) -> None:
    given = run["kwargs"]
    options = PipelinedOptions(
        decoder="pipelined" if run["fn"] == "generate_block_single" else "s2d2",
        block_length=given["block_size"],
        confidence_threshold=given["skip_threshold"],
        stop_token_ids=(given["eos_token_id"],),
        do_sample=given.get("temperature", 0.0) > 0,
        nucleus_first=True,
        suppress_mask_token=False,
        **{name: value for name, value in given.items() if name not in NOT_DECODING},
    )
    recorded = plain(family)  # its random initialisation draws
    torch.manual_seed(run["seed"])
    draws = Draws(TorchSource() if run["rng"] == "torch" else FixedSource())
    result = decode_pipelined(recorded, run["prompt"], options, draws, mask_id=RECORDED_MASK, shifted=family == "dream")
    assert result.new_tokens(options.stop_token_ids) == run["output"]
    assert result.nfe == run["stats"]["total_forwards"]
    assert result.decoding_order == run["decoding_order"]
