"""The oracle itself reproduces the recorded runs of the published code: ids, forwards and decoding order."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from s2d2_lmeval.families import load_checkpoint

from .oracle import Draws, FixedSource, Options, TorchSource, decode
from .tiny import DATA

MASK = 96
DECODERS = {"low_confidence_static": "static", "low_confidence_dynamic": "dynamic"}
RUNS = [json.loads(line) for line in (DATA / "sdar_goldens.jsonl").read_text().splitlines()]
SAMPLE = RUNS[::7]
REST = [run for run in RUNS if run not in SAMPLE]


@cache
def model() -> Any:
    return load_checkpoint(DATA / "sdar_checkpoint")[0]


def options_of(run: dict[str, Any]) -> Options:
    """The published arguments of a recorded run."""
    given = {name: value for name, value in run["kwargs"].items() if name != "trim_stop_tokens"}
    given["max_new_tokens"] = given.pop("gen_length")
    given["stop_token_ids"] = tuple(given.pop("stopping_criteria_idx", ()))
    if run["fn"] == "generate":
        strategy = given.pop("remasking_strategy", "low_confidence_dynamic")
        given["decoder"] = DECODERS.get(strategy, strategy)
    return Options(**given, collapse_entropy=True, suppress_mask_token=False, stale_rows=True)


def check(run: dict[str, Any]) -> None:
    options = options_of(run)
    plain = model()  # its random initialisation draws
    torch.manual_seed(run["seed"])
    source = TorchSource() if run["rng"] == "torch" else FixedSource()
    result = decode(plain, run["prompt"], options, Draws(source), mask_id=MASK)
    if run["kwargs"].get("trim_stop_tokens", True):
        new = result.new_tokens(options.stop_token_ids)
        while new and new[-1] == MASK:
            new.pop()
        assert run["prompt"] + new == run["output"]
    else:
        assert result.canvas == run["output"]
    assert result.nfe == run["nfe"]
    recorded = run["decoding_order"]
    if options.decoder == "sequential":
        recorded = [within_block(entry, options.block_length) for entry in recorded]
    assert result.decoding_order == recorded


def within_block(entry: list[Any], size: int) -> list[Any]:
    """A published sequential step lists as many positions as it planned, even past the end of its block."""
    first = next(item for item in entry if item != "|")
    return [item for item in entry if item == "|" or item // size == first // size]


@pytest.mark.parametrize("run", SAMPLE, ids=lambda run: run["name"])
def test_oracle_reproduces_recorded_run(run: dict[str, Any]) -> None:
    check(run)


@pytest.mark.slow
@pytest.mark.parametrize("run", REST, ids=lambda run: run["name"])
def test_oracle_reproduces_every_other_recorded_run(run: dict[str, Any]) -> None:
    check(run)
