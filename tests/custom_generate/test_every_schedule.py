"""Every published function that takes a schedule, under each of them: the same ids, or a refusal that names it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import s2d2_lmeval
from s2d2_lmeval.custom_generate import (
    d2f,
    ddtree,
    fast_dllm_v2,
    idlm,
    llada2,
    nemotron,
    sdar,
    stable_diffcoder,
    tiny_a2d,
)
from s2d2_lmeval.errors import ConfigError

from .checkpoints import DATA, MASK, REPOSITORY, SDAR
from .test_signatures import PUBLISHED

FAMILIES = REPOSITORY / "tests" / "families" / "data"
PROMPT = torch.tensor([[15, 38, 25, 37, 57, 61, 8, 26, 53, 24, 5, 22, 25]])

AR_LIKE = {"cache_ver": True, "draft_ver": True}
SHORT = {"gen_length": 19, "block_length": 4, "mask_id": MASK}
BASE = {**SHORT, "denoising_steps": 3, "confidence_threshold": 0.02, "mask_id": MASK}
BOUNDED = {**BASE, "remasking_strategy": "entropy_bounded", "eb_threshold": 3.0}
SUBBLOCKS = {"max_new_tokens": 19, "block_size": 8, "small_block_size": 4, "mask_id": MASK, "threshold": 0.02}
PIPELINED = {"max_length": 160, "max_new_tokens": 19, "block_size": 8, "mask_token_id": MASK}
DRAWN = {"temperature": 0.8}
DRAFTED = {"mask_token_id": 63, "block_size": 8, "max_new_tokens": 19}

CALLS: list[tuple[Callable[..., Any], dict[str, Any], bool]] = [
    # function, arguments, whether a verification can look ahead
    (sdar.block_diffusion_generate_baseline, BASE, False),
    (sdar.block_diffusion_generate_baseline, {**BASE, "do_sample": True}, False),
    (sdar.block_diffusion_generate_baseline, BOUNDED, False),
    (sdar.block_diffusion_generate, BASE, False),
    (sdar.block_diffusion_generate, {**BASE, **AR_LIKE}, True),
    (sdar.block_diffusion_generate, {**BASE, **AR_LIKE, "do_sample": True}, True),
    (sdar.block_diffusion_generate, {**BOUNDED, **AR_LIKE}, False),
    (fast_dllm_v2.generate, SUBBLOCKS, False),
    (fast_dllm_v2.generate, {**SUBBLOCKS, **DRAWN}, False),
    (fast_dllm_v2.generate, {**SUBBLOCKS, "use_block_cache": True}, False),
    (fast_dllm_v2.generate_ssd_policy, {**SUBBLOCKS, **AR_LIKE}, False),
    (fast_dllm_v2.generate_ssd_policy, {**SUBBLOCKS, **AR_LIKE, **DRAWN}, False),
    (llada2.generate_cached, {**SHORT, "threshold": 0.02}, False),
    (llada2.generate_cached, {**SHORT, "threshold": 0.02, **DRAWN}, False),
    (llada2.generate_ssd_policy, {**SHORT, "threshold": 0.02}, False),
    (llada2.generate_ssd_policy, {**SHORT, "threshold": 0.02, **DRAWN}, False),
    (d2f.generate_block_single, PIPELINED, False),
    (d2f.generate_block_speculative, PIPELINED, False),
    (d2f.generate_block_speculative, {**PIPELINED, **DRAWN}, False),
    (ddtree.dflash_generate, DRAFTED, False),
    (ddtree.ddtree_generate, {**DRAFTED, **DRAWN}, False),
    (idlm.generate, {"max_new_tokens": 19, "temperature": 0.0}, False),
    (idlm.generate, {"max_new_tokens": 19}, False),
    (nemotron.generate, {"max_new_tokens": 24, "block_length": 8, "threshold": 0.02}, False),
    (stable_diffcoder.generate_block, {"gen_length": 19, "steps": 19, "threshold": 0.02}, False),
    (tiny_a2d.sample, {"max_new_tokens": 19, "steps": 19, "block_size": 8, "mask_id": MASK}, False),
]
CHECKPOINTS: dict[Any, Path] = {
    sdar: SDAR,
    ddtree: DATA / "ddtree" / "target",
    d2f: FAMILIES / "llada",
    **{module: FAMILIES / module.__name__.rpartition(".")[2] for module in (fast_dllm_v2, idlm, llada2)},
    nemotron: FAMILIES / "nemotron_labs_diffusion",
    stable_diffcoder: FAMILIES / "stable_diffcoder",
    tiny_a2d: FAMILIES / "tiny_a2d",
}


@cache
def model(module: Any) -> s2d2_lmeval.BlockDiffusionModel:
    path = CHECKPOINTS[module]
    given: dict[str, Any] = {"mask_token_id": 96, "block_length": 8} if module is tiny_a2d else {}
    if module is ddtree:
        given = {"draft": DATA / "ddtree" / "draft"}
    return s2d2_lmeval.load(path / "checkpoint" if (path / "checkpoint").is_dir() else path, device="cpu", **given)


def test_none_is_left_out() -> None:
    scheduled = [function for function in PUBLISHED if "schedule" in inspect.signature(function).parameters]
    assert {function.__qualname__ for function in scheduled} == {function.__qualname__ for function, *_ in CALLS}


def name(case: Any) -> str:
    return f"{case.__module__.rpartition('.')[2]}.{case.__name__}" if callable(case) else ""


@pytest.mark.parametrize(("function", "arguments", "ahead"), CALLS, ids=name)
def test_ids_do_not_depend_on_the_schedule(
    function: Callable[..., Any], arguments: dict[str, Any], ahead: bool
) -> None:
    call = functools.partial(function, model(inspect.getmodule(function)), PROMPT, random_source="keyed", **arguments)
    published = ids_of(call(schedule="reference"))
    assert len(set(published)) > 1
    assert ids_of(call()) == published
    for schedule in ("fused", "lookahead") if ahead else ("fused",):
        assert ids_of(call(schedule=schedule)) == published, schedule
    if not ahead:
        with pytest.raises(ConfigError, match=r"schedule=lookahead.* use schedule=fused"):
            call(schedule="lookahead")


def ids_of(answer: Any) -> list[int]:
    ids = answer[0] if isinstance(answer, tuple) else getattr(answer, "output_ids", answer)
    return ids.flatten().tolist()
