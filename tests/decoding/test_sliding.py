"""Sliding self-speculation is autoregressive decoding, token for token, in fewer forwards."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch

from s2d2_lmeval import BlockDiffusionModel, DecodingConfig
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.rounds.budgets import QueryBudget
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime import clock

from . import editing_tiny, pipelined_cases, subblocks_drawn, tiny
from .tiny import VOCABULARY, engine

ENGINES: dict[str, Callable[[], BlockDiffusionModel]] = {
    "sdar": lambda: tiny.engine(dtype=torch.float64),
    "llada2": editing_tiny.engine,
    "fast_dllm_v2": subblocks_drawn.engine,
    "llada": lambda: pipelined_cases.engine("llada"),
    "dream": lambda: pipelined_cases.engine("dream"),
}
FAMILIES = tuple(ENGINES)
SAMPLING = (
    {},
    {"do_sample": True, "temperature": 0.4},
    {"do_sample": True, "temperature": 1.0, "top_k": 8, "top_p": 0.9},
    {
        "do_sample": True,
        "temperature": 0.8,
        "min_p": 0.05,
        "typical_p": 0.9,
        "logit_bias": {3: 2.0, 5: -1.5},
        "suppress_tokens": (1, 7),
    },
    {"logit_bias": {3: 2.0, 5: -1.5}, "suppress_tokens": (1, 7)},
)


def decode(
    prompts: list[list[int]], budgets: list[int], max_batch: int, family: str = "sdar", **options: object
) -> list[Generation]:
    model = ENGINES[family]()
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
    context = rng.choice(("clean", "published"))
    least = window + 1 + (context == "published")
    own = {
        "window": window,
        "row_budget": rng.choice(["auto", *(least + more for more in (0, 1, 8, 47, 159))]),
        "draft_shape": rng.choice(["chain", "tree"]),
        "draft_context": context,
    }
    return prompts, budgets, shared, own


def check(seed: int, family: str, **given: object) -> tuple[int, int]:
    """One random case, with the options ``given``; returns the forwards of ``ar`` and of ``sliding``."""
    rng = random.Random(seed)
    prompts, budgets, shared, own = random_case(rng)
    own |= given
    expected = decode(prompts, budgets, rng.choice([1, 2, 8]), family, decoder="ar", **shared)
    answers = decode(prompts, budgets, rng.choice([1, 2, 8]), family, decoder="sliding", **shared, **own)
    for one, other in zip(expected, answers, strict=True):
        assert one.token_ids == other.token_ids, (seed, own)
        assert one.finish_reason == other.finish_reason
        assert other.stats["nfe"] <= one.stats["nfe"]
        assert other.stats["new_tokens"] == one.stats["new_tokens"]
    return int(sum(a.stats["nfe"] for a in expected)), int(sum(a.stats["nfe"] for a in answers))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_ar(family: str) -> None:
    forwards = [check(seed, family) for seed in range(6)]
    ar, sliding = (sum(column) for column in zip(*forwards, strict=True))
    assert sliding < 0.95 * ar, "drafts of a random model are accepted now and then; none accepted means a dead drafter"


def test_equals_ar_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is promised is promised for it; in narrower types rounding may part the two."""
    monkeypatch.setitem(ENGINES, "sdar", lambda: tiny.engine(dtype=torch.float32))
    for seed in range(200, 212):
        check(seed, "sdar")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_ar_however_much_the_clock_makes_it_buy(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock whose seconds are of any length."""
    for seed in range(100, 104):
        seconds = itertools.accumulate(pace(1000) for pace in itertools.repeat(random.Random(seed).expovariate))
        monkeypatch.setitem(clock.CLOCKS, "wall", lambda seconds=seconds: next(seconds))
        check(seed, family, row_budget="auto")


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_ar_in_a_thousand_cases(family: str, batch: int) -> None:
    for seed in range(50):
        check(1000 + 50 * batch + seed, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_ar_is_what_a_plain_model_writes_without_cache(family: str) -> None:
    """Un-shifted models are asked by a mask after the text, shifted ones by their last token."""
    model = ENGINES[family]()
    plain = {
        "sdar": lambda: tiny.tiny_model(dtype=torch.float64),
        "llada2": editing_tiny.tiny_model,
        "fast_dllm_v2": subblocks_drawn.shifted_model,
        "llada": lambda: pipelined_cases.tiny_model("llada"),
        "dream": lambda: pipelined_cases.tiny_model("dream"),
    }[family]()
    text = [3, 1, 4, 1, 5, 9, 2]
    answer = model.generate([text], {"decoder": "ar", "stop_token_ids": ()}, max_new_tokens=12)[0]
    for _ in range(12):
        asked = text if model.facts.token_shift else [*text, model.facts.mask_token_id]
        logits = plain(torch.tensor([asked])).logits[0, -1]
        logits[model.facts.mask_token_id] = -torch.inf
        text = [*text, int(logits.argmax())]
    assert answer.token_ids == text[7:]
    assert answer.stats["nfe"] == 12


@pytest.mark.parametrize("family", ["sdar", "fast_dllm_v2"])
@pytest.mark.parametrize("row_budget", [17, 18, 20, 33])
def test_drafts_are_verified_however_tight_the_budget(family: str, row_budget: int) -> None:
    """A window costs nearly all of it, and promises more than unsure drafts do; every third round runs one."""
    prompts = [[n, 3, 1, 4, 1, 5] for n in range(4)]
    options = {"decoder": "sliding", "window": 16, "row_budget": row_budget}
    for batch in (1, 4):
        for answer in decode(prompts, [24] * 4, batch, family, **options):
            drafting = answer.stats["rounds"]
            assert drafting >= 0.3 * (answer.stats["nfe"] - 2)


def test_rows_share_the_budget() -> None:
    """Together no more than their shares, those of rows that just ended included; one of them more than its own."""
    model = engine(dtype=torch.float64)
    model.max_batch = 4
    model.trace.reset(keep_records=True)
    prompts = [[(5 * i + n) % (VOCABULARY - 1) for i in range(9)] for n in range(4)]
    model.generate(prompts, {"decoder": "sliding", "row_budget": 24, "window": 4}, max_new_tokens=40)
    rounds = [record.widths for record in model.trace.records]
    assert all(widths.sum() <= 24 * len(before) for before, widths in itertools.pairwise(rounds))
    assert any(widths.max() > 24 for widths in rounds[1:])


def test_the_trace_counts_windows_and_depths() -> None:
    model = engine(dtype=torch.float64)
    model.trace.reset()
    answers = model.generate([[3, 1, 4]] * 3, {"decoder": "sliding", "row_budget": 40, "window": 6}, max_new_tokens=30)
    totals = model.trace.totals()
    rounds = sum(answer.stats["nfe"] for answer in answers)
    assert totals["windows_used"] + totals["windows_missed"] == rounds
    assert totals["windows_used"] == sum(answer.stats["windows_used"] for answer in answers)
    assert totals["windows"] >= totals["windows_used"] > 0
    assert totals["queries"] == sum(answer.stats["queries"] for answer in answers)
    offered = [totals[f"offered_at_{depth}"] for depth in range(1, 6)]
    accepted = [totals[f"accepted_at_{depth}"] for depth in range(1, 6)]
    assert sum(accepted) == totals["accepted"] > 0
    assert offered == sorted(offered, reverse=True)
    assert all(a <= o for a, o in zip(accepted, offered, strict=True))


def test_a_stop_rule_inside_a_path() -> None:
    """The rule keeps tokens of the middle of a path; nothing after them is shown."""
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
        ({"window": 16, "row_budget": 17, "draft_context": "published"}, "without a draft takes 18 queries"),
        ({"window": 1, "draft_context": "published"}, "window=1 has none"),
        ({"random_source": "torch"}, "random_source=keyed"),
        ({"acceptance": "rejection"}, "draft_shape=chain"),
        ({"acceptance": "greedy"}, "takes keyed or rejection"),
        ({"row_budget": "most"}, "a whole number or auto"),
        ({"block_length": 8}, "block_length is an option of decoder"),
        ({"draft_shape": "trees"}, "Did you mean tree"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DecodingConfig.from_options({"decoder": "sliding", **options})


def test_a_draft_is_charged_what_it_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own price, of the round in which it was bought, not that of the round which judges it."""
    asked, charged = [], []
    buy, ran = QueryBudget.buy, QueryBudget.round_ran

    def noted_buy(self: QueryBudget, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        nodes, windows, _ = buy(self, *given)
        asked.append(0.25 * (len(asked) + 1))
        return nodes, windows, torch.tensor([asked[-1]])

    def noted_run(self: QueryBudget, nodes: int, accepted: int, price: float) -> None:
        charged.append(price)
        ran(self, nodes, accepted, price)

    monkeypatch.setattr(QueryBudget, "buy", noted_buy)
    monkeypatch.setattr(QueryBudget, "round_ran", noted_run)
    decode([[3, 1, 4, 1, 5]], [32], 1, decoder="sliding", row_budget=48, stop_token_ids=())
    assert len(charged) > 4
    assert charged == [0.0, *asked[: len(charged) - 1]]
