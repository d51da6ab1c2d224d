"""The first forward of the published implementations, recorded on tiny random checkpoints, through load_checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from s2d2_lmeval.families import adopt, load_checkpoint

DATA = Path(__file__).parent / "data"
# The decoding tests replay whole runs of this one.
SDAR = Path(__file__).parents[1] / "decoding" / "data" / "sdar_checkpoint"


def visible(record: dict, alignment: str) -> torch.Tensor:
    """Block-causal attention, counted from position 0 or from the end of the prompt."""
    position = torch.arange(len(record["ids"]))
    if alignment == "prompt":
        block = torch.div(position - record["prompt_length"], record["block_length"], rounding_mode="floor").clamp(-1)
    else:
        block = position // record["block_length"]
    return (block[:, None] >= block[None])[None, None]


@pytest.mark.parametrize("name", ["sdar", "fast_dllm_v2", "llada2", "llada", "dream"])
def test_first_forward(name):
    record = json.loads((DATA / name / "first_forward.json").read_text())
    model, facts = load_checkpoint(SDAR if name == "sdar" else DATA / name / "checkpoint", device="cpu")
    assert (facts.family, facts.mask_token_id) == (name, 96)
    for one in (model, adopt(model)[0]):
        with torch.no_grad():
            logits = one(
                input_ids=torch.tensor([record["ids"]]), attention_mask=visible(record, facts.block_alignment)
            ).logits
        top = logits[0].softmax(-1).max(-1)
        assert top.indices.tolist() == record["argmax"]
        assert top.values.tolist() == pytest.approx(record["top_probability"], abs=1e-5)
