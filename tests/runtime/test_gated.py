"""A draft adapter acts on draft queries only: all others are those of the model without it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import s2d2_lmeval
from s2d2_lmeval.errors import CheckpointError, ConfigError
from s2d2_lmeval.families import load_checkpoint
from s2d2_lmeval.runtime.graphs import upload
from s2d2_lmeval.runtime.passes import Layout
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.runtime.shapes import Frame, Shape

CHECKPOINT = Path(__file__).parents[1] / "families" / "data" / "nemotron_labs_diffusion" / "checkpoint"
ADAPTER = CHECKPOINT / "linear_spec_lora"
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7, 1], [18, 81] * 20]


def logits(runner: Runner, gated: list[int] | None, captured: bool = False) -> torch.Tensor:
    """Of six queries of two rows, some of which may be drafts."""
    layout = Layout(np.arange(2), np.array([4, 2]))
    runner.reserve(2, 16)
    shape = Shape.tight(layout, 6, runner.cache)
    frame = Frame(layout, shape)
    told = upload(runner.device, frame.attention(runner.cache))
    if captured:
        frame.shape = Shape(shape.queries, shape.rows, shape.widest, shape.span, shape.wanted, padded=True)
    if gated is not None:
        told = {**told, "gated": torch.tensor(gated)}
    visible = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, -1, -1)
    positions = torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.inference_mode():
        return runner.run(torch.tensor([5, 6, 7, 96, 8, 96]), positions, torch.arange(6), visible, told, frame)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clean_queries_are_those_of_the_plain_model(dtype: str) -> None:
    plain = Runner(load_checkpoint(CHECKPOINT, device="cpu", dtype=dtype)[0])
    with_adapter = Runner(load_checkpoint(CHECKPOINT, device="cpu", dtype=dtype, adapter=ADAPTER)[0])
    without = logits(plain, None)
    assert torch.equal(logits(with_adapter, None), without)
    assert torch.equal(logits(with_adapter, [0] * 6), without)
    drafts = torch.tensor([0, 0, 0, 1, 0, 1]).bool()
    for captured in (False, True):
        some = logits(with_adapter, drafts.long().tolist(), captured)
        assert torch.equal(some[~drafts], without[~drafts])
        assert (some[drafts] - without[drafts]).abs().amax(1).min() > 0.01
    gathered, masked = (logits(with_adapter, drafts.long().tolist(), captured) for captured in (False, True))
    assert (gathered - masked).abs().max() < (1e-5 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("static_shapes", [False, True])
def test_an_adapter_changes_acceptance_and_never_the_output(static_shapes: bool) -> None:
    engines = [
        s2d2_lmeval.load(CHECKPOINT, device="cpu", static_shapes=static_shapes, **given)
        for given in ({}, {"adapter": ADAPTER})
    ]
    assert [engine.facts.draft_adapter is None for engine in engines] == [True, False]
    assert engines[1].facts.adapter is None
    published = {"decoder": "sliding", "draft_context": "published"}
    for given in ({"decoder": "ar"}, {"decoder": "sliding"}, published, {"decoder": "linear_spec"}):
        counts, answers = [], []
        for engine in engines:
            found = engine.generate(PROMPTS, {**given, "max_new_tokens": 16, "stop_token_ids": ()})
            answers.append([one.token_ids for one in found])
            counts.append([one.stats.get(name, 0) for one in found for name in ("nfe", "drafted", "accepted")])
        assert answers[0] == answers[1]
        assert (counts[0] == counts[1]) == (given["decoder"] == "ar")


def test_adapters_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_checkpoint(CHECKPOINT, device="cpu", adapter=tmp_path)
    with pytest.raises(ConfigError, match="draft adapter"):
        Runner(load_checkpoint(CHECKPOINT, device="cpu", adapter=ADAPTER)[0], fused=True)
