"""The Makefile's benchmark targets: the commands that they run are commands of this package, with its options."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.task_sweeps import BENCHMARKS
from s2d2_lmeval.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def commands(target: str, *variables: str) -> list[list[str]]:
    """The package's commands that a target would run, as the words after ``s2d2-lmeval``."""
    shown = subprocess.run(
        ["make", "-n", target, *variables], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    lines = [shlex.split(line) for line in shown.splitlines() if "bin/s2d2-lmeval " in line]
    return [line[[word.endswith("/s2d2-lmeval") for word in line].index(True) + 1 :] for line in lines]


VARIABLES = ("MODEL=org/model", "DECODER=dynamic", "LIMIT=7", "OUT=results", "DATA=/data", "BATCH=3")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_benchmarks(benchmark: str) -> None:
    (command,) = commands(f"bench-{benchmark}", *VARIABLES)
    assert command[:5] == ["eval", "--model", "s2d2", "--model_args", "pretrained=org/model,decoder=dynamic"]
    given = dict(zip(command[1:], [*command[2:], ""], strict=True))
    assert given["--tasks"] == f"s2d2_{benchmark}"
    assert (given["--limit"], given["--batch_size"], given["--metadata"]) == ("7", "3", "s2d2_data_dir=/data")
    assert given["--output_path"] == f"results/bench-{benchmark}"
    assert ("--confirm_run_unsafe_code" in command) == (BENCHMARKS[benchmark] in ("humaneval", "mbpp"))


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_sweeps_end_in_a_report(benchmark: str) -> None:
    sweep, report = commands(f"sweep-{benchmark}", *VARIABLES)
    parsed = build_parser().parse_args(sweep)
    assert (ROOT / parsed.study).is_file()
    assert (parsed.model, parsed.task, parsed.decoder) == ("org/model", [f"s2d2_{benchmark}"], "dynamic")
    assert (parsed.limit, parsed.batch_size, parsed.data_dir) == (7, 3, "/data")
    assert parsed.confirm_run_unsafe_code == (BENCHMARKS[benchmark] in ("humaneval", "mbpp"))
    assert build_parser().parse_args(report).folder == parsed.output == Path(f"results/sweep-{benchmark}")


def test_without_variables_nothing_is_limited() -> None:
    sweep, _ = commands("sweep-gsm8k")
    parsed = build_parser().parse_args(sweep)
    assert (parsed.limit, parsed.decoder, parsed.data_dir) == (None, None, None)


def test_the_demo_and_the_report() -> None:
    sweep, report = commands("demo-sweep")
    assert (ROOT / build_parser().parse_args(sweep).study).is_file()
    assert build_parser().parse_args(report).folder == Path("out/demo-sweep")
    (alone,) = commands("report", "OUT=out/x")
    assert alone == ["report", "out/x"]
