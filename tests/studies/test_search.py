"""Optuna over thresholds: trials are points, and a search goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.studies.planning import read_manifest
from s2d2_lmeval.studies.report.page import write_report
from s2d2_lmeval.studies.report.results import read_results
from s2d2_lmeval.studies.report.search import KINDS, LEAST_TRIALS

from .conftest import RunStudy
from .small import outcomes
from .test_report import POINTS, write_study

optuna = pytest.importorskip("optuna")


@pytest.fixture
def study(study: dict[str, Any]) -> dict[str, Any]:
    del study["decoding"]
    search = {
        "trials": 3,
        "objectives": ["accuracy", "tokens_per_forward"],
        "decoding": {"decoder": "s2d2"},
        "space": {
            "block_length": {"choices": [8, 16]},
            "confidence_threshold": {"low": 0.5, "high": 0.99},
            "min_ssd_span_length": {"low": 1, "high": 8},
        },
    }
    return {**study, "limit": 2, "search": search}


def trials(folder: Path) -> list[Any]:
    storage = f"sqlite:///{folder / 'search.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def test_trials_are_points_of_the_study(study: dict[str, Any], run_study: RunStudy, tmp_path: Path) -> None:
    run_study(study, tmp_path)
    found = trials(tmp_path)
    assert len(found) == 3
    rows = {row.decoding: row for row in read_results(tmp_path).rows}
    for trial in found:
        row = rows[f"trial {trial.number}"]
        assert {**trial.params, "decoder": "s2d2"} == row.options
        assert 0.5 <= trial.params["confidence_threshold"] <= 0.99
        assert trial.values == pytest.approx([row.accuracy, row.tokens_per_forward])


def test_a_search_goes_on_where_it_was(
    study: dict[str, Any], run_study: RunStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = BlockDiffusionModel.generate
    calls = 0

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # a warm-up and the samples of each trial
            raise KeyboardInterrupt
        return generate(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BlockDiffusionModel, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, tmp_path)
    before = trials(tmp_path)
    assert [trial.state.name for trial in before] == ["COMPLETE", "RUNNING"]
    run_study(study, tmp_path)
    after = trials(tmp_path)
    assert [trial.state.name for trial in after] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert after[2].params == before[1].params
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert len(manifest["points"]) == len(outcomes(tmp_path)) == 3
    run_study(study, tmp_path)
    assert len(trials(tmp_path)) == 4


def test_a_search_in_which_nothing_works_ends(
    study: dict[str, Any], run_study: RunStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(BlockDiffusionModel, "generate", broken)
    with pytest.raises(
        StudyError, match="every trial of a round failed, the last one with: RuntimeError: no such luck"
    ):
        run_study(study, tmp_path)


def test_other_documents_are_another_search(study: dict[str, Any], run_study: RunStudy, tmp_path: Path) -> None:
    study["search"]["trials"] = 1
    run_study({**study, "limit": 1}, tmp_path)
    run_study(study, tmp_path)
    assert len(optuna.get_all_study_names(f"sqlite:///{tmp_path / 'search.db'}")) == 2
    assert {row.documents for row in read_results(tmp_path).rows} == {2}


def test_a_damaged_record_of_the_search(study: dict[str, Any], run_study: RunStudy, tmp_path: Path) -> None:
    (tmp_path / "search.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StudyError, match=r"search\.db.*cannot be used"):
        run_study(study, tmp_path)


def test_the_report_shows_history_importance_and_coordinates(tmp_path: Path) -> None:
    searched = {"objectives": ["accuracy", "tokens_per_forward"]}
    folder = write_study(tmp_path, {"ar": POINTS["ar"], "s2d2": POINTS["s2d2"]}, study={"search": searched})
    url = f"sqlite:///{folder / 'search.db'}"
    record = optuna.create_study(storage=url, study_name="m 1f", directions=["maximize"] * 2)
    space = {"confidence_threshold": optuna.distributions.FloatDistribution(0.5, 0.99)}
    for _ in range(LEAST_TRIALS - 1):
        trial = record.ask(space)
        record.tell(trial, [trial.params["confidence_threshold"], 2.0])
    assert "The search" not in write_report(folder)[1][0].read_text(encoding="utf-8")
    record.tell(record.ask(space), [0.25, 3.0])
    page, *files = write_report(folder)[1]
    drawn = {path.name for path in files if "search" in path.name}
    assert drawn == {
        f"m_search_{objective}_{kind}.{suffix}"
        for objective in searched["objectives"]
        for kind in KINDS
        for suffix in ("png", "pdf")
    }
    text = page.read_text(encoding="utf-8")
    assert "Which options tokens per forward depended on" in text
    assert len(text) < 600_000
