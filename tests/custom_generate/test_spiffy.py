"""spiffy_generate: the ids of the base decoder, one prompt or several, and the statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from s2d2_lmeval.custom_generate.sdar import block_diffusion_generate_baseline
from s2d2_lmeval.custom_generate.spiffy import spiffy_generate
from s2d2_lmeval.decoding.spiffy.graph import DraftGraph
from s2d2_lmeval.errors import ConfigError, RequestError
from tests.decoding.tiny import VOCABULARY, engine, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The draft graph")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def graph(tmp_path: Path) -> str:
    path = tmp_path / "graph.json"
    DraftGraph.chain(4, 3).save(path)
    return str(path)


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic"])
def test_ids_are_those_of_the_published_baseline(graph: str, strategy: str) -> None:
    base = {"low_confidence_static": "static", "low_confidence_dynamic": "dynamic"}[strategy]
    options = {"block_length": 4, "cache_ver": False, "draft_ver": False, "suppress_mask_token": False}
    if base == "dynamic":
        options["confidence_threshold"] = 0.4
    plain, stats = block_diffusion_generate_baseline(
        tiny_model(),
        torch.tensor([PROMPT]),
        mask_id=VOCABULARY - 1,
        gen_length=16,
        denoising_steps=4,
        remasking_strategy=strategy,
        return_forward_stats=True,
        schedule="fused",
        **({"confidence_threshold": 0.4} | {"block_length": 4}),
    )
    ids, counted = spiffy_generate(
        tiny_model(),
        torch.tensor([PROMPT]),
        mask_id=VOCABULARY - 1,
        gen_length=16,
        base=base,
        draft_graph=graph,
        draft_nodes=3,
        stopping_criteria_idx=(),
        return_forward_stats=True,
        **options,
    )
    assert ids.tolist() == plain.tolist()
    assert counted["decoding_order"] == stats["decoding_order"]
    assert counted["total_forward_steps"] == stats["total_forward_steps"] - counted["states_accepted"]
    assert 0 < counted["states_accepted"] <= counted["states_drafted"]


def test_left_padded_prompts_are_decoded_together(graph: str) -> None:
    table = torch.tensor([PROMPT, [0, 0, 0, *PROMPT[:5]]])
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    options = {"gen_length": 12, "base": "static", "block_length": 4, "draft_graph": graph, "draft_nodes": 3}
    ids, stats = spiffy_generate(engine(), table, mask, return_forward_stats=True, **options)
    assert ids.shape == (2, 20)
    assert ids[:, :8].tolist() == table.tolist()
    for row, prompt in enumerate((PROMPT, PROMPT[:5])):
        alone, counts = spiffy_generate(engine(), torch.tensor([prompt]), return_forward_stats=True, **options)
        assert ids[row, 8:].tolist() == alone[0, len(prompt) :].tolist()
        assert stats["total_forward_steps"][row] == counts["total_forward_steps"]


def test_refusals(graph: str) -> None:
    with pytest.raises(RequestError, match="must be 2-D"):
        spiffy_generate(engine(), torch.tensor(PROMPT))
    with pytest.raises(ConfigError, match="editing_threshold"):
        spiffy_generate(engine(), torch.tensor([PROMPT]), draft_graph=graph, editing_threshold=0.5)
    with pytest.raises(ConfigError, match="calibrate"):
        spiffy_generate(engine(), torch.tensor([PROMPT]), draft_graph=graph, draft_nodes="auto")
