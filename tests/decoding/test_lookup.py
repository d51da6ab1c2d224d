"""Drafts from text: what is looked up, how far it is trusted, and that sliding with them alone is ``ar``."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch

from s2d2_lmeval import BlockDiffusionModel, load
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.rounds import lookup
from s2d2_lmeval.decoding.rounds.lookup import Draft, Lookup, Text
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.studies.bench.launches import count_launches

from . import tiny
from .test_sliding import SAMPLING

VOCABULARY = 23


def follow(text: Text, tokens: list[int], seen: Lookup) -> None:
    text.tokens.extend(tokens)
    seen.follow(text)


def paths(draft: Draft) -> dict[tuple[int, ...], float]:
    """Every node's path and value."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(draft.token, draft.parent, strict=True):
        assert parent < len(found), "a parent stands before its child"
        found.append((*found[parent], token))
    assert [len(path) for path in found[1:]] == draft.depth
    return dict(zip(found[1:], draft.value, strict=True))


def slow_tree(text: Text, seen: Lookup, nodes: int, depths: int, least: float) -> dict[tuple[int, ...], float]:
    """By the definition: every path that can be looked up, with its value, then the best."""
    earlier = [seen.recent, seen.older]
    values: dict[tuple[int, ...], float] = {(): 1.0}
    frontier = [()]
    for _ in range(depths):
        grown = []
        for path in frontier:
            tail = (*text.tokens, *path)[-lookup.LONGEST :]
            texts = (text.followers, *earlier)
            longest = next((n for n in range(len(tail), 0, -1) if any(tail[-n:] in known for known in texts)), 0)
            found: dict[int, tuple[int, int, int]] = {}
            for source, followers in enumerate(texts):
                for rank, token in enumerate(followers.get(tail[len(tail) - longest :], ()) if longest else ()):
                    found.setdefault(token, (min(source, 1), longest, rank))
            for token, cell in list(found.items())[: lookup.FOLLOWERS]:
                trust = seen._hits.get(cell, lookup.PRIOR_HITS) / seen._tries.get(cell, lookup.PRIOR_TRIES)
                if values[path] * trust > least:
                    grown.append((*path, token))
                    values[grown[-1]] = values[path] * trust
        frontier = grown
    del values[()]
    return dict(sorted(values.items(), key=lambda item: -item[1])[:nodes])


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_is_the_best_of_all_continuations(seed: int) -> None:
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(6) for _ in range(count)]

    seen, text = Lookup(), Text(draw(rng.randrange(1, 20)))
    seen.finished(Text(draw(30)))
    for _ in range(rng.randrange(1, 6)):
        follow(text, draw(rng.randrange(1, 9)), seen)
    nodes, depths = rng.randrange(1, 12), rng.randrange(1, 5)
    found, expected = paths(seen.draft(text, nodes, depths, 0.02)), slow_tree(text, seen, nodes, depths, 0.02)
    assert sorted(found.values()) == pytest.approx(sorted(expected.values()))
    chain = seen.draft(text, nodes, depths, 0.02, chain=True)
    assert chain.parent == list(range(len(chain.token)))


def test_text_that_repeats_is_trusted_and_text_that_does_not_is_left_alone() -> None:
    rng = random.Random(0)
    seen, text = Lookup(), Text([1, 2, 3, 4, 5])
    follow(text, [1, 2, 3, 4, 5] * 8, seen)
    draft = seen.draft(text, 8, 15, 0.05)
    assert draft.token[:5] == [1, 2, 3, 4, 5]
    assert draft.value[0] > 0.9
    follow(text, [rng.randrange(50) for _ in range(400)], seen)
    assert not seen.draft(text, 8, 15, 0.2).token


def test_earlier_answers_are_looked_up_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, text = Lookup(), Text([7, 8])
    assert not seen.draft(text, 8, 3, 0.0).token
    seen.finished(Text([6, 7, 8, 9]))
    assert seen.draft(text, 8, 3, 0.0).token == [9]
    for _ in range(2):
        monkeypatch.setattr(seen, "_room", 0)
        seen.finished(Text([1, 2]))
    assert not seen.draft(text, 8, 3, 0.0).token


