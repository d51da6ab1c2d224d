"""Random prompts and options on the checkpoints of the recorded runs: what is promised to be equal is.

Eight prompts share a call and count as a case each. The long run has a thousand (``make families-cases``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import s2d2_lmeval

from ..decoding.recompute import Denoising

DATA = Path(__file__).parent / "data"
MASK, PROMPTS = 96, 8
CALLS = {"quick": 1, "long": 25}
CAUSAL = {"nemotron_labs_diffusion": ("linear_spec",), "idlm": ("strided",), "wedlm": ()}
"""Families whose text is token-causal, and their own decoders with the output of ``ar``."""
BLOCKS = ("tiny_a2d", "stable_diffcoder")
CASES = CALLS["long"] * PROMPTS
GREEDY_CASES = -(-CALLS["long"] // 2) * PROMPTS
TESTED = {
    **{(family, "sliding"): (CASES, "`ar`; at temperature 0 stock `generate`") for family in CAUSAL},
    **{(family, "sliding"): (CASES, "`ar`") for family in BLOCKS},
    **{(family, "dynamic"): (CASES, "a forward over the whole text per step") for family in BLOCKS},
    ("nemotron_labs_diffusion", "linear_spec"): (CASES, "`ar`"),
    ("idlm", "strided"): (GREEDY_CASES, "`ar` at temperature 0"),
}
"""How many cases of each the long run has, and what the output is compared with."""


@cache
def model(family: str, max_batch: int = PROMPTS) -> s2d2_lmeval.BlockDiffusionModel:
    given: dict[str, Any] = {"block_length": 8} if family == "tiny_a2d" else {}
    return s2d2_lmeval.load(
        DATA / family / "checkpoint", device="cpu", mask_token_id=MASK, max_batch=max_batch, **given
    )


def drawn(rng: random.Random) -> list[list[int]]:
    """Prompts of 1 to 40 tokens; some count or repeat themselves, as these models were trained to."""
    prompts = []
    for _ in range(PROMPTS):
        length, first, step = rng.randint(1, 40), rng.randrange(2, MASK), rng.choice((0, 1, 2))
        counted = [2 + (first + step * place) % (MASK - 2) for place in range(length)]
        prompts.append(counted if rng.random() < 0.7 else [rng.randrange(2, MASK) for _ in range(length)])
    return prompts


def answers(family: str, prompts: list[list[int]], options: dict[str, Any], max_batch: int = PROMPTS) -> list[Any]:
    seeds = list(range(len(prompts)))
    return model(family, max_batch).generate(prompts, {"stop_token_ids": (1,), **options}, seeds=seeds)


def tokens(*args: Any) -> list[list[int]]:
    return [one.token_ids for one in answers(*args)]


def shapes(rng: random.Random, family: str) -> Iterator[dict[str, Any]]:
    """Drafts of several sizes, for ``sliding``; after every context that masks of the family can have."""
    for shape in ("chain", "tree"):
        window = rng.randint(2, 10)
        context = "clean" if model(family).facts.window_causal else rng.choice(("clean", "published"))
        size = {"window": window, "row_budget": rng.randint(window + 2, 40)}
        yield {"decoder": "sliding", "draft_shape": shape, "draft_context": context, **size}


def own_decoders(family: str, rng: random.Random, greedy: bool) -> Iterator[dict[str, Any]]:
    for name in CAUSAL.get(family, ()):
        if greedy or name != "strided":  # strided draws otherwise than ar: the same law, not the same tokens
            threshold = {"draft_threshold": rng.choice((0.0, 0.5))} if name == "linear_spec" else {}
            yield {"decoder": name, "block_length": rng.randint(2, 9), **threshold}


def stock(family: str, prompt: list[int], new: int) -> list[int]:
    """Greedy ``generate`` of transformers."""
    plain = model(family).hf_model
    plain.config._attn_implementation = "sdpa"
    try:
        ids = plain.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=1, suppress_tokens=[MASK]
        )
    finally:
        plain.config._attn_implementation = "s2d2"
    new_ids: list[int] = ids[0, len(prompt) :].tolist()
    return new_ids[:-1] if new_ids[-1] == 1 else new_ids


@pytest.fixture(params=["quick", pytest.param("long", marks=pytest.mark.slow)])
def calls(request: pytest.FixtureRequest) -> int:
    return CALLS[request.param]


@pytest.mark.parametrize("family", [*CAUSAL, *BLOCKS])
def test_decoders_with_the_output_of_ar_have_it(family: str, calls: int) -> None:
    rng = random.Random(family)
    for call in range(calls):
        greedy, prompts, new = call % 2 == 0, drawn(rng), rng.randint(1, 24)
        sampling = {"temperature": 0.0} if greedy else {"temperature": rng.choice((0.6, 1.0)), "do_sample": True}
        shared = {"max_new_tokens": new, **sampling, "top_k": 0, "top_p": 1.0}
        expected = tokens(family, prompts, {**shared, "decoder": "ar"})
        for options in (*shapes(rng, family), *own_decoders(family, rng, greedy)):
            assert tokens(family, prompts, {**shared, **options}) == expected, options
        if greedy and family in CAUSAL:
            assert [stock(family, prompt, new) for prompt in prompts] == expected


@pytest.mark.parametrize("family", BLOCKS)
def test_dynamic_is_a_forward_over_the_whole_text_per_step(family: str, calls: int) -> None:
    rng = random.Random(family)
    plain = model(family).hf_model
    for _ in range(calls):
        prompts, new, block = drawn(rng), rng.randint(1, 20), rng.choice((2, 4, 8))
        threshold = rng.choice((0.3, 0.6, 0.9))
        shared = {"decoder": "dynamic", "block_length": block, "max_new_tokens": new, "temperature": 0.0}
        shared |= {"confidence_threshold": threshold, "stop_token_ids": ()}
        ours = answers(family, prompts, shared)
        apart = answers(family, prompts, {**shared, "schedule": "reference"}, 3)
        assert [one.token_ids for one in ours] == [one.token_ids for one in apart]
        plain.config._attn_implementation = "sdpa"
        try:
            for prompt, answer in zip(prompts, ours, strict=True):
                offset = -len(prompt) % block if family == "tiny_a2d" else 0
                whole = Denoising(MASK, new, block, threshold, offset=offset, short=True)
                assert (answer.token_ids, answer.stats["nfe"]) == whole.run(plain, prompt)
        finally:
            plain.config._attn_implementation = "s2d2"
