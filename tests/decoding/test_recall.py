"""What followed the text's end before, as a choice in the growth of trees: against its definition, and as sliding and
ddtree use it.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.hints import READ, Hints
from s2d2_lmeval.decoding.rounds.recall import BUCKETS, GRAM, KEPT, LONGEST, NO_CELL, PRIOR, Recall

from . import drafting_tiny, tiny
from .test_pairs import setup_of
from .test_trees import marginals, paths_of

DEPTHS = 5


def told(texts: list[list[int]], ends: list[int]) -> Hints:
    """The ``texts``, one row each, as they grow: up to each of the ``ends`` in turn."""
    hints = Hints(setup_of(len(texts), pairs=0, lookup=True), DEPTHS)
    for end in ends:
        grown = SimpleNamespace(
            tokens=[text[:end] for text in texts], count=len(texts), active=lambda: np.arange(len(texts))
        )
        hints.read(torch.from_numpy(hints.told(grown)["fresh"]))  # type: ignore[arg-type]
    return hints


def recall_of(hints: Hints) -> Recall:
    assert hints.recall is not None
    return hints.recall


def tail_of(texts: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[-1] * max(LONGEST - len(text), 0) + text[-LONGEST:] for text in texts])


def match(text: list[int], place: int, tail: list[int]) -> int:
    """How many tokens before ``place`` are those at the end of ``tail``."""
    length = 0
    while length < min(place, len(tail), LONGEST) and text[place - 1 - length] == tail[-1 - length]:
        length += 1
    return length


@pytest.mark.parametrize("seed", range(15))
def test_the_longest_match_is_followed_the_latest_of_a_length(seed: int) -> None:
    rng = random.Random(seed)
    texts = [[rng.randrange(1, 4 + 3 * (seed % 3)) for _ in range(READ)] for _ in range(3)]
    hints = told(texts, [rng.randrange(1, 9), rng.randrange(9, 20), READ, READ])
    said, length = recall_of(hints).follow(tail_of(texts), torch.arange(3), DEPTHS)
    for row, text in enumerate(texts):
        matches = [
            (match(other, place, text), other is text, place, other)
            for other in texts
            for place in range(1, READ)
            if match(other, place, text)
        ]
        longest = max((found[0] for found in matches), default=0)
        assert int(length[row, 0]) == longest
        follows = {tuple(other[place : place + DEPTHS]) for found, _, place, other in matches if found == longest}
        mine = tuple(token for token in said[row].tolist() if token >= 0)
        assert mine in follows if longest else not mine
        assert length[row].tolist() == [min(longest + ahead, LONGEST) for ahead in range(DEPTHS)]
        own = [place for found, is_own, place, _ in matches if is_own and found == longest]
        if own and longest <= GRAM:
            # As long a match of the row's own comes first; it is the latest of the longest n-gram.
            assert mine == tuple(text[own[-1] : own[-1] + DEPTHS])


def test_the_memory_of_a_row_is_a_ring() -> None:
    rng = random.Random(0)
    text = [rng.randrange(1000) for _ in range(KEPT + 200)]
    hints = told([text], [*range(READ, len(text), READ), len(text)])
    for place, known in ((150, False), (KEPT + 100, True), (KEPT - 5, True)):
        said, _ = recall_of(hints).follow(tail_of([text[:place]]), torch.tensor([0]), DEPTHS)
        assert (said[0].tolist() == text[place : place + DEPTHS]) == known


@pytest.mark.parametrize("seed", range(10))
def test_trees_mix_what_is_said_into_what_is_drafted(seed: int) -> None:
    """Every path is worth its tokens' probabilities, of which what is said takes its trust wherever it is new."""
    rng = random.Random(seed)
    log_p, token = marginals(seed, 2, 3, 4)
    follows = [rng.choice(token[0, depth].tolist() if rng.random() < 0.5 else [49]) for depth in range(3)]
    texts = [[7, 8, *follows, 9, 9, 7, 8], [6, 5]]
    hints, tail = told(texts, [len(texts[0])]), tail_of(texts)
    recall_of(hints).right[:] = torch.rand(NO_CELL + 1) * 3
    recall_of(hints).tried[:] = 4
    room = torch.ones(2, 3, dtype=torch.bool)
    choices, branches = hints.branches(log_p, token, tail, room, torch.arange(2))
    tree = trees.grow(log_p, choices, 30, branches=branches)
    assert torch.equal(choices[1], token[1])
    paths = paths_of(tree, 0)
    assert len(set(paths)) == len(paths)
    for path, value in zip(paths, tree.value[0].tolist(), strict=True):
        worth = 1.0
        for depth, one in enumerate(path):
            drafted = dict(zip(token[0, depth].tolist(), log_p[0, depth].exp().tolist(), strict=True))
            if follows[depth] not in drafted:
                drafted.pop(int(token[0, depth, -1]))
            said, top = follows[depth], max(drafted.values())
            trust = 0.0
            if (depth == 0 or path[depth - 1] == follows[depth - 1]) and drafted.get(said) != top:
                cell = (2 + depth) * BUCKETS + 1 + min(int(top * (BUCKETS - 1)), BUCKETS - 2)
                trust = (float(recall_of(hints).right[cell]) + 1 - top) / (4 + PRIOR)
            worth *= drafted.get(one, 0.0) * (1 - trust) + trust * (one == said)
        assert value == pytest.approx(worth, rel=1e-4, abs=1e-9)


