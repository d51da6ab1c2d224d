"""S2D2's law by exact enumeration: with sampled drafts, always verified under AR-like caching, it is the AR law.

Every draw is an argument, so a decoder with a vocabulary of three or four is a finite tree. ``Enumeration`` walks it:
a categorical draw branches over the tokens, the uniforms of a verification over where the first rejection falls, which
has the probability that the acceptance ratios say (a uniform below the ratio accepts). The leaves carry exact
probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch

from s2d2_lmeval import BlockDiffusionModel
from s2d2_lmeval.decoding.blocks import s2d2

from .branching import Path
from .tiny import engine

EXACT = 1e-9
Law = dict[tuple[int, ...], float]


class Enumeration(Path):
    """A random source that plays one path of the tree."""

    def __init__(self, script: Sequence[int], first_decided: int, block: int) -> None:
        super().__init__(script)
        self.block = block
        self.decided = first_decided  # places of the current block that are no masks
        self.ratios = torch.empty(0, dtype=torch.float64)

    def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
        drawn = probabilities.argmax(-1)
        rows = range(self.decided, self.block) if len(probabilities) == self.block else range(len(probabilities))
        for row in rows:  # rows of decided places are drawn as published, and read by nobody
            drawn[row] = self.branch(probabilities[row].tolist())
        if self.block == 1:
            self.decided = 0
        return drawn

    def uniform(self, n: int) -> torch.Tensor:
        assert n == self.block - self.decided == len(self.ratios)
        rejected = self.first_rejected(self.ratios.tolist())
        self.decided = (self.decided + min(rejected + 1, n)) % self.block
        return torch.tensor([1.0 if i == rejected else 0.0 for i in range(n)], dtype=torch.float64)


def law_of(model: BlockDiffusionModel, prompt: list[int], new: int, options: dict[str, object]) -> Law:
    """The distribution of the ``new`` tokens after ``prompt``, by decoding every path."""
    block = int(options.get("block_length", 1))  # type: ignore[call-overload]
    law: Law = {}
    scripts: list[list[int]] = [[]]
    with pytest.MonkeyPatch.context() as patch:
        ratio_of = s2d2.acceptance_ratio
        running: list[Enumeration] = []

        def recorded(*arguments: torch.Tensor) -> torch.Tensor:
            running[-1].ratios = ratio_of(*arguments)  # type: ignore[arg-type]
            return running[-1].ratios

        patch.setattr(s2d2, "acceptance_ratio", recorded)
        while scripts:
            source = Enumeration(scripts.pop(), len(prompt) % block, block)
            running[:] = [source]
            config = {**options, "random_source": source, "max_new_tokens": new, "stop_token_ids": ()}
            tokens = tuple(model.generate([prompt], config)[0].token_ids)
            law[tokens] = law.get(tokens, 0.0) + source.probability
            scripts += source.pending
    return law


def distance(one: Law, other: Law) -> float:
    """The largest difference of a probability."""
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other})


def ar_law(model: BlockDiffusionModel, prompt: list[int], new: int, **sampling: object) -> Law:
    return law_of(model, prompt, new, {"decoder": "ar", "do_sample": True, **sampling})


def s2d2_law(model: BlockDiffusionModel, prompt: list[int], new: int, block: int, **options: object) -> Law:
    always = {
        "decoder": "s2d2",
        "block_length": block,
        "do_verify_policy": "mask_span_length",
        "min_ssd_span_length": 1,
        "do_sample": True,
        "temperature": 1.0,
        "cache_ver": True,
        "draft_ver": True,
        "schedule": "reference",
    }
    return law_of(model, prompt, new, {**always, **options})


# vocabulary (with the mask), block, prompt, new tokens: aligned, unaligned and shorter prompts, one and two blocks
SHAPES = [(4, 2, [0, 1], 2), (3, 3, [1, 0, 1, 1], 2), (3, 2, [0], 3)]
LARGER_SHAPES = [(3, 3, [1, 0, 1], 3), (3, 4, [1], 3), (4, 3, [0, 1, 2, 0], 2), (3, 2, [0, 1], 4)]


def check_ar_law(vocabulary: int, block: int, prompt: list[int], new: int) -> None:
    model = engine(vocabulary=vocabulary, seed=5)
    law = s2d2_law(model, prompt, new, block)
    assert sum(law.values()) == pytest.approx(1.0, abs=EXACT)
    assert distance(law, ar_law(model, prompt, new)) < EXACT


@pytest.mark.parametrize(("vocabulary", "block", "prompt", "new"), SHAPES)
def test_sampled_and_always_verified_it_is_the_ar_law(vocabulary: int, block: int, prompt: list[int], new: int) -> None:
    check_ar_law(vocabulary, block, prompt, new)


@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "block", "prompt", "new"), LARGER_SHAPES)
def test_larger_trees_are_the_ar_law_too(vocabulary: int, block: int, prompt: list[int], new: int) -> None:
    check_ar_law(vocabulary, block, prompt, new)


@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [
        (3, {"temperature": 0.6}),
        (3, {"schedule": "fused"}),
        (3, {"min_p": 0.6, "logit_bias": {0: 0.7}}),
        (3, {"typical_p": 0.5}),
        pytest.param(4, {"top_k": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"min_p": 0.3, "suppress_tokens": [1]}, marks=pytest.mark.slow),
        pytest.param(4, {"typical_p": 0.8, "logit_bias": {2: 1.0}}, marks=pytest.mark.slow),
        pytest.param(4, {"top_p": 0.8, "temperature": 1.4}, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_ar_law_under_every_sampling_option(vocabulary: int, options: dict[str, object]) -> None:
    model = engine(vocabulary=vocabulary, seed=5)
    sampling = {name: value for name, value in options.items() if name != "schedule"}
    law = s2d2_law(model, [0, 1], 2, 2, **options)
    assert distance(law, ar_law(model, [0, 1], 2, **sampling)) < EXACT


@pytest.mark.parametrize(
    "options",
    [
        {"cache_ver": False, "draft_ver": False},  # cached tokens saw the tokens after them
        {"do_sample": False},  # an argmax draft is no draw from p
        {"allow_resample": False},  # rejected drafts stay
        {"ssd_ratio_tempering_factor": 0.5},
    ],
)
def test_without_one_of_the_conditions_it_is_not(options: dict[str, object]) -> None:
    model = engine(vocabulary=3, seed=5)
    prompt = [0, 1]
    law = s2d2_law(model, prompt, 2, 2, **options)
    assert sum(law.values()) == pytest.approx(1.0, abs=EXACT)
    assert distance(law, ar_law(model, prompt, 2)) > 1e-3


def test_the_ar_decoder_and_scoring_are_the_same_law() -> None:
    model = engine(vocabulary=4, seed=5)
    prompt, new = [2, 0, 1], 3
    law = ar_law(model, prompt, new)
    texts = list(product(range(3), repeat=new))
    scores = model.score([(prompt, list(text)) for text in texts])
    for text, (log_likelihood, _) in zip(texts, scores, strict=True):
        assert law[text] == pytest.approx(math.exp(log_likelihood), abs=EXACT)


def test_block_length_one_is_the_ar_law_whatever_the_decoder() -> None:
    model = engine(vocabulary=4, seed=5)
    for decoder in ("s2d2", "static", "dynamic", "sequential"):
        law = law_of(model, [2, 0], 2, {"decoder": decoder, "block_length": 1, "do_sample": True})
        assert distance(law, ar_law(model, [2, 0], 2)) < EXACT
