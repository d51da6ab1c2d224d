"""Several processes share a task, or a model: the same answers and the same totals as one."""

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


DIVIDED = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

tasks, out, cache, *arguments = sys.argv[1:]
results = simple_evaluate(
    model="s2d2", model_args={"pretrained": "toy", "decoder": "s2d2", **dict(one.split("=") for one in arguments)},
    tasks=["s2d2_toy_arithmetic"], batch_size=2, limit=3, device="cpu", use_cache=cache,
    task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=0,
)
info = results["config"]["s2d2"]
answers = [sample["resps"] for sample in results["samples"]["s2d2_toy_arithmetic"]]
with open(out, "x") as file:
    counts = [info.get("totals", {}).get(name, 0) for name in ("nfe", "requests")]
    counts += [info["cached_responses"], info["ranks"]]
    json.dump([answers, *counts], file)
"""
FAILING = """
import s2d2_lmeval
from s2d2_lmeval import lockstep

model = s2d2_lmeval.load("toy", tp_plan="auto")
lockstep.join(model)
assert model.ranks.rank == 0
try:
    model.generate([[5, 600_000]])  # every rank refuses that, and goes on
except s2d2_lmeval.errors.RequestError:
    print("refused", len(model.generate([[5, 6]], max_new_tokens=2)), flush=True)
try:
    model.generate([[5, 6]], max_new_tokens=2, on_finished=lambda index, answer: 1 / 0)
except ZeroDivisionError:
    print("caught", flush=True)
"""


def run(script: str, folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(folder / "script.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


@pytest.mark.slow
def test_a_divided_model_equals_a_whole_one(tmp_path: Path) -> None:
    """The first rank alone runs the harness; a response cache of its own does not part it from the others."""
    tasks, found = str(Path(__file__).parents[2] / "task_configs" / "toy"), []
    for number, ranks in enumerate((1, 3, 3)):
        out, cache = tmp_path / f"{number}.json", tmp_path / f"cache{ranks}"
        divided = ["tp_plan=auto"] if ranks > 1 else []
        done = run(DIVIDED, tmp_path, ranks, tasks, str(out), str(cache), *divided)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(out.read_text()))
    alone, divided, again = found
    assert alone[4] == 1
    assert divided == [*alone[:4], 3]
    assert again == [alone[0], 0, 0, 3, 3]


@pytest.mark.slow
def test_what_fails_on_the_first_rank_only_ends_all(tmp_path: Path) -> None:
    done = run(FAILING, tmp_path, 3)
    assert done.stdout.split() == ["refused", "1", "caught"], done.stderr[-3000:]
    assert done.returncode == 1
    assert "a call failed on the first rank only" in done.stderr
