"""Scoring of models with shifted logits: the row of a token speaks of the next one."""

from __future__ import annotations

import pytest
import torch

from s2d2_lmeval.decoding import scoring
from s2d2_lmeval.errors import RequestError

from .subblocks_drawn import MASK, engine, shifted_model


def by_plain_forward(context: list[int], target: list[int]) -> tuple[float, bool]:
    logits = shifted_model(seed=1)(input_ids=torch.tensor([[*context, *target]])).logits[0, len(context) - 1 : -1]
    logits[:, MASK] = -torch.inf
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(target)[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == torch.tensor(target)).all())


@pytest.mark.parametrize("chunk", [256, 5, 1])
def test_scores_are_those_of_a_plain_forward(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    pairs = [([7 * i % MASK for i in range(n)], [(5 * i + n) % MASK for i in range(m)]) for n, m in
             ((1, 1), (1, 9), (5, 1), (4, 6), (9, 4), (10, 11))]  # fmt: skip
    greedy = engine(seed=1).generate([[3, 1]], {"decoder": "ar", "max_new_tokens": 7})[0].token_ids
    pairs.append(([3, 1], greedy))
    for (score, best), pair in zip(engine(seed=1, max_batch=3).score(pairs), pairs, strict=True):
        expected, expected_best = by_plain_forward(*pair)
        assert score == pytest.approx(expected, abs=1e-9)
        assert best == expected_best
    assert engine(seed=1).score(pairs[-1:])[0][1]


def test_nothing_predicts_the_first_token() -> None:
    with pytest.raises(RequestError, match="first token"):
        engine().score([([], [1, 2])])
