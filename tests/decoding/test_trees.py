"""Draft trees: the same nodes as a best-first heap, and the best use of a row budget by trying everything."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d2_lmeval.decoding.rounds import budgets as tree_budget
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.trees import NOBODY, NODE, SEED, TEXT, VERIFIER, WINDOW, ancestors, tree_visibility
from s2d2_lmeval.runtime.graphs import Tables
from s2d2_lmeval.runtime.visibility import NOBODY as UNSEEN

TABLES = Tables(torch.device("cpu"))


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


def offers(tree: trees.Tree, row: int, terms: tree_budget.Terms) -> list[tuple[int, tuple[int, ...], int, float]]:
    """Everything that a row can run: nodes, windows, queries, expected tokens (the root's own left out)."""
    real = int((tree.value[row] > 0).sum())
    found = []
    for count in range(real + 1):
        reach = [1.0, *tree.value[row, :count].tolist()]
        ends = list(reach)
        for place in range(count):
            ends[int(tree.parent[row, place])] -= reach[place + 1]
        for size in range(count + 2):
            for windows in itertools.combinations(range(count + 1), size):
                tokens = sum(reach[1:]) + float(terms.draft_value) * sum(ends[node] for node in windows)
                found.append((count, windows, terms.node * count + terms.window * size, tokens))
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 5),
    budgets=st.lists(st.integers(0, 22), min_size=3, max_size=3),
    terms=st.builds(
        tree_budget.Terms,
        st.integers(1, 2),
        st.integers(1, 5),
        st.sampled_from([0.0, 0.7, 4.0]).map(torch.tensor),
        st.just(99),
    ),
)
def test_a_budget_of_its_own_is_spent_best(seed: int, nodes: int, budgets: list[int], terms: tree_budget.Terms) -> None:
    """Against every number of nodes and every choice of windows that fits."""
    tree = trees.grow(*marginals(seed, 3, 3, 2), nodes)
    nodes_run, has_window = tree_budget.fit(tree, torch.tensor(budgets), terms)
    for row, budget in enumerate(budgets):
        every = {(count, windows): (cost, tokens) for count, windows, cost, tokens in offers(tree, row, terms)}
        count, windows = int(nodes_run[row]), tuple(has_window[row].nonzero().flatten().tolist())
        cost, tokens = every[count, windows]
        assert cost <= budget
        assert tokens == pytest.approx(max(tokens for cost, tokens in every.values() if cost <= budget))


