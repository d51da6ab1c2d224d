"""The trees of DDTree by themselves: the seeded chain, how many nodes ``auto`` runs, and who is above whom."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.ddtree import nodes_worth_running


@pytest.mark.parametrize("seed", range(4))
def test_a_seeded_chain_comes_first_then_the_best_others(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p, token = torch.randn(2, 5, 4, generator=generator).log_softmax(-1).sort(dim=-1, descending=True)
    for nodes in (3, 5, 9, 20):
        tree = trees.grow(log_p, token, nodes, seed_chain=True)
        for row in range(2):
            paths: list[tuple[int, ...]] = [()]
            for place in range(nodes):
                paths.append((*paths[int(tree.parent[row, place])], int(tree.token[row, place])))
            chain = [tuple(token[row, :depth, 0].tolist()) for depth in range(1, min(nodes, 5) + 1)]
            assert paths[1 : len(chain) + 1] == chain

            def value(path: tuple[int, ...], row: int = row) -> float:
                return sum(float(log_p[row, d, token[row, d].tolist().index(t)]) for d, t in enumerate(path))

            others = [
                tuple(path)
                for depth in range(1, 6)
                for path in itertools.product(*(token[row, d].tolist() for d in range(depth)))
                if tuple(path) not in chain
            ]
            best = sorted(others, key=value, reverse=True)[: nodes - len(chain)]
            assert set(paths[len(chain) + 1 :]) == set(best)


@pytest.mark.parametrize("seed", range(4))
def test_auto_stops_where_the_rate_stops_rising(seed: int) -> None:
    """Against every number of nodes per row."""
    generator = torch.Generator().manual_seed(seed)
    log_p, token = torch.randn(2, 3, 3, generator=generator).log_softmax(-1).sort(dim=-1, descending=True)
    tree = trees.grow(log_p, token, 6)
    seconds = torch.tensor([1.0 + 0.02 * max(queries - 4, 0) ** 1.5 for queries in range(15)])
    chosen = nodes_worth_running(tree, torch.ones(2, dtype=torch.bool), seconds, 1)

    def rate(first: int, second: int) -> float:
        tokens = 2 + float(tree.value[0, :first].sum() + tree.value[1, :second].sum())
        return tokens / float(seconds[2 + first + second])

    best = max(rate(first, second) for first in range(7) for second in range(7))
    assert rate(*chosen.tolist()) == pytest.approx(best)
    free = torch.ones(15)
    assert nodes_worth_running(tree, torch.ones(2, dtype=torch.bool), free, 1).tolist() == [6, 6], "what is free is run"
    first = nodes_worth_running(tree, torch.tensor([True, False]), free, 1)
    assert first.tolist() == [6, 0], "a row that does not wait for a draft runs nothing"


def test_ancestors_up_to_the_depth_of_the_tree() -> None:
    rng = random.Random(0)
    parents = torch.tensor([[0, 0, *(rng.randrange(place) for place in range(2, 20))] for _ in range(3)])
    depth = [0] * 20
    for node in range(1, 20):
        depth[node] = 1 + max(depth[int(parent)] for parent in parents[:, node])
    above = trees.ancestors(parents, max(depth))
    for row in range(3):
        for node in range(20):
            line, place = {0, node}, node
            while place:
                place = int(parents[row, place])
                line.add(place)
            assert set(above[row, node].nonzero().flatten().tolist()) == line
