"""The engine decodes what the oracle decodes: ids, forwards and decoding order, on every decoder and every option."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2d2_lmeval import Generation, load
from s2d2_lmeval.families import load_checkpoint
from s2d2_lmeval.toy import checkpoint_path

from .drawn import MASK, POLICIES, Case, cases
from .oracle import Draws, Options, Result, TorchSource, decode
from .oracle_loop import assert_agrees, draws_of
from .tiny import KeyedDraws, engine, engine_config, tiny_model

DENOISERS = ("ar", "sequential", "static", "dynamic", "entropy_bounded")
ROUTED = tuple(("s2d2", policy) for policy in POLICIES)
TARGETS = [(decoder, None) for decoder in DENOISERS] + list(ROUTED)


def by_oracle(case: Case) -> Result:
    draws = draws_of(case.random_source, KeyedDraws(case.seed, case.request))
    model = tiny_model(seed=case.model_seed)
    torch.manual_seed(case.seed)
    # Autoregressively the mask is no token.
    options = replace(case.options, suppress_mask_token=True) if case.options.decoder == "ar" else case.options
    return decode(model, case.prompt, options, draws, mask_id=MASK)


def by_engine(case: Case, schedule: str = "reference") -> Generation:
    model = engine(seed=case.model_seed)
    torch.manual_seed(case.seed)
    config = engine_config(case.options, random_source=case.random_source, seed=case.seed, schedule=schedule)
    return model.generate([case.prompt], config, seeds=[case.request])[0]


def check_same(case: Case) -> None:
    assert_agrees(by_engine(case), by_oracle(case), case.options, MASK)


@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_engine_decodes_what_the_definition_says(decoder: str, policy: str | None, data: st.DataObject) -> None:
    check_same(data.draw(cases(decoder, policy)))


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_engine_decodes_what_the_definition_says_at_length(
    decoder: str, policy: str | None, data: st.DataObject
) -> None:
    check_same(data.draw(cases(decoder, policy)))


PROMPTS = [[21, 3, 8], [5, 17, 30, 2]]


@pytest.mark.parametrize("options", [{"decoder": "static"}, {"decoder": "dynamic", "confidence_threshold": 1.0}])
def test_ties_are_broken_as_published(options: dict[str, Any]) -> None:
    """On trained weights a small nucleus makes most confidences exactly 1."""
    options |= {"block_length": 8, "denoising_steps": 3, "max_new_tokens": 12, "do_sample": True, "top_p": 0.5}
    plain, toy = load_checkpoint(checkpoint_path())[0], load(checkpoint_path(), device="cpu")
    for number, prompt in enumerate(PROMPTS):
        torch.manual_seed(number)
        published = decode(plain, prompt, Options(**options), Draws(TorchSource()), mask_id=toy.facts.mask_token_id)
        torch.manual_seed(number)
        config = engine_config(Options(**options), random_source="torch", schedule="reference")
        assert toy.generate([prompt], config)[0].decoding_order == published.decoding_order
        steps = [[place for place in step if place != "|"] for step in published.decoding_order]
        assert any(step != sorted(step) for step in steps)
