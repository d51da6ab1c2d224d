"""Ray gives what a single process gives, and outlives its workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.studies import sweep as backends
from s2d2_lmeval.studies.planning import Plan
from s2d2_lmeval.studies.store import read_point
from s2d2_lmeval.studies.study import make_study
from s2d2_lmeval.studies.sweep import RayBackend, Sweep

from .conftest import RunStudy
from .small import outcomes


def test_ray_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(StudyError, match=r"s2d2-lmeval\[ray\]"):
        RayBackend()


def test_a_worker_that_does_not_see_the_folder(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="all machines share"):
        backends._work(None, tmp_path / ".seen-x")  # type: ignore[arg-type]


def test_a_worker_with_other_code(study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(make_study(study), tmp_path)
    job = plan.jobs(plan.study.points())[0]
    monkeypatch.setattr(backends, "code_version", lambda: "0+other")
    with pytest.raises(StudyError, match="install the same package"):
        backends._work(job, tmp_path / "study.json")


def test_a_point_that_takes_its_worker_along_has_failed(study: dict[str, Any], tmp_path: Path) -> None:
    plan = Plan(make_study(study), tmp_path)
    job = plan.jobs(plan.study.points())[0]
    assert "died 2 times" in backends._died(job, RuntimeError("killed")).error
    failure = read_point(job.path).failure
    assert failure is not None
    assert "RuntimeError: killed" in failure["error"]


@pytest.fixture(scope="module")
def ray_backend() -> Iterator[RayBackend]:
    """Two workers on this machine."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield RayBackend()
    ray.shutdown()


@pytest.mark.slow
def test_two_ray_workers_give_what_one_process_gives(
    ray_backend: RayBackend, study: dict[str, Any], run_study: RunStudy, tmp_path: Path
) -> None:
    run_study(study, tmp_path / "local")
    sweep = Sweep(Plan(make_study(study), tmp_path / "ray"), ray_backend)
    assert sweep.run() == {"complete": 2}
    assert outcomes(tmp_path / "ray") == outcomes(tmp_path / "local")
    assert sweep.new_samples == 12


def _dies(job: Any, token: Path) -> None:
    os._exit(1)


@pytest.mark.slow
def test_a_dead_worker_is_a_recorded_failure(
    ray_backend: RayBackend, study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_backend, "_task", ray_backend._ray.remote(num_cpus=1, max_retries=0)(_dies))
    sweep = Sweep(Plan(make_study(study), tmp_path), ray_backend)
    assert sweep.run() == {"failed": 2}
    for progress in sweep.points.values():
        failure = read_point(progress.job.path).failure
        assert failure is not None
        assert "died 2 times" in failure["error"]
