"""Recorded runs of block decoders whose settings are options alone: Stable-DiffCoder and Tiny-A2D, greedy."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import s2d2_lmeval

DATA = Path(__file__).parent / "data"
UNUSUAL = {"temperature", "remasking", "stochastic_transfer", "right_shift_logits"}
RUNS = [
    (family, run)
    for family in ("stable_diffcoder", "tiny_a2d")
    for run in map(json.loads, (DATA / family / "runs.jsonl").read_text().splitlines())
    if not run["reference_fault"] and not UNUSUAL & run["kwargs"].keys() and isinstance(run["prompt"][0], int)
]


@cache
def model(family: str) -> s2d2_lmeval.BlockDiffusionModel:
    return s2d2_lmeval.load(DATA / family / "checkpoint", device="cpu", mask_token_id=96, block_length=8)


def options(family: str, run: dict[str, Any]) -> dict[str, Any]:
    call = run["kwargs"]
    length, new = call.get("block_size", call.get("block_length")), call.get("max_new_tokens", call.get("gen_length"))
    blocks = -(-new // length)
    steps = min(-(-call["steps"] // blocks), length)
    stop = run.get("eos_id", call.get("eos_id"))
    static = {"decoder": "static", "block_length": length, "denoising_steps": steps, "max_new_tokens": new}
    shared = {**static, "stop_token_ids": [] if stop is None else [stop]}
    threshold = None if family == "tiny_a2d" else call.get("threshold", 0.95)
    return shared if threshold is None else {**shared, "decoder": "dynamic", "confidence_threshold": threshold}


@pytest.mark.parametrize(("family", "run"), RUNS, ids=lambda value: value if isinstance(value, str) else value["name"])
def test_recorded_run(family: str, run: dict[str, Any]) -> None:
    reference, fused = (
        model(family).generate([run["prompt"]], {**options(family, run), "schedule": schedule})[0]
        for schedule in ("reference", "fused")
    )
    assert fused.token_ids == reference.token_ids
    assert fused.stats["nfe"] <= reference.stats["nfe"]
    prefix = run["left_padding"][0] if "left_padding" in run else 0
    expected = run["output"][prefix + len(run["prompt"]) :]
    new = reference.canvas[len(run["prompt"]) :]
    stops = set(options(family, run)["stop_token_ids"])
    if family == "stable_diffcoder" and stops & set(new):  # it fills the block with the stop token
        end = next(place for place, token in enumerate(new) if token in stops)
        new = new[:end] + [new[end]] * (len(new) - end)
    assert new == expected
    counted = "nfe" if family == "tiny_a2d" else "decode_nfe"
    assert reference.stats[counted] == run["nfe"]
    decided = [[abs(place) + prefix for place in step if place != "|"] for step in reference.decoding_order]
    assert [sorted(step) for step in decided] == [sorted(step) for step in run["decoding_order"]]
