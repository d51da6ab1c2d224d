"""Draft graphs: files, what is refused in them, how nodes are filled in, pruned and chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2d2_lmeval.decoding.spiffy.graph import DraftGraph, load_graph, parse_graph
from s2d2_lmeval.decoding.spiffy.states import Eligibility, RankTables, StateDrafter
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime.graphs import Tables

MASK = 99


def test_a_graph_comes_back_from_its_file(tmp_path: Path) -> None:
    graph = DraftGraph.of([[(0, 0)], [(0, 0), (2, 1)], [(1, 0)], [(0, 0), (1, 0), (2, 1)]], 4)
    graph = DraftGraph(graph.nodes, 4, {"family": "sdar"}, {"base": "static", "eb_threshold": None}, {"prompts": 3})
    path = tmp_path / "graph.json"
    graph.save(path)
    again = load_graph(str(path), "static")
    assert again == graph
    assert again.to_dict() == graph.to_dict()
    DraftGraph.of([], 4).save(path)
    assert load_graph(str(path), "static").nodes == ()


def broken(**changes: Any) -> str:
    plain = DraftGraph.of([[(0, 0)], [(0, 0), (1, 0)]], 4).to_dict()
    node = changes.pop("node", None)
    if node is not None:
        plain["nodes"][1] |= node
    return json.dumps({**plain, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "not valid JSON"),
        ("[]", "not a draft graph"),
        (broken(format="something"), "not a draft graph"),
        (broken(version=2), "version 2"),
        (broken(block_length=0), "block_length 0"),
        (broken(nodes=3), "no list"),
        (broken(nodes=[3]), "node 1"),
        (broken(node={"pairs": []}), r"pairs \[\] at node 2"),
        (broken(node={"pairs": [[0, 0], [1]]}), "at node 2"),
        (broken(node={"pairs": [[0, 0], [1, -1]]}), "at node 2"),
        (broken(node={"pairs": [[0, 0], [0, 1]]}), "position ranks"),
        (broken(node={"pairs": [[0, 0], [4, 0]]}), "below the block length"),
        (broken(node={"pairs": [[0, 0]]}), "twice|decided places"),
        (broken(node={"parents": [7]}), "edge 7 -> 2"),
        (broken(node={"pairs": [[0, 1], [1, 0]]}), "edge 1 -> 2"),
        (broken(node={"parents": []}), "no path"),
        (broken(node={"parents": ["a"]}), "parents"),
        (broken(node={"count": -1}), "count"),
        (broken(model=3), "model 3"),
    ],
)
def test_what_is_no_graph_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_graph(text)
    path = tmp_path / "graph.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"draft_graph=.*graph\.json"):
        load_graph(str(path), "static")


def test_which_nodes_can_be_drafted_depends_on_the_masks_left() -> None:
    graph = DraftGraph.of([[(0, 0)], [(0, 0), (1, 0)], [(2, 0)], [(0, 0), (1, 0), (2, 0)]], 3)
    masks, finishes = np.array([0, 1, 2, 3, 3, 2]), np.array([True, True, True, True, False, False])
    inside, finishing = Eligibility(graph, 3, revises=False).drafts(masks, finishes, 4)
    assert inside.astype(int).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 0, 0, 0],
    ]
    assert finishing.astype(int).tolist() == [[0] * 4, [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0] * 4, [0] * 4]
    inside, finishing = Eligibility(graph, 3, revises=False).drafts(masks, finishes, 2)
    assert (inside | finishing).sum(1).max() == 2
    inside, finishing = Eligibility(graph, 3, revises=True).drafts(masks, finishes, 4)
    assert not finishing.any()
    assert inside.astype(int).tolist()[1] == [1, 0, 0, 0]


def tables(log_p: list[list[float]], order: list[int]) -> RankTables:
    """One row: the log probabilities of the best tokens of each place, tokens named 10 * place + rank."""
    values = torch.tensor([log_p])
    tokens = torch.tensor([[[10 * place + rank for rank in range(values.shape[2])] for place in range(len(log_p))]])
    return RankTables(torch.tensor([order]), tokens, values)


def test_nodes_are_filled_with_the_places_and_tokens_of_the_latest_distribution() -> None:
    graph = DraftGraph.of([[(0, 0)], [(0, 0), (1, 1)], [(1, 0)]], 4)
    block = torch.tensor([[7, MASK, MASK, MASK]])
    ranked = tables([[0.0, 0.0], [-0.5, -1.0], [-0.7, -0.8], [-0.1, -2.0]], [3, 1, 2, 0])
    states = StateDrafter(graph, 4, False, Tables(torch.device("cpu"))).draft(
        block, block == MASK, ranked, torch.tensor([3]), torch.tensor([0])
    )
    found = {tuple(state) for state in states[0].tolist()}
    assert found == {(7, MASK, MASK, 30), (7, 11, MASK, 30), (7, 10, MASK, MASK)}


def test_pruning_keeps_the_best_nodes_by_the_papers_score_and_their_parents() -> None:
    """Against a plain computation, on random graphs and distributions: geometric means, children first."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        rng = np.random.default_rng(trial)
        every = [
            sorted(zip(places, rng.integers(0, 2, size).tolist(), strict=True))
            for size in (1, 2, 3)
            for places in combinations(range(4), size)
        ]
        chosen = [every[n] for n in sorted(rng.choice(len(every), 8, replace=False))]
        linked = DraftGraph.of(chosen, 4).nodes
        graph = DraftGraph(tuple(replace(node, parents=node.parents[1:] or (0,)) for node in linked), 4)
        log_p = torch.rand(4, 2, generator=generator).clamp_min(0.05).log()
        ranked = tables(log_p.tolist(), [2, 0, 3, 1])
        kept = int(rng.integers(1, 8))
        block = torch.full((1, 4), MASK)
        states = StateDrafter(graph, 4, False, Tables(torch.device("cpu"))).draft(
            block, block == MASK, ranked, torch.tensor([kept]), torch.tensor([0])
        )
        order = ranked.places[0].tolist()

        def own(pairs: Any, order: list[int] = order, log_p: torch.Tensor = log_p) -> float:
            return float(sum(log_p[order[place], token] for place, token in pairs)) / len(pairs)

        def score(number: int, graph: DraftGraph = graph, own: Any = own) -> float:
            node = graph.nodes[number]
            children = [n for n, other in enumerate(graph.nodes) if number + 1 in other.parents]
            below = max((score(child) for child in children), default=own(node.pairs))
            return (own(node.pairs) + below) / 2 if children else own(node.pairs)

        def closed(number: int, graph: DraftGraph = graph, score: Any = score) -> float:
            parents = graph.nodes[number].parents
            return score(number) if 0 in parents else min(score(number), max(closed(p - 1) for p in parents))

        best = sorted(range(8), key=lambda number: -closed(number))[:kept]
        expected = set()
        for number in best:
            state = [MASK] * 4
            for place, token in graph.nodes[number].pairs:
                state[order[place]] = 10 * order[place] + token
            expected.add(tuple(state))
        assert {tuple(state) for state in states[0, :kept].tolist()} == expected
