"""Every schedule writes what the reference schedule writes, with fewer forwards: exactly how many fewer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2d2_lmeval import DecodingConfig, Generation
from s2d2_lmeval.errors import ConfigError

from .drawn import Case, cases
from .test_engine_against_oracle import TARGETS, by_engine
from .tiny import engine


def check_fewer_forwards(reference: Generation, fused: Generation, prompt: int, block: int) -> None:
    assert fused.token_ids == reference.token_ids
    assert fused.canvas == reference.canvas
    assert fused.decoding_order == reference.decoding_order
    assert fused.steps == reference.steps
    assert fused.finish_reason == reference.finish_reason
    # Every finished block is committed in a forward of its own under reference, in the next block's first draft under
    # fused, and not at all if it is the last one. The prompt rides in the first draft too.
    blocks = reference.stats["blocks"]
    prefilled = 1 if prompt >= block and blocks else 0
    assert fused.stats["blocks"] == blocks == reference.stats["commit_forwards"]
    assert fused.stats["commit_forwards"] == 0
    assert (reference.stats["prefill_forwards"], fused.stats["prefill_forwards"]) == (prefilled, 0)
    assert fused.stats["nfe"] == reference.stats["nfe"] - blocks - prefilled


@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fused_schedule_saves_every_commit(decoder: str, policy: str | None, data: st.DataObject) -> None:
    case: Case = data.draw(cases(decoder, policy))
    block = 1 if decoder == "ar" else case.options.block_length
    check_fewer_forwards(by_engine(case), by_engine(case, "fused"), len(case.prompt), block)


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fused_schedule_saves_every_commit_at_length(decoder: str, policy: str | None, data: st.DataObject) -> None:
    case: Case = data.draw(cases(decoder, policy))
    block = 1 if decoder == "ar" else case.options.block_length
    check_fewer_forwards(by_engine(case), by_engine(case, "fused"), len(case.prompt), block)


def drafts_for_free(reference: Generation) -> int:
    """Blocks that a verification of all their masks finished exactly as drafted, and that were not the last one."""
    steps = reference.steps
    mask = steps[0].before[-1] if steps else None  # a first block ends in masks
    free = 0
    for i, step in enumerate(steps[:-1]):
        masks = [n for n, token in enumerate(step.before) if token == mask]
        one_span = masks == list(range(masks[0], masks[0] + len(masks)))
        ends = step.kind == "verify" and steps[i + 1].start > step.start
        free += ends and one_span and step.tokens == step.draft
    return free


def check_lookahead(case: Case) -> None:
    options = replace(case.options, cache_ver=True, draft_ver=True)
    case = replace(case, options=options, random_source="fixed" if case.random_source == "fixed" else "keyed")
    reference, fused, ahead = (by_engine(case, schedule) for schedule in ("reference", "fused", "lookahead"))
    assert ahead.token_ids == reference.token_ids
    assert ahead.canvas == reference.canvas
    assert ahead.decoding_order == reference.decoding_order
    assert ahead.steps == reference.steps
    assert ahead.finish_reason == reference.finish_reason
    if not options.ssd_threshold_all_spans:
        assert ahead.stats["nfe"] == fused.stats["nfe"] - drafts_for_free(reference)
    assert ahead.stats["nfe"] <= fused.stats["nfe"]


@pytest.mark.parametrize("policy", [policy for decoder, policy in TARGETS if decoder == "s2d2"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_lookahead_schedule_saves_a_draft_for_every_block_accepted_whole(policy: str, data: st.DataObject) -> None:
    check_lookahead(data.draw(cases("s2d2", policy)))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [policy for decoder, policy in TARGETS if decoder == "s2d2"])
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_lookahead_schedule_saves_a_draft_for_every_block_accepted_whole_at_length(
    policy: str, data: st.DataObject
) -> None:
    check_lookahead(data.draw(cases("s2d2", policy)))


@pytest.mark.parametrize("decoder", ["s2d2", "dynamic"])
@pytest.mark.parametrize("length", [511, 512, 519, 1030])
def test_prompts_longer_than_a_chunk_decode_the_same(decoder: str, length: int) -> None:
    model = engine(context=2048)
    prompt = [(7 * i + i // 5) % 21 for i in range(length)]
    options = {"decoder": decoder, "block_length": 8, "max_new_tokens": 12, "cache_ver": True, "draft_ver": True}
    reference, fused = (
        model.generate([prompt], {**options, "schedule": schedule})[0] for schedule in ("reference", "fused")
    )
    assert fused.canvas == reference.canvas
    assert fused.decoding_order == reference.decoding_order
    assert fused.stats["nfe"] < reference.stats["nfe"] - reference.stats["blocks"] + 1


PROMPTS = [[11, 2, 14, 21, 9], [18, 0, 14, 0, 3, 16, 16, 1, 18, 17], [5, 14], [7, 4, 2, 6, 14, 3, 8, 8, 1]]
AHEAD = {"decoder": "s2d2", "schedule": "lookahead", "cache_ver": True, "draft_ver": True, "block_length": 7}


def test_lookahead_reads_no_decided_places_for_an_entropy_that_nobody_sums() -> None:
    options = {**AHEAD, "denoising_steps": 2, "remasking_strategy": "low_confidence_static", "max_new_tokens": 17}
    options |= {"do_verify_policy": "score_threshold", "do_verify_score_threshold": 0.5}
    plain, collapsed = (
        engine(max_batch=3, seed=2).generate(PROMPTS, DecodingConfig(**options, collapse_entropy=collapse))
        for collapse in (False, True)
    )
    assert [answer.steps for answer in collapsed] == [answer.steps for answer in plain]


def test_lookahead_cannot_sum_over_places_that_it_does_not_run() -> None:
    options = {**AHEAD, "remasking_strategy": "entropy_bounded", "eb_threshold": 0.5, "collapse_entropy": True}
    options["max_new_tokens"] = 9
    with pytest.raises(ConfigError, match="collapse_entropy sums over every place"):
        engine(max_batch=3).generate(PROMPTS, DecodingConfig(**options))
