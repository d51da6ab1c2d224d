"""Draft trees: the same nodes as a best-first heap, and the best use of a row budget by trying everything."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d2_lmeval.decoding import trees
from s2d2_lmeval.decoding.sliding import NOBODY, NODE, TEXT, VERIFIER, WINDOW, ancestors, tree_visibility


def marginals(seed: int, rows: int, depths: int, choices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, best first, and token ids (rows, depths, choices)."""
    logits = torch.randn(rows, depths, choices, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    return logits.log_softmax(-1).sort(dim=-1, descending=True)


def heap_tree(log_p: torch.Tensor, token: torch.Tensor, nodes: int) -> set[tuple[int, ...]]:
    """Token paths of the best-first tree, built one node at a time."""
    depths, choices = log_p.shape
    heap = [(-float(log_p[0, rank]), (int(token[0, rank]),)) for rank in range(choices)]
    heapq.heapify(heap)
    paths = set()
    while heap and len(paths) < nodes:
        cost, path = heapq.heappop(heap)
        paths.add(path)
        if len(path) < depths:
            for rank in range(choices):
                child = (*path, int(token[len(path), rank]))
                heapq.heappush(heap, (cost - float(log_p[len(path), rank]), child))
    return paths


def paths_of(tree: trees.Tree, row: int) -> list[tuple[int, ...]]:
    """Token path of every real node, in the tree's order."""
    paths: list[tuple[int, ...]] = [()]
    for place in range(tree.token.shape[1]):
        if tree.value[row, place] > 0:
            parent = int(tree.parent[row, place])
            assert parent <= place, "a parent comes before its child"
            paths.append((*paths[parent], int(tree.token[row, place])))
            assert int(tree.depth[row, place]) == len(paths[-1])
    return paths[1:]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), depths=st.integers(1, 5), choices=st.integers(1, 5), nodes=st.integers(1, 30))
def test_same_nodes_as_the_heap(seed: int, depths: int, choices: int, nodes: int) -> None:
    log_p, token = marginals(seed, 3, depths, choices)
    tree = trees.grow(log_p, token, nodes)
    for row in range(3):
        paths = paths_of(tree, row)
        assert len(set(paths)) == len(paths)
        assert set(paths) == heap_tree(log_p[row], token[row], nodes)
        values = [sum(float(log_p[row, d, token[row, d].tolist().index(t)]) for d, t in enumerate(p)) for p in paths]
        assert tree.value[row, : len(paths)].log().tolist() == pytest.approx(values)
        assert values == sorted(values, reverse=True)


def test_ruled_out_choices_are_no_nodes() -> None:
    log_p, token = marginals(0, 1, 4, 3)
    log_p[:, 2:] = -torch.inf
    tree = trees.grow(log_p, token, 30)
    assert {len(path) for path in paths_of(tree, 0)} == {1, 2}


def test_one_choice_per_depth_is_the_chain() -> None:
    log_p, token = marginals(3, 1, 6, 4)
    tree = trees.grow(log_p[:, :, :1], token[:, :, :1], 6)
    assert tree.parent.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert tree.token[0].tolist() == token[0, :, 0].tolist()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 5),
    budget=st.integers(4, 24),
    window=st.integers(1, 5),
    worth=st.sampled_from([0.0, 0.7, 4.0]),
)
def test_the_budget_is_spent_best(seed: int, nodes: int, budget: int, window: int, worth: float) -> None:
    """Against every number of nodes and every choice of windows that fits."""
    log_p, token = marginals(seed, 1, 3, 2)
    tree = trees.grow(log_p, token, nodes)
    chosen = trees.shape(tree, budget, window, worth)

    def value(count: int, windows: tuple[int, ...]) -> float:
        reach = [1.0, *tree.value[0, :count].tolist()]
        ends = list(reach)
        for place in range(count):
            ends[int(tree.parent[0, place])] -= reach[place + 1]
        return sum(reach) + worth * sum(ends[node] for node in windows)

    real = int((tree.value[0] > 0).sum())
    best = max(
        value(count, windows)
        for count in range(real + 1)
        for size in range(count + 2)
        if 2 + 2 * count + size * window <= budget
        for windows in itertools.combinations(range(count + 1), size)
    )
    count = int(chosen.nodes[0])
    windows = tuple(chosen.windows[0].nonzero().flatten().tolist())
    assert 2 + 2 * count + len(windows) * window <= budget
    assert all(node <= count for node in windows)
    assert value(count, windows) == pytest.approx(best)


def test_who_sees_whom() -> None:
    """Two text tokens, a root with children 1 and 2, and 3 below 1; windows at the root and at 3."""
    parent = torch.tensor([[0, 0, 0, 1]]).numpy()
    kind = torch.tensor([[TEXT, TEXT, NODE, NODE, NODE, *[VERIFIER] * 4, *[WINDOW] * 4, NOBODY]])
    owner = torch.tensor([[0, 0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 3, 3, 0]])
    visible = tree_visibility(kind, owner, torch.from_numpy(ancestors(parent, 3)))[0]
    seen = [set(row.nonzero().flatten().tolist()) for row in visible]
    assert seen == [
        {0},
        {0, 1},
        {0, 1, 2},
        {0, 1, 3},
        {0, 1, 2, 4},
        {0, 1, 5},
        {0, 1, 2, 6},
        {0, 1, 3, 7},
        {0, 1, 2, 4, 8},
        {0, 1, 5, 9, 10},
        {0, 1, 5, 9, 10},
        {0, 1, 2, 4, 8, 11, 12},
        {0, 1, 2, 4, 8, 11, 12},
        {0, 1, 13},
    ]
