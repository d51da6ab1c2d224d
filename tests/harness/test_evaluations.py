"""An evaluation counts itself: not the one before it with the same model, and what it did until it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from s2d2_lmeval.harness.model import S2D2LM


@pytest.fixture
def evaluate_model(task_folder: Path) -> Callable[..., dict[str, Any]]:
    """The ``config.s2d2`` of tasks evaluated with a ready model."""
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)

    def run(lm: S2D2LM, *tasks: str, **options: Any) -> dict[str, Any]:
        results = simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, limit=3, bootstrap_iters=0, **options
        )
        assert results is not None
        return dict(results["config"]["s2d2"])

    return run


def counts(about: dict[str, Any]) -> dict[str, Any]:
    """All that was counted, without times."""
    return {
        part: {name: value for name, value in about.get(part, {}).items() if "second" not in name}
        for part in ("totals", "scoring")
    } | {"tasks": about.get("tasks"), "configurations": about["configurations"]}


def test_a_model_is_evaluated_twice(make: Callable[..., S2D2LM], evaluate_model: Callable[..., dict[str, Any]]) -> None:
    lm = make(batch_size=2)
    first = evaluate_model(lm, "tiny_free", "tiny_choices")
    assert first["totals"]["requests"] == 3
    assert first["scoring"]["requests"] == 6
    assert counts(evaluate_model(lm, "tiny_free", "tiny_choices")) == counts(first)
    other = evaluate_model(lm, "tiny_ar")
    assert list(other["tasks"]) == ["tiny_ar"]
    assert other["totals"]["requests"] == 3
    assert "scoring" not in other


def test_an_interrupted_evaluation_counts_itself(
    make: Callable[..., S2D2LM],
    evaluate_model: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = make(batch_size=1)
    expected = evaluate_model(lm, "tiny_free")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("s2d2_lmeval.harness.report.Totals.add_response", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(lm, "tiny_free")
    monkeypatch.undo()
    assert lm.totals.run["requests"] == 1
    assert 0 < lm.totals.run["nfe"] < expected["totals"]["nfe"]
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    assert counts(evaluate_model(lm, "tiny_free")) == counts(expected)


def test_an_evaluation_that_decodes_nothing_counts_nothing(
    make: Callable[..., S2D2LM], evaluate_model: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    lm, cache = make(batch_size=2), str(tmp_path / "cache")
    assert evaluate_model(lm, "tiny_free", use_cache=cache)["totals"]["requests"] == 3
    again = evaluate_model(lm, "tiny_free", use_cache=cache)
    assert "totals" not in again
    assert again["cached_responses"] == 3


def test_requests_of_one_evaluation_are_counted_together(requests: Any, lm: S2D2LM) -> None:
    """Outside of an evaluation nothing says where one ends: calls add up until the totals are reset."""
    lm.reset_totals()
    for _ in range(2):
        lm.generate_until(requests(["one"], max_gen_toks=4))
    assert lm.totals.run["requests"] == 2