# ---- decoding ----


@cache
def model(dtype: torch.dtype = torch.float64) -> BlockDiffusionModel:
    return load(tiny.tiny_model(dtype=dtype), family="qwen3")


def decode(prompts: list[list[int]], limits: list[int], batch: int, **options: Any) -> list[Generation]:
    model().max_batch = batch
    return model().generate(prompts, options, max_new_tokens=limits)


def check(seed: int, **given: Any) -> tuple[float, float]:
    """One random case; the forwards of ``ar`` and of ``sliding``."""
    rng = random.Random(seed)
    pattern = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(2, 9))]
    prompts = [(pattern * 9)[: rng.randrange(1, 30)] for _ in range(rng.randrange(1, 6))]
    limits = [rng.randrange(1, 40) for _ in prompts]
    shared = {**rng.choice(SAMPLING), "seed": seed, "stop_token_ids": tuple(rng.sample(range(22), rng.randrange(3)))}
    own = {
        "row_budget": rng.choice(["auto", 3, 9, 64]),
        "draft_shape": rng.choice(["chain", "tree"]),
        "share_budget": rng.random() < 0.7,
        **given,
    }
    own["share_budget"] |= own["row_budget"] == "auto"
    expected = decode(prompts, limits, rng.choice([1, 2, 8]), decoder="ar", **shared)
    answers = decode(prompts, limits, rng.choice([1, 2, 8]), decoder="sliding", **shared, **own)
    for one, other in zip(expected, answers, strict=True):
        assert one.token_ids == other.token_ids, (seed, own)
        assert one.finish_reason == other.finish_reason
        assert other.stats["nfe"] <= one.stats["nfe"]
    return sum(a.stats["nfe"] for a in expected), sum(a.stats["nfe"] for a in answers)


def test_equals_ar() -> None:
    ar, sliding = (sum(column) for column in zip(*(check(seed) for seed in range(30)), strict=True))
    assert sliding < 0.8 * ar


@pytest.mark.slow
def test_equals_ar_in_many_cases() -> None:
    for seed in range(100, 400):
        check(seed)


def test_off_it_is_ar() -> None:
    """Not even a wider forward."""
    answers = decode([[1, 2, 3] * 4], [20], 1, decoder="sliding", lookup=False)
    assert answers[0].stats["nfe"] == answers[0].stats["queries"] - 11


def test_rows_that_keep_apart_do_not_depend_on_each_other() -> None:
    """With ``share_budget=false`` neither tokens nor forwards do."""
    prompts = [[1, 2, 3, 4] * 3, [1, 2, 3, 4] * 2, [5, 6] * 4]
    options = {"decoder": "sliding", "share_budget": False, "row_budget": 9}
    alone = [decode([prompt], [24], 1, **options)[0] for prompt in prompts]
    together = decode(prompts, [24] * 3, 3, **options)
    for name in ("nfe", "queries", "drafted", "accepted"):
        assert [answer.stats[name] for answer in together] == [answer.stats[name] for answer in alone]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="have no mask token"):
        decode([[1, 2]], [4], 1, decoder="sliding", window=4)
    with pytest.raises(ConfigError, match="needs drafts with a distribution"):
        decode([[1, 2]], [4], 1, decoder="sliding", acceptance="rejection", draft_shape="chain")


@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_on_a_gpu(batch: int) -> None:
    prompts = [[(7 * i + j) % (3 + i % 4) for j in range(6 + i % 9)] for i in range(batch + 1)]
    row = count_launches(model(torch.float32), {"decoder": "sliding", "max_new_tokens": 24}, batch, prompts)
    assert row.get("error") is None
    assert row["same_tokens"]
    assert row["capture_faults"] == row["device_mismatches"] == row["races"] == row["blocking"] == 0
    assert row["launches_outside"] <= 4
    assert max(row["uploads"], row["reads"]) <= 1
    assert row["replayed_share"] >= 0.98
