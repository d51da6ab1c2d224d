"""What a running sweep shows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from s2d2_lmeval.cli.console.display import ROWS_SHOWN, Display, duration, window
from s2d2_lmeval.studies.evaluation import Outcome
from s2d2_lmeval.studies.planning import Job
from s2d2_lmeval.studies.study import make_study
from s2d2_lmeval.studies.sweep import Progress, Sweep


class _Plan:
    """A study of many thresholds, as far as a display looks at it."""

    def __init__(self, count: int, study: dict[str, Any]) -> None:
        thresholds = [round(0.5 + place / 100, 2) for place in range(count)]
        study["decoding"] = {"d": {"decoder": "dynamic", "grid": {"confidence_threshold": thresholds}}}
        self.study = make_study(study)


def sweep_of(count: int, study: dict[str, Any], folder: Path) -> Sweep:
    plan: Any = _Plan(count, study)
    sweep = Sweep(plan, backend=None)  # type: ignore[arg-type]
    for point in plan.study.points():
        job = Job(**vars(point), identity="m", code="1", folder=folder, settings={"samples": 6})
        sweep.points[job.digest] = Progress.of(job)
    return sweep


def test_the_table_on_a_terminal(study: dict[str, Any], tmp_path: Path) -> None:
    sweep = sweep_of(3, study, tmp_path)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, color_system=None)
    first, second, _ = (progress.job for progress in sweep.points.values())
    with Display(console, sweep) as display:
        sweep.started(first)
        sweep.sample(first, {"stats": {"new_tokens": 30, "nfe": 10}, "elapsed": 2.0}, 1)
        table = display._table()
        sweep.ended(second, Outcome(0, "logits are not finite"))
    last = Console(file=io.StringIO(), width=120)
    last.print(table)
    text = last.file.getvalue()  # type: ignore[attr-defined]
    line = next(line for line in text.splitlines() if "confidence_threshold=0.5 " in line)
    expected = ["▶", "d", "confidence_threshold=0.5", "s2d2_toy_arithmetic", "1/6", "3.00", "15.0", "toy", "0"]
    assert line.split() == expected
    assert "0 of 3 points, 1 of 18 samples" in text
    assert "✗" in shown.getvalue()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_swept_value_is_never_cut(study: dict[str, Any], tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    display = Display(console, sweep_of(3, study, tmp_path))
    console.print(display._table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"confidence_threshold={value}" in text for value in (0.5, 0.51, 0.52))
    assert ("seed" in text) == (width == 200)


def test_elsewhere_a_line_per_point(study: dict[str, Any], tmp_path: Path) -> None:
    sweep = sweep_of(2, study, tmp_path)
    shown = io.StringIO()
    job = next(iter(sweep.points.values())).job
    with Display(Console(file=shown, width=80), sweep):
        sweep.started(job)
        sweep.ended(job, Outcome(0, "logits are not finite"))
    assert shown.getvalue().startswith("1/2 failed: toy, s2d2_toy_arithmetic, d confidence_threshold=0.5: 0 samples")
    assert shown.getvalue().count("\n") == 1


def test_many_points_are_shown_in_part(study: dict[str, Any], tmp_path: Path) -> None:
    points = list(sweep_of(45, study, tmp_path).points.values())
    assert window(points) == points[:ROWS_SHOWN]
    points[30].state = "running"
    assert points[30] in window(points)
    assert len(window(points)) == ROWS_SHOWN
    points[44].state, points[30].state = "complete", "complete"
    assert window(points) == points[-ROWS_SHOWN:]


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (65, "1 min 5 s"), (7290, "2 h 1 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
