"""`lm_eval --model s2d2 --model_args pretrained=…,draft=…,decoder=ddtree`: the same answers, at what cost."""

from __future__ import annotations

from typing import Any

import pytest

from s2d2_lmeval.cli.demo import evaluate, texts, together
from s2d2_lmeval.cli.demo_ddtree import columns
from s2d2_lmeval.studies.report.tables import cells

TASK = "s2d2_toy_arithmetic"


def results_of(**options: Any) -> dict[str, Any]:
    return evaluate("toy", {"draft": "toy", **options}, [TASK], limit=4, rows=4)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return results_of(decoder="ar")


@pytest.mark.parametrize("options", [{"decoder": "dflash"}, {"decoder": "ddtree", "tree_budget": 32}])
def test_answers_are_those_of_ar_in_fewer_forwards(alone: dict[str, Any], options: dict[str, Any]) -> None:
    drafted = results_of(**options)
    assert texts(drafted["samples"][TASK]) == texts(alone["samples"][TASK])
    about, of_ar = drafted["config"]["s2d2"], alone["config"]["s2d2"]
    assert about["decoder"] == options["decoder"]
    assert "token for token the output of ar" in about["promise"]
    totals, task = about["totals"], about["tasks"][TASK]
    assert totals["new_tokens"] == of_ar["totals"]["new_tokens"]
    assert totals["target_forwards"] == totals["nfe"] - totals["drafter_forwards"] < of_ar["totals"]["nfe"]
    assert totals["tokens_per_target_forward"] == totals["new_tokens"] / totals["target_forwards"]
    for counts in (totals, task):
        assert counts["acceptance_length"] == counts["round_tokens"] / counts["rounds"]
        assert 0 <= counts["acceptance_length"] - counts["acceptance_length_without_bonus"] <= 1
    assert totals["target_seconds"] > 0
    assert totals["drafter_seconds"] > 0
    answered = {"accuracy": 1.0, "equal": 4, "documents": 4}
    measured = [{**together("ar", of_ar["totals"]), **answered}, {**together("drafted", totals), **answered}]
    lines = cells(columns("ar"), measured)[1]
    assert lines[0][3:5] == ["", ""]
    assert float(lines[1][3]) == pytest.approx(totals["acceptance_length"], abs=0.01)


def test_published_functions_as_custom_generate(alone: dict[str, Any]) -> None:
    options = {"custom_generate": "s2d2_lmeval.custom_generate.ddtree:ddtree_generate", "tree_budget": 16}
    published = results_of(**options)
    assert texts(published["samples"][TASK]) == texts(alone["samples"][TASK])
