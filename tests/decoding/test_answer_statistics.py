"""The statistics of an answer: one meaning for every decoder, counted up to the stop, absent where undefined."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2d2_lmeval import BlockDiffusionModel, load
from s2d2_lmeval.decoding.generation import ACCEPTED, Generation
from s2d2_lmeval.harness.report import Totals
from s2d2_lmeval.runtime.statistics import RATIOS, without_ratios

from .ddtree_recorded import DATA
from .tiny import VOCABULARY, engine

PROMPTS = [[(7 * row + 3 * n) % (VOCABULARY - 1) for n in range(5 + row)] for row in range(6)]
AR_LIKE = {"cache_ver": True, "draft_ver": True}

ROUTED = [
    *({"decoder": "s2d2", "schedule": schedule, **AR_LIKE} for schedule in ("reference", "fused", "lookahead")),
    {"decoder": "s2d2", "schedule": "lookahead", "min_ssd_span_length": 3, **AR_LIKE},
    {"decoder": "s2d2", "do_verify_policy": "contextual_bandit_ucb"},
]


def model_for(options: dict[str, Any]) -> BlockDiffusionModel:
    if options["decoder"] in ("dflash", "ddtree"):
        return load(DATA / "target", draft=DATA / "draft")
    return engine(dtype=torch.float64)


def run(options: dict[str, Any], new: int = 24, **more: Any) -> tuple[BlockDiffusionModel, list[Generation]]:
    model = model_for(options)
    model.trace.reset()
    return model, model.generate(PROMPTS, options, max_new_tokens=new, **more)


@pytest.mark.parametrize("options", ROUTED, ids=str)
def test_routed_is_one_share_wherever_it_is_read(options: dict[str, Any]) -> None:
    model, answers = run({**options, "block_length": 8})
    drafts = verified = 0
    for answer in answers:
        own = [step.kind for step in answer.steps]
        assert answer.stats["drafts"] == own.count("draft"), "drafts that a verification carried along count too"
        assert answer.stats["routed_drafts"] == own.count("verify") == answer.stats["verify_forwards"]
        assert answer.stats["routed"] == own.count("verify") / own.count("draft") <= 1
        drafts, verified = drafts + own.count("draft"), verified + own.count("verify")
    totals = Totals()
    totals.add_run({}, model.trace.totals(), 1.0)
    for answer in answers:
        totals.add_response("task", answer.stats)
    summary = totals.summary()
    assert verified > 0
    assert model.trace.totals()["routed"] == verified / drafts
    assert summary["totals"]["routed"] == summary["tasks"]["task"]["routed"] == verified / drafts


@pytest.mark.parametrize(
    ("options", "undefined"),
    [
        ({"decoder": "ar"}, {"acceptance", "routed", "acceptance_length", "forwards_saved"}),
        ({"decoder": "dynamic"}, {"acceptance", "routed", "acceptance_length", "forwards_saved"}),
        ({"decoder": "spiffy", "base": "static"}, {"acceptance", "routed", "acceptance_length"}),
        (
            {"decoder": "s2d2", "do_verify_policy": "score_threshold", "do_verify_score_threshold": 1e9},
            {"acceptance", "acceptance_length", "forwards_saved"},
        ),
        ({"decoder": "sliding", "window": 4, "row_budget": 24}, {"routed", "forwards_saved"}),
        ({"decoder": "ddtree", "tree_budget": 8}, {"routed", "forwards_saved"}),
    ],
    ids=lambda value: value["decoder"] if isinstance(value, dict) else "",
)
def test_what_is_undefined_is_absent(options: dict[str, Any], undefined: set[str]) -> None:
    model, answers = run(options)
    for stats in (*(answer.stats for answer in answers), model.trace.totals()):
        assert not undefined & stats.keys()
        assert stats["tokens_per_forward"] == stats["new_tokens"] / stats["nfe"] > 0
        for name, (above, below) in RATIOS.items():
            if name in stats:
                assert stats[name] == stats[above] / stats[below]
    if options["decoder"] == "s2d2":
        assert model.trace.totals()["routed"] == 0, "there were drafts, and none was verified"


@pytest.mark.parametrize(
    "options",
    [
        {"decoder": "s2d2", "block_length": 8, "schedule": "lookahead", **AR_LIKE},
        {"decoder": "s2d2", "block_length": 8},
        {"decoder": "sliding", "window": 6, "row_budget": 40},
        {"decoder": "sliding", "window": 6, "row_budget": 40, "draft_shape": "chain"},
        {"decoder": "dflash"},
        {"decoder": "ddtree", "tree_budget": 12},
    ],
    ids=str,
)
def test_drafted_and_accepted_end_with_the_answer(options: dict[str, Any]) -> None:
    """For stops at every place: counted by hand from the steps, and never more than the answer holds."""
    model, whole = run({**options, "stop_token_ids": ()}, new=20)
    beyond = 0
    for kept in range(1, 20):
        answers = model.generate(PROMPTS, {**options, "stop_token_ids": ()}, max_new_tokens=20, stop=_keep(kept))
        for prompt, answer, full in zip(PROMPTS, answers, whole, strict=True):
            assert answer.token_ids == full.token_ids[:kept]
            end = len(prompt) + kept
            accepted = drafted = rounds = tokens = 0
            for step in answer.steps:
                inside = [position for position in step.drafted if position < end]
                if inside:
                    here = [mark for place, mark in enumerate(step.marks) if step.start + place < end]
                    rounds, drafted, accepted = rounds + 1, drafted + len(inside), accepted + here.count(ACCEPTED)
                    tokens += sum(mark != 0 for mark in here)
            beyond += sum(step.marks.count(ACCEPTED) for step in answer.steps) - accepted
            stats = answer.stats
            assert (stats["drafted"], stats["accepted"]) == (drafted, accepted)
            assert accepted <= kept
            if rounds:
                assert (stats["rounds"], stats["round_tokens"], stats["round_accepted"]) == (rounds, tokens, accepted)
                assert tokens <= kept
    assert beyond > 0, "no stop fell inside what was accepted: the test shows nothing"


def _keep(count: int) -> Any:
    return lambda index, tokens: count if len(tokens) >= count else None


def test_traces_add_up_answers() -> None:
    for options in ({"decoder": "s2d2", "block_length": 8}, {"decoder": "sliding", "window": 4, "row_budget": 24}):
        model, answers = run(options, stop=_keep(11))
        totals = model.trace.totals()
        for name in ("drafted", "accepted", "rounds", "round_tokens", "drafts", "windows_used"):
            expected = sum(answer.stats.get(name, 0) for answer in answers)
            assert totals.get(name, 0) == expected, name
        assert totals["nfe"] == sum(answer.stats["nfe"] for answer in answers)


def test_a_long_prompt_is_told_apart() -> None:
    """Forwards that only run a piece of a prompt are in ``nfe`` and not in ``decode_nfe``."""
    model = engine(dtype=torch.float64, context=2048)
    prompt = [n % (VOCABULARY - 1) for n in range(1700)]
    for decoder in ("ar", "sliding"):
        model.trace.reset()
        (answer,) = model.generate([prompt], {"decoder": decoder, "stop_token_ids": ()}, max_new_tokens=6)
        stats = answer.stats
        assert stats["prefill_forwards"] == 3
        assert stats["nfe"] == stats["decode_nfe"] + 3
        assert stats["tokens_per_decode_forward"] == 6 / stats["decode_nfe"] > stats["tokens_per_forward"]
        totals = model.trace.totals()
        assert totals["prompt_only_forwards"] == 3
        assert totals["tokens_per_decode_forward"] == stats["tokens_per_decode_forward"]
    assert model.generate([prompt], {"decoder": "ar"}, max_new_tokens=6)[0].stats["tokens_per_decode_forward"] == 1.0


def test_every_request_is_told_of_when_it_is_complete() -> None:
    model = engine(dtype=torch.float64)
    told: dict[int, Generation] = {}
    model.trace.reset()
    answers = model.generate(PROMPTS[:4], max_new_tokens=[0, 3, 0, 5], on_finished=told.__setitem__)
    assert told == dict(enumerate(answers))
    assert model.trace.requests == 4
    assert answers[0].token_ids == []
    assert not {"tokens_per_forward", "acceptance", "routed"} & answers[0].stats.keys()


@pytest.mark.parametrize("shape", ["tree", "chain"])
def test_budgets_of_its_own_make_a_row_independent_of_its_neighbours(shape: str) -> None:
    """Not only its tokens, but everything that is counted; shared budgets do not promise that."""
    model = engine(dtype=torch.float64)
    shared = {"decoder": "sliding", "window": 4, "row_budget": 24, "draft_shape": shape}
    differ = 0
    for options in ({**shared, "share_budget": False}, shared):
        together = model.generate(PROMPTS, options, max_new_tokens=40)
        alone = [
            model.generate([prompt], options, max_new_tokens=40, seeds=[seed])[0] for seed, prompt in enumerate(PROMPTS)
        ]
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
        counts = [[_counts(answer) for answer in answers] for answers in (together, alone)]
        if options is not shared:
            assert counts[0] == counts[1]
        else:
            differ += counts[0] != counts[1]
    if shape == "tree":
        assert differ, "with shared budgets neighbours show in the counts"


def _counts(answer: Generation) -> dict[str, float]:
    return {name: value for name, value in without_ratios(answer.stats).items() if name != "seconds"}
