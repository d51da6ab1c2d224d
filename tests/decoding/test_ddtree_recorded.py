"""Round by round the same as the published DFlash and DDTree code."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from s2d2_lmeval import BlockDiffusionModel, load

from .ddtree_recorded import DATA, compare, recorded_runs, replay

RUNS = recorded_runs()
NEW_TOKENS = 24


@cache
def recorded_pair() -> BlockDiffusionModel:
    return load(DATA / "target", draft=DATA / "draft", max_batch=1)


def name_of(run: dict[str, Any]) -> str:
    budget = "" if run["budget"] is None else f"-{run['budget']}"
    return f"{run['method']}{budget}-prompt{len(run['prompt'])}-seed{run['seed']}"


@pytest.mark.parametrize("run", [run for run in RUNS if (run["budget"] or 7) >= 7], ids=name_of)
def test_rounds_equal_the_published_ones(run: dict[str, Any]) -> None:
    compare(recorded_pair(), run, NEW_TOKENS)


@pytest.mark.parametrize("run", [run for run in RUNS if (run["budget"] or 7) < 7], ids=name_of)
def test_smaller_trees_than_a_chain_change_no_token(run: dict[str, Any]) -> None:
    """There the published code shifts its last drafts by a place."""
    assert replay(recorded_pair(), run, NEW_TOKENS)[0].token_ids == run["new"][:NEW_TOKENS]


def test_what_was_recorded() -> None:
    assert len(RUNS) == 41
    assert sum(len(run["rounds"]) for run in RUNS) > 150
    branched = sum(
        parent != place for run in RUNS for one in run["rounds"] for place, parent in enumerate(one["parents"])
    )
    assert branched > 100, "trees without branches test no tree"


@pytest.mark.parametrize(
    "options", [{"decoder": "dflash"}, {"decoder": "ddtree", "tree_budget": 16, "pairs": 0, "lookup": False}]
)
def test_wrong_features_cost_acceptance_and_nothing_else(options: dict[str, Any]) -> None:
    """A drafter that reads its layers in another order is a worse drafter; the output cannot tell."""
    right, wrong = recorded_pair(), load(DATA / "target", draft=DATA / "draft", max_batch=1)
    tap = wrong._runner.tap  # type: ignore[attr-defined]
    features = tap.features
    tap.features = lambda: features().roll(64, dims=-1)  # two layers of 64: swapped
    prompts = [run["prompt"] for run in RUNS if run["method"] == "ar" and run["temperature"] == 0]
    told = {**options, "stop_token_ids": ()}
    answers = [model.generate(prompts, told, max_new_tokens=32) for model in (right, wrong)]
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]
    good, bad = (sum(one.stats["accepted"] for one in some) for some in answers)
    assert good > 1.1 * bad
