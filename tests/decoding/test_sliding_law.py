"""Sliding with ``acceptance=rejection``: the AR law by exact enumeration, as in ``test_exact_law``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from s2d2_lmeval import DecodingConfig
from s2d2_lmeval.decoding.rounds import acceptance as tree_acceptance
from s2d2_lmeval.decoding.sampling import random

from .branching import Path
from .test_exact_law import EXACT, Law, ar_law, distance
from .tiny import engine


class Enumeration(Path):
    """A random source that plays one path of one request."""

    sequential = False

    def __init__(self, script: Sequence[int]) -> None:
        super().__init__(script)
        self.ratios = torch.empty(0)

    def categorical(self, probabilities: torch.Tensor, key: random.Key) -> torch.Tensor:
        return torch.tensor([self.branch(row.tolist()) for row in probabilities])

    def uniform(self, key: random.Key, needed: torch.Tensor) -> torch.Tensor:
        accepts = self.ratios[0][needed[0]].tolist()
        rejected = self.first_rejected(accepts) if accepts else 0
        return torch.tensor([[1.0 if place == rejected else 0.0 for place in range(needed.shape[1])]])


def rejection_law(prompt: list[int], new: int, **options: object) -> tuple[Law, int]:
    """The distribution of the ``new`` tokens after ``prompt`` by decoding every path, and how many tokens stood."""
    model = engine(vocabulary=3, seed=5)
    model.max_batch = 1
    law: Law = {}
    accepted = 0
    scripts: list[list[int]] = [[]]
    ratio_of = tree_acceptance.acceptance_ratio
    config = DecodingConfig(decoder="sliding", acceptance="rejection", draft_shape="chain", do_sample=True, **options)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        while scripts:
            source = Enumeration(scripts.pop())

            def recorded(*arguments: torch.Tensor, source: Enumeration = source) -> torch.Tensor:
                source.ratios = ratio_of(*arguments)  # type: ignore[arg-type]
                return source.ratios

            patch.setattr(tree_acceptance, "acceptance_ratio", recorded)
            patch.setattr(random, "source_of", lambda *_, source=source: source)
            answer = model.generate([prompt], config, max_new_tokens=new)[0]
            tokens = tuple(answer.token_ids)
            law[tokens] = law.get(tokens, 0.0) + source.probability
            accepted += int(answer.stats["accepted"])
            scripts += source.pending
    return law, accepted


@pytest.mark.parametrize(
    ("prompt", "new", "options"),
    [
        ([0, 1], 3, {"window": 2, "row_budget": 8}),
        ([1], 3, {"window": 3, "row_budget": 12}),
        ([1, 0, 1], 3, {"window": 3, "row_budget": 20, "temperature": 0.6}),
        pytest.param([0, 0, 1], 4, {"window": 3, "row_budget": 20}, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_ar_law(prompt: list[int], new: int, options: dict[str, object]) -> None:
    law, accepted = rejection_law(prompt, new, **options)
    sampling = {"temperature": options.get("temperature", 1.0)}
    assert accepted > 0, "no draft ever stood: nothing has been tested"
    assert sum(law.values()) == pytest.approx(1.0, abs=EXACT)
    assert distance(law, ar_law(engine(vocabulary=3, seed=5), prompt, new, **sampling)) < EXACT


def test_the_residual_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: with a replacement drawn from the verifier's law as it is, the law is another."""
    monkeypatch.setattr(tree_acceptance, "residual", lambda verifier, draft: verifier)
    law, _ = rejection_law([1], 3, window=3, row_budget=12)
    assert sum(law.values()) == pytest.approx(1.0, abs=EXACT)
    assert distance(law, ar_law(engine(vocabulary=3, seed=5), [1], 3)) > 1e-3


def test_keyed_rejection_does_not_depend_on_the_batch() -> None:
    prompts = [[(5 * i + n) % 22 for i in range(4 + n)] for n in range(5)]
    options = {
        "decoder": "sliding",
        "acceptance": "rejection",
        "draft_shape": "chain",
        "do_sample": True,
        "row_budget": 40,
    }
    model = engine(dtype=torch.float64)
    answers = []
    for batch in (1, 2, 8):
        model.max_batch = batch
        answers.append([answer.token_ids for answer in model.generate(prompts, options, max_new_tokens=24)])
    assert answers[0] == answers[1] == answers[2]
