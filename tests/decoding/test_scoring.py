"""Scores of shared contexts are those of every pair alone, and of a plain forward; a context runs once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from s2d2_lmeval import BlockDiffusionModel, load
from s2d2_lmeval.decoding import scoring
from s2d2_lmeval.errors import RequestError

from .tiny import VOCABULARY, engine, tiny_model


def causal() -> BlockDiffusionModel:
    """A plain causal model: what a stock ``generate`` would do with the tiny weights."""
    return load(tiny_model(), max_batch=3, family="qwen3")


def models() -> dict[str, BlockDiffusionModel]:
    return {"unshifted": engine(max_batch=3), "causal": causal()}


def drawn(rng: random.Random, shifted: bool) -> list[tuple[list[int], list[int]]]:
    """Pairs over few contexts, some of them many times; continuations with common beginnings, one very long."""
    contexts = [[rng.randrange(VOCABULARY - 1) for _ in range(rng.randint(int(shifted), 40))] for _ in range(3)]
    pairs = []
    for _ in range(14):
        target = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
        pairs.append((rng.choice(contexts), target))
    pairs.append((contexts[0], [rng.randrange(VOCABULARY - 1) for _ in range(60)]))
    return pairs


@pytest.mark.parametrize("name", ["unshifted", "causal"])
@pytest.mark.parametrize("seed", range(6))
def test_together_as_alone(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks so small that contexts, branches and long continuations take several forwards."""
    model = models()[name]
    pairs = drawn(random.Random(seed), name == "causal")
    alone = [model.score([pair])[0] for pair in pairs]
    for chunk in (scoring.CHUNK, 16, 5):
        monkeypatch.setattr(scoring, "CHUNK", chunk)
        told: dict[int, tuple[float, bool]] = {}
        together = model.score(pairs, told.__setitem__)
        assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-9)
        assert [best for _, best in together] == [best for _, best in alone]
        assert told == dict(enumerate(together))


def test_a_causal_model_s_scores_are_those_of_one_plain_forward() -> None:
    for context, target in drawn(random.Random(9), True):
        ids = torch.tensor([[*context, *target]])
        with torch.no_grad():
            log_p = tiny_model()(ids).logits[0].log_softmax(-1)
        rows = log_p[len(context) - 1 : -1]
        expected = rows.gather(1, torch.tensor(target).unsqueeze(1)).sum().item()
        score, best = causal().score([(context, target)])[0]
        assert score == pytest.approx(expected, abs=1e-9)
        assert best == (rows.argmax(-1).tolist() == target)


@pytest.mark.parametrize(("name", "beside"), [("unshifted", 4), ("causal", 0)])
def test_choices_run_their_context_once(name: str, beside: int) -> None:
    """Four letters after a long context: one mask each where the model needs it, nothing where it does not."""
    model = models()[name]
    model.trace.reset()
    context = [n % (VOCABULARY - 1) for n in range(200)]
    model.score([(context, [letter]) for letter in range(4)])
    totals = model.trace.totals()
    assert totals["forwards"] == 1
    assert totals["queries"] == 200 + beside


def test_the_last_token_takes_no_position_where_logits_are_shifted() -> None:
    for name, model in models().items():
        longest = model.max_context + (name == "causal")
        assert model.max_score_length == longest
        ids: list[Any] = [n % (VOCABULARY - 1) for n in range(longest)]
        assert model.score([(ids[:1], ids[1:])])[0][0] < 0
        with pytest.raises(RequestError, match="the context holds"):
            model.score([(ids[:1], [*ids[1:], 1])])
