"""Sliding self-speculation is autoregressive decoding, token for token, in fewer forwards."""

from __future__ import annotations

import random

import pytest
import torch

from s2d2_lmeval import DecodingConfig
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.errors import ConfigError

from .tiny import VOCABULARY, engine

SAMPLING = (
    {},
    {"do_sample": True, "temperature": 0.4},
    {"do_sample": True, "temperature": 1.0, "top_k": 8, "top_p": 0.9},
)


def decode(prompts: list[list[int]], budgets: list[int], max_batch: int, **options: object) -> list[Generation]:
    model = engine(dtype=torch.float64)
    model.max_batch = max_batch
    return model.generate(prompts, DecodingConfig(**options), max_new_tokens=budgets)  # type: ignore[arg-type]


def random_case(rng: random.Random) -> tuple[list[list[int]], list[int], dict[str, object], dict[str, object]]:
    prompts = [[rng.randrange(VOCABULARY - 1) for _ in range(rng.randrange(1, 30))] for _ in range(rng.randrange(1, 6))]
    budgets = [rng.randrange(1, 40) for _ in prompts]
    window = rng.choice([2, 3, 8, 16])
    shared = {
        **rng.choice(SAMPLING),
        "seed": rng.randrange(1000),
        "stop_token_ids": tuple(rng.sample(range(VOCABULARY - 1), rng.randrange(3))),
        "trim_stop_tokens": rng.random() < 0.5,
    }
    own = {
        "window": window,
        "row_budget": window + rng.choice([1, 2, 9, 48, 160]),
        "draft": rng.choice(["chain", "tree"]),
    }
    return prompts, budgets, shared, own


def check(seed: int) -> tuple[int, int]:
    """One random case; returns the forwards of ``ar`` and of ``sliding``."""
    rng = random.Random(seed)
    prompts, budgets, shared, own = random_case(rng)
    expected = decode(prompts, budgets, rng.choice([1, 2, 8]), decoder="ar", **shared)
    answers = decode(prompts, budgets, rng.choice([1, 2, 8]), decoder="sliding", **shared, **own)
    for one, other in zip(expected, answers, strict=True):
        assert one.token_ids == other.token_ids, (seed, own)
        assert one.finish_reason == other.finish_reason
        assert other.stats["nfe"] <= one.stats["nfe"]
        assert other.stats["new_tokens"] == one.stats["new_tokens"]
    return int(sum(a.stats["nfe"] for a in expected)), int(sum(a.stats["nfe"] for a in answers))


def test_equals_ar() -> None:
    forwards = [check(seed) for seed in range(20)]
    ar, sliding = (sum(column) for column in zip(*forwards, strict=True))
    assert sliding < 0.9 * ar, "drafts of a random model are accepted now and then; none accepted means a dead drafter"


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(10))
def test_equals_ar_in_a_thousand_cases(batch: int) -> None:
    for seed in range(100):
        check(1000 + 100 * batch + seed)


def test_a_stop_rule_inside_a_path() -> None:
    """The rule keeps tokens of the middle of a path; nothing behind them is shown."""
    model = engine(dtype=torch.float64)
    prompt = [3, 1, 4, 1, 5]
    whole = model.generate([prompt], {"decoder": "sliding", "row_budget": 64}, max_new_tokens=20)[0]
    for kept in (1, 5, 12):
        rule = lambda _, tokens, kept=kept: kept if len(tokens) >= kept else None  # noqa: E731
        cut = model.generate([prompt], {"decoder": "sliding", "row_budget": 64}, max_new_tokens=20, stop=rule)[0]
        assert cut.token_ids == whole.token_ids[:kept]
        assert cut.finish_reason == "stop_string"


def test_a_long_prompt_is_prefilled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2d2_lmeval.decoding.engine.PREFILL_CHUNK", 16)
    prompts = [[(7 * i) % (VOCABULARY - 1) for i in range(n)] for n in (70, 5, 33)]
    expected = decode(prompts, [12] * 3, 8, decoder="ar")
    answers = decode(prompts, [12] * 3, 8, decoder="sliding")
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert answers[0].stats["prefill_forwards"] == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 16, "row_budget": 16}, "leaves no room for a window"),
        ({"random_source": "torch"}, "random_source=keyed"),
        ({"block_length": 8}, "block_length is an option of decoder"),
        ({"draft": "trees"}, "Did you mean tree"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DecodingConfig.from_options({"decoder": "sliding", **options})
