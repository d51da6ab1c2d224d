"""Several blocks at once: what the whole text, recomputed in every step, gives; and what must not change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2d2_lmeval import BlockDiffusionModel, DecodingConfig
from s2d2_lmeval.decoding.blocks.rows import Rows
from s2d2_lmeval.errors import ConfigError

from . import editing_tiny, tiny
from .recompute import Denoising

BLOCK, NEW, MASK = 4, 14, tiny.VOCABULARY - 1
PROMPTS = [[3, 1, 4, 1, 5], [2, 7, 1, 8], [9], list(range(1, 20))]
DECODERS = ["dynamic", "editing"]
EDITS = {"editing_threshold": 0.3, "max_post_steps": 2}


def engine(decoder: str, max_batch: int = 8) -> BlockDiffusionModel:
    if decoder == "editing":
        return editing_tiny.engine(max_batch=max_batch)
    return tiny.engine(max_batch)


def options(decoder: str, blocks: int, **more: Any) -> dict[str, Any]:
    chosen = {"decoder": decoder, "multi_block": blocks, "block_length": BLOCK, "max_new_tokens": NEW}
    chosen |= {"temperature": 0.0, "confidence_threshold": 0.35, "stop_token_ids": ()}
    others = {"dynamic": {"cache_ver": False, "draft_ver": False}, "editing": EDITS}
    return chosen | others[decoder] | more


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("decoder", DECODERS)
def test_tokens_and_forwards_of_a_full_recompute(decoder: str, blocks: int) -> None:
    plain, edits = tiny.tiny_model(), {}
    if decoder == "editing":
        plain, edits = editing_tiny.tiny_model(), {"editing": 0.3, "post_steps": 2}
    denoising = Denoising(MASK, NEW, BLOCK, at_once=blocks, **edits)
    expected = [denoising.run(plain, prompt) for prompt in PROMPTS]
    answers = engine(decoder).generate(PROMPTS, options(decoder, blocks))
    assert [(one.token_ids, int(one.stats["nfe"])) for one in answers] == expected


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_neither_batch_nor_schedule_changes_tokens(decoder: str, sampled: bool) -> None:
    more = {"temperature": 1.0, "do_sample": True} if sampled else {}
    alone, together, reference = (
        engine(decoder, batch).generate(PROMPTS, options(decoder, 3, schedule=schedule, **more), seeds=[1, 2, 3, 4])
        for batch, schedule in ((1, "fused"), (3, "fused"), (8, "reference"))
    )
    assert [one.token_ids for one in alone] == [one.token_ids for one in together]
    assert [one.token_ids for one in alone] == [one.token_ids for one in reference]
    assert sum(one.stats["nfe"] for one in alone) < sum(one.stats["nfe"] for one in reference)


def test_places_are_drawn_anew_in_every_forward() -> None:
    """Numbers do not repeat when a block moves forward among those in work: its steps count from 0 again."""
    rows, draws = Rows(1, 32, BLOCK, MASK, torch.device("cpu"), blocks=3), []
    for start, step in ((0, 0), (0, 1), (4, 0), (4, 1), (8, 0)):
        rows.start[0], rows.step[0] = start, step
        draws += [(start + place, number) for place, number in enumerate(rows.draw[0].tolist())]
    assert len(draws) == len({*draws})


def test_a_stop_token_ends_the_answer_in_its_block() -> None:
    whole = engine("dynamic").generate(PROMPTS, options("dynamic", 4))
    for prompt, answer in zip(PROMPTS, whole, strict=True):
        stop = answer.token_ids[6]
        stopped = engine("dynamic").generate([prompt], options("dynamic", 4, stop_token_ids=[stop]))[0]
        assert stopped.token_ids == answer.token_ids[: answer.token_ids.index(stop)]
        assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"decoder": "static"}, "multi_block"),
        ({"decoder": "spiffy", "base": "dynamic"}, "multi_block"),
        ({"decoder": "dynamic", "multi_block": 0}, "at least 1"),
    ],
)
def test_what_does_not_go_with_it_is_refused(given: dict[str, Any], needed: str) -> None:
    with pytest.raises(ConfigError, match=needed):
        DecodingConfig.from_options({"multi_block": 2, **given}, engine("dynamic").facts)


def test_the_run_says_that_it_is_another_output() -> None:
    assert "not the output" in DecodingConfig(decoder="dynamic", multi_block=2).layout
    assert "not the output" not in DecodingConfig(decoder="dynamic").layout
