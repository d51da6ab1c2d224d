"""The editing decoders against the definition; the definition against recorded runs of the published code."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2d2_lmeval import Generation
from s2d2_lmeval.families import load_checkpoint

from .drawn import MASK
from .editing_oracle import EditingOptions, decode, published_tokens
from .editing_tiny import TARGETS, Case, cases, engine, engine_config, tiny_model
from .oracle_inputs import Draws, FixedSource, Result, TorchSource
from .oracle_loop import assert_agrees, draws_of
from .tiny import DATA, KeyedDraws

CHECKPOINT = Path(__file__).parents[1] / "families" / "data" / "llada2" / "checkpoint"
RUNS = [json.loads(line) for line in (DATA / "llada2_goldens.jsonl").read_text().splitlines()]
PUBLISHED_NAMES = {"eos_id": "stop_token_ids", "gen_length": "max_new_tokens", "threshold": "confidence_threshold"}
SOURCES = {"torch": TorchSource, "fixed": FixedSource}


@cache
def recorded_model() -> Any:
    return load_checkpoint(CHECKPOINT, device="cpu")[0]


def each_run() -> list[Any]:
    """Every fourth at once, the others among the slow tests: no cache makes them so."""
    slow = pytest.mark.slow
    return [pytest.param(run, id=run["name"], marks=() if i % 4 == 0 else slow) for i, run in enumerate(RUNS)]


@pytest.mark.parametrize("run", each_run())
def test_the_definition_gives_the_recorded_runs(run: dict[str, Any]) -> None:
    given = {PUBLISHED_NAMES.get(name, name): value for name, value in run["kwargs"].items()}
    given["stop_token_ids"] = (given["stop_token_ids"],)
    given["do_sample"] = given.get("temperature", 0.0) > 0
    decoder = "s2d2" if run["fn"] == "generate_ssd_policy" else "editing"
    defaults = {"max_post_steps": 16, "do_verify_score_threshold": 0.0, "suppress_mask_token": False}
    options = EditingOptions(**{**defaults, **given, "decoder": decoder})
    plain = recorded_model()  # its random initialisation draws
    torch.manual_seed(run["seed"])
    result = decode(plain, run["prompt"], options, Draws(SOURCES[run["rng"]]()), mask_id=96)
    assert run["prompt"] + published_tokens(result, options) == run["output"]
    assert json.loads(json.dumps(result.decoding_order)) == run["decoding_order"]
    # The published function without a cache forwards neither prompts nor finished blocks on their own.
    kinds = ("draft",) if run["fn"] == "generate" else ("prefill", "draft", "verify", "commit")
    assert sum(result.forwards[kind] for kind in kinds) == run["nfe"]


def by_oracle(case: Case) -> Result:
    draws = draws_of(case.random_source, KeyedDraws(case.seed, case.request))
    model = tiny_model(case.model_seed)
    torch.manual_seed(case.seed)
    return decode(model, case.prompt, case.options, draws, mask_id=MASK)


def by_engine(case: Case, schedule: str = "reference") -> Generation:
    model = engine(case.model_seed)
    torch.manual_seed(case.seed)
    config = engine_config(case.options, random_source=case.random_source, seed=case.seed, schedule=schedule)
    return model.generate([case.prompt], config, seeds=[case.request])[0]


def check_same(case: Case) -> None:
    assert_agrees(by_engine(case), by_oracle(case), case.options, MASK)


def check_fused(case: Case) -> None:
    reference, fused = by_engine(case), by_engine(case, "fused")
    assert fused.token_ids == reference.token_ids
    assert fused.canvas == reference.canvas
    assert fused.decoding_order == reference.decoding_order
    assert fused.steps == reference.steps
    assert fused.finish_reason == reference.finish_reason
    # A block that another follows is committed in a forward of its own under reference, in the next block's first draft
    # under fused. The prompt rides in the first draft too. So drafts and verifications are all there is.
    blocks = reference.stats["blocks"]
    assert fused.stats["blocks"] == blocks
    assert reference.stats["commit_forwards"] == max(blocks - 1, 0)
    assert reference.stats["prefill_forwards"] == (1 if blocks and len(case.prompt) >= case.options.block_length else 0)
    assert fused.stats["nfe"] == fused.stats["draft_forwards"] + fused.stats["verify_forwards"]
    for kind in ("draft", "verify"):
        assert fused.stats[f"{kind}_forwards"] == reference.stats[f"{kind}_forwards"]


@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_engine_decodes_what_the_definition_says(decoder: str, policy: str | None, data: st.DataObject) -> None:
    check_same(data.draw(cases(decoder, policy)))


@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fused_schedule_saves_every_commit(decoder: str, policy: str | None, data: st.DataObject) -> None:
    check_fused(data.draw(cases(decoder, policy)))


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_engine_and_schedules_at_length(decoder: str, policy: str | None, data: st.DataObject) -> None:
    case = data.draw(cases(decoder, policy))
    check_same(case)
    check_fused(case)
