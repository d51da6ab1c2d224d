"""Counted pairs in the growth of trees, against their definition."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.pairs import SMOOTHING, UNSEEN, Pairs
from s2d2_lmeval.runtime.graphs import Tables

from .test_trees import marginals, paths_of


def counted(texts: list[list[int]], weight: float, width: int = 5) -> Pairs:
    """Pairs of whole texts, one row each, as so many steps tell them."""
    setup = SimpleNamespace(tables=Tables(torch.device("cpu")), facts=SimpleNamespace(vocab_size=50), slots=len(texts))
    rows = SimpleNamespace(tokens=texts, count=len(texts), active=lambda: np.arange(len(texts)))
    pairs = Pairs(setup, weight, width)  # type: ignore[arg-type]
    for _ in range(max(map(len, texts))):
        pairs.read(torch.from_numpy(pairs.fresh(rows)))  # type: ignore[arg-type]
    return pairs


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
    pairs = counted(texts, 0.5)
    root = torch.tensor([[texts[0][-1]], [7]])
    tree = trees.grow(log_p, token, 9, branches=pairs.branches(log_p, token, root))
    for row in range(2):
        values = slow_values(log_p[row], token[row], int(root[row]), texts, 0.5)
        found = paths_of(tree, row)
        assert tree.value[row].tolist() == pytest.approx([values[path] for path in found], rel=1e-4)
        assert sorted(tree.value[row].tolist()) == pytest.approx(sorted(values.values())[-9:], rel=1e-4)
        assert all(parent <= place for place, parent in enumerate(tree.parent[row].tolist()))


def test_nothing_counted_leaves_trees_as_they_are() -> None:
    log_p, token = marginals(3, 2, 5, 4)
    log_p[1, 2:] = -torch.inf
    branches = counted([[1], [2]], 0.5).branches(log_p, token, torch.tensor([[1], [2]]))
    plain, given = trees.grow(log_p, token, 20), trees.grow(log_p, token, 20, branches=branches)
    real = plain.value > 0
    for name in ("token", "parent", "depth"):
        assert torch.equal(getattr(plain, name)[real], getattr(given, name)[real])
    torch.testing.assert_close(plain.value, given.value)


def test_every_token_is_counted_once() -> None:
    texts = [[1, 2, 3, 1, 2, 4, 9], [5, 1, 2]]
    pairs = counted(texts, 0.5, width=3)
    assert pairs.tokens.tolist() == [Counter([2, 3, 1, 2, 4, 9, 1, 2])[one] for one in range(50)]
    assert int(pairs.counts.sum()) == 8
    assert pairs.counts.max() == 3


def test_sure_drafts_are_trees_too() -> None:
    """Where a position's choices are all there is of it, rounding may make them more than that."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        log_p = (20 * torch.randn(1, 6, 4, generator=generator)).log_softmax(2).sort(descending=True).values.double()
        token = torch.rand(1, 6, 9, generator=generator).argsort(2)[:, :, :4]
        text = torch.randint(9, (60,), generator=generator).tolist()
        branches = counted([text], 0.5).branches(log_p, token, torch.tensor([[text[-1]]]))
        for nodes in (3, 6, 12):
            assert paths_of(trees.grow(log_p, token, nodes, branches=branches), 0)
