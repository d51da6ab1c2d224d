"""Two processes share a task: the same answers and the same totals as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

checkpoint, tasks, out = sys.argv[1:]
results = simple_evaluate(
    model="s2d2", model_args={"pretrained": checkpoint}, tasks=["tiny_free"], batch_size=4, limit=5, device="cpu",
    task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=0, apply_chat_template=True,
)
if results is not None:
    # The harness adds the answer to a padding request to its document: the first one is the document's own.
    answers = {s["doc_id"]: s["resps"][0][0] for s in results["samples"]["tiny_free"]}
    info = results["config"]["s2d2"]
    json.dump([answers, info["tasks"], info["totals"]["nfe"], info["processes_counted"]], open(out, "w"))
"""


def evaluate(launcher: list[str], folder: Path, checkpoint: Path, tasks: Path) -> list[Any]:
    (folder / "script.py").write_text(SCRIPT)
    out = folder / f"out{len(launcher)}.json"
    command = [sys.executable, *launcher, str(folder / "script.py"), str(checkpoint), str(tasks), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, checkpoint: Path, task_folder: Path) -> None:
    alone = evaluate([], tmp_path, checkpoint, task_folder)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = evaluate(launcher, tmp_path, checkpoint, task_folder)
    assert both[:3] == alone[:3]
    assert [alone[3], both[3]] == [1, 2]
