"""Counted pairs in the growth of trees, against their definition."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.hints import READ, Hints
from s2d2_lmeval.decoding.rounds.pairs import SMOOTHING, UNSEEN
from s2d2_lmeval.runtime.graphs import Tables

from .test_trees import marginals, paths_of


def setup_of(slots: int, depths: int = 4, **config: Any) -> Any:
    """What a run needs of its hints."""
    options = SimpleNamespace(**{"pairs": 0.5, "lookup": False, **config})
    facts = SimpleNamespace(vocab_size=50)
    return SimpleNamespace(tables=Tables(torch.device("cpu")), facts=facts, slots=slots, config=options)


def counted(texts: list[list[int]], weight: float) -> Hints:
    """What is known of whole texts, one row each, as so many steps tell them."""
    rows = SimpleNamespace(tokens=texts, count=len(texts), active=lambda: np.arange(len(texts)))
    hints = Hints(setup_of(len(texts), pairs=weight), 4)
    for _ in range(max(map(len, texts)) // READ + 1):
        hints.read(torch.from_numpy(hints.told(rows)["fresh"]))  # type: ignore[arg-type]
    return hints


def branches(hints: Hints, log_p: torch.Tensor, token: torch.Tensor, root: list[int]) -> trees.Branches:
    tail, every = torch.tensor(root).unsqueeze(1), torch.arange(len(root))
    choices, found = hints.branches(log_p, token, tail, torch.ones_like(token[:, :, 0], dtype=torch.bool), every)
    assert choices is token
    return found


def slow_values(
    log_p: torch.Tensor, token: torch.Tensor, root: int, texts: list[list[int]], weight: float
) -> dict[tuple[int, ...], float]:
    """The value of every path."""
    pair = Counter(two for text in texts for two in itertools.pairwise(text))
    single = Counter(one for text in texts for one in text[1:])
    values = {(): 1.0}
    frontier = [()]
    for depth, (scores, tokens) in enumerate(zip(log_p.tolist(), token.tolist(), strict=True)):
        assert depth < 10
        grown = []
        for path in frontier:
            above = path[-1] if path else root
            usual = [(single[one] + SMOOTHING) / (single.total() + UNSEEN) for one in tokens]
            factors = [(1 + pair[above, one] / share) ** weight for one, share in zip(tokens, usual, strict=True)]
            given = [math.exp(score) * factor for score, factor in zip(scores, factors, strict=True)]
            mass = sum(map(math.exp, scores)) / sum(given)
            for one, worth in zip(tokens, given, strict=True):
                grown.append((*path, one))
                values[grown[-1]] = values[path] * worth * mass
        frontier = grown
    del values[()]
    return values


@pytest.mark.parametrize("seed", range(12))
def test_the_tree_is_the_best_by_its_values(seed: int) -> None:
    rng = random.Random(seed)
    log_p, token = marginals(seed, 2, 3, 3)
    texts = [[rng.choice(token[0, 0].tolist() + token[0, 1].tolist()) for _ in range(40)] for _ in range(2)]
    root = [texts[0][-1], 7]
    tree = trees.grow(log_p, token, 9, branches=branches(counted(texts, 0.5), log_p, token, root))
    for row in range(2):
        values = slow_values(log_p[row], token[row], root[row], texts, 0.5)
        found = paths_of(tree, row)
        assert tree.value[row].tolist() == pytest.approx([values[path] for path in found], rel=1e-4)
        assert sorted(tree.value[row].tolist()) == pytest.approx(sorted(values.values())[-9:], rel=1e-4)
        assert all(parent <= place for place, parent in enumerate(tree.parent[row].tolist()))


def test_nothing_counted_leaves_trees_as_they_are() -> None:
    log_p, token = marginals(3, 2, 5, 4)
    log_p[1, 2:] = -torch.inf
    nothing = branches(counted([[1], [2]], 0.5), log_p, token, [1, 2])
    plain, given = trees.grow(log_p, token, 20), trees.grow(log_p, token, 20, branches=nothing)
    real = plain.value > 0
    for name in ("token", "parent", "depth"):
        assert torch.equal(getattr(plain, name)[real], getattr(given, name)[real])
    torch.testing.assert_close(plain.value, given.value)


def test_every_token_is_told_once() -> None:
    rng = random.Random(0)
    texts = [[rng.randrange(50) for _ in range(length)] for length in (2 * READ + 7, 3, READ, 1)]
    pairs = counted(texts, 0.5).pairs
    assert pairs is not None
    assert pairs.tokens.tolist() == [Counter(one for text in texts for one in text[1:])[one] for one in range(50)]
    assert int(pairs.counts.sum()) == sum(len(text) - 1 for text in texts)


def test_sure_drafts_are_trees_too() -> None:
    """Where a position's choices are all there is of it, rounding may make them more than that."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        log_p = (20 * torch.randn(1, 6, 4, generator=generator)).log_softmax(2).sort(descending=True).values.double()
        token = torch.rand(1, 6, 9, generator=generator).argsort(2)[:, :, :4]
        text = torch.randint(9, (60,), generator=generator).tolist()
        found = branches(counted([text], 0.5), log_p, token, [text[-1]])
        for nodes in (3, 6, 12):
            assert paths_of(trees.grow(log_p, token, nodes, branches=found), 0)
