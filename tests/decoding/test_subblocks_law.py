"""The law of S2D2 on sub-blocks by exact enumeration: sampled, always verified and cached like AR, it is the AR law."""

from __future__ import annotations

import pytest
import torch

from s2d2_lmeval.decoding.blocks import s2d2

from .subblocks_drawn import engine
from .test_exact_law import EXACT, Enumeration, Law, ar_law, distance

PART = 2


class SubblockEnumeration(Enumeration):
    """Draws come in three shapes: a sub-block's drafts, a replacement, and the first token of a block."""

    replaces = False

    def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
        drawn = probabilities.argmax(-1)
        single = len(probabilities) == 1
        for row in range(0 if single else self.decided, len(probabilities)):
            drawn[row] = self.branch(probabilities[row].tolist())
        if single and not self.replaces:
            self.decided = 1
        self.replaces = False
        return drawn

    def uniform(self, n: int) -> torch.Tensor:
        accepts = self.ratios.tolist()
        assert n == len(accepts)
        self.decided = PART - n  # a block's first token is not always drawn
        rejected = self.first_rejected(accepts)
        self.replaces = rejected < n
        self.decided = (self.decided + min(rejected + 1, n)) % PART
        return torch.tensor([1.0 if i == rejected else 0.0 for i in range(n)], dtype=torch.float64)


def law(prompt: list[int], new: int, **others: object) -> Law:
    """The distribution of the ``new`` tokens after ``prompt``, by decoding every path."""
    options = {
        "decoder": "s2d2",
        "block_length": 2 * PART,
        "small_block_size": PART,
        "do_verify_policy": "mask_span_length",
        "do_sample": True,
        "temperature": 1.0,
        "cache_ver": True,
        "draft_ver": True,
        "sample_first_token": True,
        **others,
    }
    found: Law = {}
    scripts: list[list[int]] = [[]]
    running: list[SubblockEnumeration] = []
    ratio_of = s2d2.acceptance_ratio

    def recorded(*arguments: torch.Tensor) -> torch.Tensor:
        running[-1].ratios = ratio_of(*arguments)  # type: ignore[arg-type]
        return running[-1].ratios

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s2d2, "acceptance_ratio", recorded)
        while scripts:
            source = SubblockEnumeration(scripts.pop(), len(prompt) % PART, PART)
            running[:] = [source]
            config = {**options, "random_source": source, "max_new_tokens": new, "stop_token_ids": ()}
            tokens = tuple(engine(seed=5, vocabulary=3).generate([prompt], config)[0].token_ids)
            found[tokens] = found.get(tokens, 0.0) + source.probability
            scripts += source.pending
    return found


@pytest.mark.parametrize(("prompt", "new"), [([0, 1, 1], 3), ([0, 1, 1, 0], 2), ([1], 2), ([1, 0], 2)])
def test_sampled_and_always_verified_it_is_the_ar_law(prompt: list[int], new: int) -> None:
    found = law(prompt, new)
    assert sum(found.values()) == pytest.approx(1.0, abs=EXACT)
    assert distance(found, ar_law(engine(seed=5, vocabulary=3), prompt, new, temperature=1.0)) < EXACT


@pytest.mark.parametrize(
    "options",
    [
        {"sample_first_token": False},  # published: the argmax
        {"cache_ver": False, "draft_ver": False},  # cached tokens saw the tokens after them
        {"do_sample": False},
    ],
)
def test_without_one_of_the_conditions_it_is_not(options: dict[str, object]) -> None:
    found = law([0, 1, 1], 3, **options)
    assert sum(found.values()) == pytest.approx(1.0, abs=EXACT)
    assert distance(found, ar_law(engine(seed=5, vocabulary=3), [0, 1, 1], 3, temperature=1.0)) > 1e-3
