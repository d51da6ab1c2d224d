"""Whole studies: interrupted and gone on with, failing in parts, in folders that hold something else."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import NumericalError, StudyError
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.studies import evaluation
from s2d2_lmeval.studies.planning import Plan, read_manifest
from s2d2_lmeval.studies.store import PointStore, StorageError, read_point
from s2d2_lmeval.studies.study import make_study
from s2d2_lmeval.studies.sweep import LocalBackend, Sweep

from .conftest import RunStudy
from .small import STUDY, outcomes


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, backend: Any) -> Path:
    """The small study, uninterrupted."""
    folder = tmp_path_factory.mktemp("reference")
    sweep = Sweep(Plan(make_study(STUDY), folder), backend)
    assert sweep.run() == {"complete": 2}
    return folder


def test_what_a_study_leaves_behind(reference: Path) -> None:
    manifest = read_manifest(reference)
    assert manifest is not None
    assert set(manifest["points"]) == {path.stem for path in (reference / "points").iterdir()}
    for name, about in manifest["points"].items():
        record = read_point(reference / "points" / f"{name}.jsonl")
        assert record.result is not None
        assert len(record.samples) == 6
        assert len(record.result["documents"]["accuracy,none"]) == 6
        assert record.result["metrics"]["nfe,none"] > 0
        assert record.decoding_seconds > 0
        assert record.segments[0]["decoding"]["decoder"] == about["decoding"]
        assert record.segments[0]["rows"] == 4


def test_a_complete_study_is_not_run_again(
    reference: Path, study: dict[str, Any], run_study: RunStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockDiffusionModel, "generate", None)
    sizes = {path: path.stat().st_size for path in (reference / "points").iterdir()}
    sweep = run_study(study, reference)
    assert {one.state for one in sweep.points.values()} == {"complete"}
    assert {path: path.stat().st_size for path in sizes} == sizes


def test_cut_off_anywhere_it_ends_the_same(
    reference: Path, study: dict[str, Any], run_study: RunStudy, tmp_path: Path
) -> None:
    """Files are cut at random bytes, as a kill may leave them; the randomness of what is left must not change."""
    expected = outcomes(reference)
    rng = random.Random(3)
    for round_number in range(3):
        folder = tmp_path / str(round_number)
        (folder / "points").mkdir(parents=True)
        for path in (reference / "points").iterdir():
            data = path.read_bytes()
            (folder / "points" / path.name).write_bytes(data[: rng.randrange(len(data))])
        run_study(study, folder)
        assert outcomes(folder) == expected


def test_more_documents_go_on_from_fewer(
    reference: Path, study: dict[str, Any], run_study: RunStudy, tmp_path: Path
) -> None:
    run_study({**study, "limit": 2}, tmp_path)
    assert {one.done for one in run_study({**study, "limit": 2}, tmp_path).points.values()} == {2}
    sweep = run_study(study, tmp_path)
    assert sweep.new_samples == 2 * 4
    assert outcomes(tmp_path) == outcomes(reference)


def test_repetitions_of_a_document_keep_their_keys(
    study: dict[str, Any], run_study: RunStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "often.yaml").write_text(
        "include: "
        + str(Path(__file__).parents[2] / "task_configs" / "toy" / "s2d2_toy_arithmetic.yaml")
        + "\ntask: often\nrepeats: 3\nfilter_list:\n  - {name: none, filter: [{function: take_first}]}\n"
    )
    study.update(tasks=["often"], include_path=str(tasks), limit=2, decoding={"s2d2": study["decoding"]["s2d2"]})
    run_study(study, tmp_path / "whole")
    whole = outcomes(tmp_path / "whole")
    (point,) = whole.values()
    assert len(point["samples"]) == 6
    texts = [text for text, *_ in point["samples"].values()]
    assert len(set(texts)) > 2  # drawn anew each time
    (file,) = (tmp_path / "whole" / "points").iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"kind":"result"' not in line]
    del kept[3], kept[5]  # the second and the fifth sample
    (tmp_path / "part" / "points").mkdir(parents=True)
    (tmp_path / "part" / "points" / file.name).write_bytes(b"".join(kept))
    assert run_study(study, tmp_path / "part").new_samples == 2
    assert outcomes(tmp_path / "part") == whole


def test_a_failing_point_does_not_stop_the_others(
    reference: Path, study: dict[str, Any], run_study: RunStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = BlockDiffusionModel.generate

    def failing(self: Any, prompts: Any, config: Any, **options: Any) -> Any:
        if config.decoder == "ar":
            raise NumericalError
        return generate(self, prompts, config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BlockDiffusionModel, "generate", failing)
        sweep = run_study(study, tmp_path)
    states = {one.job.decoding: (one.state, one.error) for one in sweep.points.values()}
    assert states == {"ar": ("failed", str(NumericalError())), "s2d2": ("complete", "")}
    failed = next(one.job.path for one in sweep.points.values() if one.state == "failed")
    failure = read_point(failed).failure
    assert failure is not None
    assert "NumericalError" in failure["traceback"]
    assert {one.state for one in run_study(study, tmp_path).points.values()} == {"complete"}
    assert outcomes(tmp_path) == outcomes(reference)


def test_memory_that_runs_out_is_recorded(
    reference: Path, study: dict[str, Any], run_study: RunStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s2d2_lmeval.runtime.runner import Runner

    reserve = Runner.reserve

    def cramped(self: Any, slots: int, *rest: Any) -> Any:
        if slots > 2:
            raise MemoryError
        return reserve(self, slots, *rest)

    monkeypatch.setattr(Runner, "reserve", cramped)
    sweep = run_study({**study, "decoding": {"ar": {"decoder": "ar"}}}, tmp_path)
    (progress,) = sweep.points.values()
    record = read_point(progress.job.path)
    assert (progress.state, [line["rows"] for line in record.memory]) == ("complete", [2])
    name = progress.job.digest
    assert outcomes(tmp_path)[name]["metrics"]["accuracy,none"] == outcomes(reference)[name]["metrics"]["accuracy,none"]


def test_a_full_disk_stops_everything(
    study: dict[str, Any], run_study: RunStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = PointStore.append

    def full(self: Any, kind: str, **content: Any) -> Any:
        if kind == "sample" and len(self.record.samples) == 3:
            raise StorageError("cannot write")
        return append(self, kind, **content)

    with monkeypatch.context() as patch:
        patch.setattr(PointStore, "append", full)
        with pytest.raises(StorageError):
            run_study(study, tmp_path)
    assert [len(read_point(path).samples) for path in (tmp_path / "points").iterdir()] == [3]


def test_results_of_other_code_or_weights_do_not_mix(
    study: dict[str, Any], run_study: RunStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.update(limit=1, decoding={"ar": {"decoder": "ar"}})
    run_study(study, tmp_path)
    (old,) = (tmp_path / "points").iterdir()
    for name, value, message in (
        ("code_version", lambda: "0+x", "code version"),
        ("model_identity", lambda _: "y", "model"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"s2d2_lmeval.studies.planning.{name}", value)
            with pytest.raises(StudyError, match=f"{message}.*--anew"):
                run_study(study, tmp_path)
            sweep = run_study(study, tmp_path, anew=True)
        (new,) = sweep.points.values()
        assert new.job.path != old
        assert new.state == "complete"
        assert read_point(old).result is not None
        run_study(study, tmp_path, anew=True)


def test_a_manifest_that_cannot_be_read(study: dict[str, Any], run_study: RunStudy, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(StudyError, match="Move it away"):
        run_study(study, tmp_path)


def test_each_model_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: dict[str, Any]) -> None:
    from s2d2_lmeval.harness import model

    loaded = []
    load = model.S2D2LM.__init__

    def counting(self: Any, pretrained: Any, **options: Any) -> None:
        loaded.append(options.get("dtype"))
        load(self, pretrained, **options)

    monkeypatch.setattr(model.S2D2LM, "__init__", counting)
    study.update(limit=1, models={"a": "toy", "b": {"pretrained": "toy", "dtype": "float64"}})
    Sweep(Plan(make_study(study), tmp_path), LocalBackend()).run()
    assert loaded == [None, "float64"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    command = ["sweep", str(path), "--output", str(tmp_path / "out"), "--limit", "1"]
    assert main([*command, "--plan"]) == 0
    assert "2 points, 2 samples." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "2/2 complete: toy, s2d2_toy_arithmetic, s2d2: 1 samples" in shown
    assert "2 complete." in shown


def test_a_termination_is_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    monkeypatch.setattr(Sweep, "run", lambda self: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sweep", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out")]) == 130
    assert "the same command resumes" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_failure_shows_in_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(evaluation, "_evaluate", broken)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    assert main(["sweep", str(path), "--output", str(tmp_path / "out"), "--limit", "1"]) == 1
    assert "RuntimeError: no such luck" in capsys.readouterr().out


def _in_a_process(study: dict[str, Any], folder: Path) -> multiprocessing.process.BaseProcess:
    """The study in a process of its own; forked, so that it need not import everything anew."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: Sweep(Plan(make_study(study), folder), LocalBackend()).run())
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks after threads were started")
def test_killed_at_ten_moments_it_ends_the_same(reference: Path, study: dict[str, Any], tmp_path: Path) -> None:
    """``kill -9`` at random moments of ten runs, then one that is left alone."""
    rng, writing = random.Random(0), 0
    for kill in range(10):
        before = sum(file.stat().st_size for file in tmp_path.glob("points/*"))
        process = _in_a_process(study, tmp_path)
        # The first kills come at any moment, the others a random while after it has begun to write again.
        deadline = time.monotonic() + (rng.uniform(0, 2) if kill < 2 else 120)
        while time.monotonic() < deadline and process.is_alive():
            if sum(file.stat().st_size for file in tmp_path.glob("points/*")) > before:
                writing += 1
                time.sleep(rng.uniform(0, 0.5))
                break
            time.sleep(0.002)
        process.kill()
        process.join()
    assert writing >= 5
    process = _in_a_process(study, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert outcomes(tmp_path) == outcomes(reference)