def test_trust_is_learned_where_the_path_followed_what_was_said() -> None:
    hints = Hints(setup_of(4, pairs=0, lookup=True), DEPTHS)
    recall = recall_of(hints)
    recall.said[:, :3] = torch.tensor([1, 2, 3])
    recall.cell[:, :3] = torch.tensor([10, 11, 12])
    path = torch.tensor([[0, 1, 2, 0], [0, 0, 0, 0], [0, 4, 0, 0], [0, 1, 2, 3]])
    tokens = torch.tensor([[0, 1, 2, 0, 7], [0, 0, 0, 0, 1], [0, 5, 0, 0, 2], [0, 1, 2, 3, 9]])
    running = torch.tensor([[1], [1], [1], [0]])
    tail = tail_of([[4, 4], [5], [6], [7]])
    hints.decided({"running": running, "tail": tail}, path, tokens)  # type: ignore[arg-type]
    # Decided: 1 2 7, 1, 5 2 and, of a row that does not run, nothing.
    assert recall.tried[[10, 11, 12]].tolist() == [3, 1, 1]
    assert recall.right[[10, 11, 12]].tolist() == [2, 1, 0]
    assert recall.tried.sum() == 5
    assert (recall.said[:3] == -1).all()
    assert recall.said[3, :3].tolist() == [1, 2, 3]
    assert [row[-4:] for row in hints.tail().tolist()][:3] == [[4, 1, 2, 7], [-1, -1, 5, 1], [-1, 6, 5, 2]]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("decoder", ["sliding", "ddtree"])
def test_text_that_repeats_takes_fewer_forwards_for_the_tokens_of_ar(
    decoder: str, sampling: dict[str, Any], batch: int
) -> None:
    """Random weights draft badly, and repeat themselves where nothing is drawn."""
    model = tiny.engine(batch, dtype=torch.float64) if decoder == "sliding" else drafting_tiny.pair(max_batch=batch)
    options = {"decoder": decoder, **sampling}
    prompts = [[one + row for one in (1, 2, 3, 4, 5)] * 3 for row in range(9)]
    expected = model.generate(prompts, {"decoder": "ar", **sampling}, max_new_tokens=40)
    forwards = {}
    for lookup in (True, False):
        answers = model.generate(prompts, {**options, "lookup": lookup}, max_new_tokens=40)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        forwards[lookup] = sum(answer.stats["nfe"] for answer in answers)
    assert forwards[True] < forwards[False] or sampling or decoder == "sliding"
