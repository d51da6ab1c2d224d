"""What Windows lacks is needed for model-written code only. It is taken away here; no Windows machine was at hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import os, sys
import datasets, evaluate, lm_eval.tasks, multiprocessing.util, subprocess, transformers
for module in ("fcntl", "resource"):
    sys.modules[module] = None
for function in ("fork", "getuid", "killpg", "setsid", "sched_getaffinity", "sysconf"):
    delattr(os, function)
from s2d2_lmeval.cli import main
for line in sys.stdin.read().splitlines():
    print("exit", main(line.split()))
"""

COMMANDS = """\
generate --model toy --prompt 2+2= --max_new_tokens 2
report /nonexistent
eval --model_args pretrained=toy --tasks s2d2_toy_programs --limit 1 --confirm_run_unsafe_code
"""


@pytest.mark.slow
def test_only_programs_need_posix() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], input=COMMANDS, capture_output=True, text=True)
    exits = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert exits == ["exit 0", "exit 2", "exit 2"], done.stderr
    assert "model-written code runs on Linux and macOS only; on Windows, evaluate inside WSL." in done.stderr
