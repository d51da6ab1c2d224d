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
    model="s2d2", model_args={"pretrained": checkpoint}, tasks=["often"], batch_size=4, limit=5, device="cpu",
    task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=0, apply_chat_template=True,
)
if results is not None:
    answers = {s["doc_id"]: s["resps"][0] for s in results["samples"]["often"] if s["filter"] == "text"}
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
    """Five documents, four samples of each. The document that evens out the processes is asked twice by the harness,
    which adds what it gets to the document's answers: they are the same four.
    """
    text = (task_folder / "tiny_free.yaml").read_text().replace("task: tiny_free", "task: often\nrepeats: 4")
    (tmp_path / "often.yaml").write_text(text.replace("max_gen_toks: 12", "max_gen_toks: 12\n  temperature: 1.5"))
    (tmp_path / "code.py").write_text((task_folder / "code.py").read_text())
    alone = evaluate([], tmp_path, checkpoint, tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = evaluate(launcher, tmp_path, checkpoint, tmp_path)
    for document, answers in alone[0].items():
        assert len(set(answers)) > 1
        assert both[0][document] == answers * (2 if document == "3" else 1)
    assert both[1:3] == alone[1:3]
    assert [alone[3], both[3]] == [1, 2]
