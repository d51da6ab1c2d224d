"""`make gpu` is rehearsed here, step by step, so that nothing but the device can surprise it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import steps

ROOT = Path(__file__).resolve().parents[2]

ABSENT = ("lm_eval", "datasets", "evaluate", "rich", "scipy", "pydantic", "accelerate", "matplotlib")
"""What a machine with torch and transformers alone need not have."""


def bare(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without all that."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_step(tmp_path: Path) -> None:
    names = [name for name in steps.LIMITS if name != "tests"]
    code = (
        "import pathlib, sys\n"
        "from benchmarks.gpu import steps\n"
        "print([steps.run(name, pathlib.Path(sys.argv[1]), rehearse=True) for name in sys.argv[2:]])"
    )
    answer = bare(tmp_path, "-c", code, str(tmp_path), *names)
    assert answer.stdout.splitlines()[-1:] == [str([0] * len(names))], answer.stderr
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["summary"]
        assert [key for key in found if "failed" in key] == ["failed"]
        if name.startswith("speed"):
            decoders = {row["name"] for row in found["rows"]}
            assert {"ar", "dynamic", "s2d2", "s2d2:lookahead", "sliding", "ddtree"} < decoders
            assert len(decoders) == 9


def test_the_script(tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = bare(tmp_path, "-m", "benchmarks.gpu", "--rehearse", "--out", str(out), "--steps", "kernels,tests")
    assert answer.returncode == 0, answer.stdout
    assert "kernels     done" in answer.stdout
    assert json.loads((out / "tests.json").read_text())["collected"] > 5
    assert [row["state"] for row in json.loads((out / "steps.json").read_text())] == ["done", "done"]


def test_it_goes_on_after_what_fails_or_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks" / "gpu").mkdir(parents=True)
    for folder in ("benchmarks", "benchmarks/gpu"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "benchmarks" / "gpu" / "steps.py").write_text(
        "import sys, time\n"
        "name, out = sys.argv[1], sys.argv[3]\n"
        "open(f'{out}/{name}.json', 'w').write('{\"summary\": \"half of it\"}')\n"
        "time.sleep(60) if name == 'machine' else sys.exit('broken') if name == 'equal' else None\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "SHORTEST", 0)
    monkeypatch.setitem(gpu.LIMITS, "machine", 1)
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--steps", "machine,equal,kernels"]) == 1
    states = [row["state"] for row in json.loads((out / "steps.json").read_text())]
    assert states == ["cut off at 1 s", "failed (1)", "done"]
    assert capsys.readouterr().out.count("half of it") == 3
    assert gpu.main(["--out", str(out), "--steps", "kernels", "--minutes", "-1"]) == 1
    assert "no time left" in capsys.readouterr().out


def test_it_ends_in_time() -> None:
    assert sum(steps.LIMITS.values()) <= 540


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_nothing_for_it() -> None:
    command = ["make", "-n", "--no-print-directory", "gpu", "PYTHON=python3.12", "VENV=/nonexistent/venv", "OUT=there"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["python3.12 -m benchmarks.gpu --out there/gpu"]