def test_numbers_of_nodes_are_close_together_where_they_are_small() -> None:
    for most in range(300):
        numbers = tree_budget.some_up_to(most, torch.device("cpu")).tolist()
        assert numbers[:17] == list(range(min(most, 16) + 1))
        assert all(0 < later - one <= max(one // 8, 1) for one, later in itertools.pairwise([*numbers, most + 1]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(20, 90))
def test_few_numbers_of_nodes_are_nearly_as_good_as_all(seed: int, budget: int) -> None:
    """Deep trees, whose number of nodes falls between those that are looked at."""
    tree, terms = trees.grow(*marginals(seed, 1, 8, 4), 60), tree_budget.Terms(1, 7, torch.tensor(3.0), 99)

    def tokens(nodes: torch.Tensor, windows: torch.Tensor) -> float:
        assert int(nodes) + 7 * int(windows.sum()) <= budget
        ends = tree_budget.walks_end(tree, nodes)[0, 0]
        return float(tree.value[0, : int(nodes)].sum() + 3 * ends[windows[0]].sum())

    best = 0.0
    for count in range(min(budget, 60) + 1):
        nodes = torch.tensor([[count]])
        ends = tree_budget.walks_end(tree, nodes)[0]
        windows = torch.zeros_like(ends, dtype=torch.bool)
        windows[0, ends[0].topk(min((budget - count) // 7, count + 1)).indices] = True
        best = max(best, tokens(nodes, windows))
    assert tokens(*tree_budget.fit(tree, torch.tensor([budget]), terms)) >= 0.98 * best


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 5),
    terms=st.builds(
        tree_budget.Terms,
        st.integers(1, 2),
        st.integers(1, 5),
        st.sampled_from([0.0, 0.7, 4.0]).map(torch.tensor),
        st.sampled_from([7, 99]),
    ),
)
def test_at_every_price_rows_buy_what_brings_more_than_it_costs(
    seed: int, nodes: int, terms: tree_budget.Terms
) -> None:
    tree = trees.grow(*marginals(seed, 2, 3, 2), nodes)
    bids = tree_budget.bid(tree, terms)
    assert bids.queries[:, -1].tolist() == [0, 0]
    assert (bids.queries <= terms.most).all()
    for row in range(2):
        every = offers(tree, row, terms)
        for place, price in enumerate(bids.prices.tolist()):
            gain = float(bids.tokens[row, place]) - price * int(bids.queries[row, place])
            assert gain <= max(tokens - price * cost for *_, cost, tokens in every) + 1e-5
            if terms.most == 99:
                assert gain == pytest.approx(max(tokens - price * cost for *_, cost, tokens in every), abs=1e-5)
            nodes_run, has_window = tree_budget.at_price(tree, bids, torch.tensor([place]), terms)
            count, windows = int(nodes_run[row]), tuple(has_window[row].nonzero().flatten().tolist())
            costs, tokens = {offer[:2]: offer[2:] for offer in every}[count, windows]
            assert costs == int(bids.queries[row, place])
            assert tokens == pytest.approx(float(bids.tokens[row, place]), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 60))
def test_a_shared_budget_is_kept_and_a_larger_one_never_brings_less(seed: int, budget: int) -> None:
    tree = trees.grow(*marginals(seed, 4, 4, 3), 12)
    bids = tree_budget.bid(tree, tree_budget.Terms(2, 3, torch.tensor(4.0), 40))
    brought = []
    for limit in (budget, budget + 9):
        price = tree_budget.price_within(bids, torch.tensor(limit))
        assert bids.queries.index_select(1, price).sum() <= limit
        brought.append(float(bids.tokens.index_select(1, price).sum()))
    assert brought[0] <= brought[1] + 1e-6


def test_the_price_for_the_rate_is_the_best_of_all_prices() -> None:
    """Free forwards buy everything, forwards whose every query is dear buy nothing, and a bend is found."""
    tree = trees.grow(*marginals(1, 2, 4, 3), 12)
    bids = tree_budget.bid(tree, tree_budget.Terms(2, 3, torch.tensor(4.0), 40))
    fixed, queries = torch.tensor([4]), torch.arange(120.0)
    spent = {}
    for name, seconds in {
        "free": torch.ones(120),
        "dear": 1 + 10 * queries,
        "bent": 1 + (queries - 20).clamp_min(0),
    }.items():
        price = tree_budget.price_for_rate(bids, seconds, fixed, rate=torch.tensor(2.0))
        spent[name] = int(bids.queries.index_select(1, price).sum())
        worth = bids.tokens.sum(0) - 2.0 * seconds[bids.queries.sum(0) + 4]
        assert worth[price] == worth.max()
    assert spent["free"] > 70
    assert spent["dear"] == 0
    assert 0 < spent["bent"] <= 16


@pytest.mark.parametrize(
    ("cost", "most"),
    [
        (lambda queries: np.ones_like(queries), 128),  # free: as wide as ever asked for
        (lambda queries: 1 + queries / 17, 73),  # two windows take 3, no round pays beyond 3 * 16 / 5
        (lambda queries: 1 + 99.0 * (queries > 34), 17),  # beyond two windows nothing can pay
    ],
)
def test_trees_grow_no_larger_than_can_pay(cost: Callable[[np.ndarray], np.ndarray], most: int) -> None:
    """Two rows, windows of 15 masks and two queries a node; before the first round 5 tokens are expected of one."""
    budget = tree_budget.QueryBudget(None, node=2, window=15, most=128, shared=True)
    budget.calibrate_costs(cost(np.arange(2 * 128 + 1.0)), 2, TABLES)
    assert budget.most == most


def bought_at(budget: tree_budget.QueryBudget, tree: trees.Tree, rows: int) -> tuple[int, int, float]:
    """Nodes and windows that all of ``rows`` buy together, and the price of a query."""
    running = torch.ones(rows, dtype=torch.bool)
    learned = torch.from_numpy(budget.learned()).view(torch.float64)
    drafted = (tree.value > 0).any(1, keepdim=True)
    nodes, windows, price = budget.buy(tree, drafted, running, torch.zeros_like(drafted), *learned)
    return int(nodes.sum()), int(windows.sum()), float(price)


def test_auto_gives_up_drafting_where_it_does_not_pay_and_tries_again() -> None:
    """Two rows whose forwards cost 20 and one for every query; no draft ever stands."""
    budget = tree_budget.QueryBudget(None, node=2, window=15, most=64, shared=True)
    seconds = 20 + np.arange(2 * 64 + 1.0)
    budget.calibrate_costs(seconds, 2, TABLES)
    undrafted = trees.empty(2, 20, torch.device("cpu"), torch.float32)
    drafted = trees.grow(*marginals(1, 2, 5, 4), 20)
    tried = []
    for _ in range(1500):
        _, windows, _ = bought_at(budget, undrafted, 2)
        tried.append(windows > 0)
        budget.step_took(float(seconds[4 + 15 * windows]), 4 + 15 * windows, 0)
        for _ in range(2):
            budget.round_ran(0, 0, 0.0)
        if windows:
            nodes, _, price = bought_at(budget, drafted, 2)
            budget.step_took(float(seconds[4 + 2 * nodes]), 4 + 2 * nodes, 0)
            for _ in range(2):
                budget.round_ran(max(nodes // 2, 1), 0, price)
    assert tried[0]
    assert 0 < sum(tried[100:]) < 110


def test_the_price_paid_is_the_time_that_was_bought() -> None:
    tree = trees.grow(*marginals(1, 2, 4, 3), 12)
    bids = tree_budget.bid(tree, tree_budget.Terms(2, 3, torch.tensor(4.0), 40))
    seconds = 1 + 0.5 * (torch.arange(200.0) - 10).clamp_min(0)  # the first ten queries are free
    fixed, all_of_it = torch.tensor([4]), torch.tensor([0])
    bought = int(bids.queries[:, 0].sum())
    price = tree_budget.price_paid(bids, seconds, fixed, torch.tensor(2.0), all_of_it)
    assert float(price) == pytest.approx(2.0 * 0.5 * (bought + 4 - 10) / bought)
    nothing = torch.tensor([bids.prices.numel() - 1])
    assert float(tree_budget.price_paid(bids, seconds, fixed, torch.tensor(2.0), nothing)) == 0


def test_prompts_do_not_count_in_the_rate() -> None:
    """A step that ran a prompt beside its rounds teaches what the same step without it would have taught."""
    with_prompt, without = (tree_budget.QueryBudget(None, 2, 15, 64, shared=True) for _ in range(2))
    seconds = 3.0 + np.arange(200.0)
    for budget in (with_prompt, without):
        budget.calibrate_costs(seconds, 1, TABLES)
    with_prompt.step_took(float(seconds[80]), 80, 63)
    without.step_took(float(seconds[17]), 17, 0)
    tree = trees.grow(*marginals(3, 1, 5, 4), 20)
    assert bought_at(with_prompt, tree, 1) == bought_at(without, tree, 1)


def test_who_sees_whom() -> None:
    """Two text tokens, a root with children 1 and 2, and 3 below 1; windows at the root and at 3."""
    parent = torch.tensor([[0, 0, 0, 1]])
    kind = torch.tensor([[TEXT, TEXT, NODE, NODE, NODE, *[VERIFIER] * 4, *[WINDOW] * 4, NOBODY]])
    owner = torch.tensor([[0, 0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 3, 3, 0]])
    rank = torch.tensor([[0, 1, *[UNSEEN] * 12]])
    visible = tree_visibility(rank, kind, owner, ancestors(parent, 2), torch.tensor([0]))[0]
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


def test_a_window_sees_its_seed_in_place_of_what_that_repeats() -> None:
    """Two text tokens, a node below the root and one below that; windows at the root and at the lower node."""
    kind = torch.tensor([[TEXT, TEXT, NODE, NODE, SEED, WINDOW, WINDOW, SEED, WINDOW, WINDOW, NOBODY]])
    owner = torch.tensor([[0, 0, 1, 2, 0, 0, 0, 2, 2, 2, 0]])
    above = ancestors(torch.tensor([[0, 0, 1]]), 2)
    rank = torch.tensor([[0, 1, *[UNSEEN] * 9]])
    visible = tree_visibility(rank, kind, owner, above, torch.tensor([0]), seeds=True)[0]
    seen = [set(row.nonzero().flatten().tolist()) for row in visible[:-1]]
    at_root, at_node = {0, 4, 5, 6}, {0, 1, 2, 7, 8, 9}
    assert seen == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, *[at_root] * 3, *[at_node] * 3]
