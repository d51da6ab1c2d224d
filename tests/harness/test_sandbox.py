"""Accidents and pranks of model-written code stay in the subprocess and never count as success."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from s2d2_lmeval.harness import sandbox
from s2d2_lmeval.harness.sandbox import Limits

QUICK = Limits(cpu_seconds=1, wall_seconds=2.0)


def test_results_come_back_in_order() -> None:
    assert sandbox.call("def f(a, b):\n    return [a + b]", "f", [[1, 2], [3, 4]]) == [[3], [7]]


def test_a_program_that_ends_has_passed() -> None:
    source = "import math, re, collections, itertools, typing, heapq, hashlib, copy, string, random\nassert math.pi > 3"
    assert sandbox.run_program(source) == sandbox.Outcome(True, "passed")


FAILURES = {
    "polite exit": "import sys; sys.exit(0)",
    "hard exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit",
    "kill by own hand": "import os; os.kill(os.getpid(), 9)",
    "fork": "import os; os.fork()",
    "spawn": "import subprocess; subprocess.run(['true'], check=True)",
    "low-level spawn": "import os, _posixsubprocess as p; p.fork_exec([b'/bin/true'])",
    "multiprocessing": "import multiprocessing as m; p = m.Process(target=print); p.start()",
    "shell": "import os; os.system('true')",
    "foreign library": "import ctypes; ctypes.CDLL(None).fork()",
    "big file": "open('x', 'w').write('y' * 100)",
    "low-level file": "import os; os.write(os.open('x', os.O_CREAT | os.O_WRONLY), b'y' * 100)",
    "network": "import socket; socket.socket().connect(('127.0.0.1', 9))",
    "name lookup": "import socket; socket.getaddrinfo('example.org', 80)",
    "huge value": "x = 'x' * 10**10",
    "memory hog": "x = []\nwhile True: x.append(bytearray(10**7))",
    "deep recursion": "f = lambda: f()\nf()",
    "error": "undefined",
    "syntax": "def (",
    "signal to the evaluation": "import os; os.kill(os.getppid(), 15)",
    "forged answer": """import os
for d in range(3, 9):
    try: os.write(d, b'{"word": "x"}')
    except OSError: pass
os._exit(0)""",
}


@pytest.mark.parametrize("prank", FAILURES, ids=str)
def test_failures(prank: str) -> None:
    outcome = sandbox.run_program(FAILURES[prank])
    assert not outcome.passed
    assert outcome.detail != "passed"


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "while True: print('x' * 1000)",
        "import signal; signal.pause()",
    ],
)
def test_endless_programs_are_stopped(source: str) -> None:
    started = time.monotonic()
    assert not sandbox.run_program(source, QUICK).passed
    assert time.monotonic() - started < 10


def test_an_endless_answer_is_not_read_to_its_end() -> None:
    source = """import os
while True:
    for d in range(3, 9):
        try: os.write(d, b'x' * 65536)
        except OSError: pass"""
    outcome = sandbox.run_program(source, replace(QUICK, cpu_seconds=5, wall_seconds=10.0))
    assert outcome == sandbox.Outcome(False, "answered with more than 1048576 bytes")


def test_a_fork_bomb_leaves_nothing_behind(tmp_path: Path) -> None:
    mark = f"bomb{os.getpid()}"
    source = f"mark = '{mark}'\nimport os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert not sandbox.run_program(source, QUICK).passed
    if Path("/proc/self/cmdline").exists():
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name.isdigit()]
        assert not [command for command in commands if mark.encode() in command]


def test_files_of_the_evaluation_are_safe(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("gold")
    for prank in ("os.remove({0!r})", "open({0!r}, 'w')", "os.truncate({0!r}, 0)", "os.rename({0!r}, {0!r} + '2')"):
        assert not sandbox.run_program("import os\n" + prank.format(str(precious))).passed
    assert not sandbox.run_program(f"import shutil; shutil.rmtree({str(tmp_path)!r})").passed
    assert precious.read_text() == "gold"


def test_refusals_cannot_be_swallowed_into_success() -> None:
    source = "import os\ntry: os.fork()\nexcept PermissionError as error: refused = str(error)\nassert refused"
    assert sandbox.run_program(source).passed  # going on is fine: nothing happened
    assert "refuses os.fork" in sandbox.run_program("import os; os.fork()").detail


@pytest.mark.parametrize("source", ["import os\nos._exit(0)\ndef f(): return 1", "def g(): return 1"])
def test_functions_that_are_not_there(source: str) -> None:
    assert sandbox.call(source, "f", [[]]) is None


def test_values_that_are_not_data() -> None:
    assert sandbox.call("def f(): return object()", "f", [[]]) is None


def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert sandbox.call("import os\ndef f(): return os.environ.get('SECRET')", "f", [[]]) == [None]


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_the_network_namespace_is_reported_truthfully() -> None:
    interfaces = "open('/proc/net/dev').read().count(':')"
    inside = sandbox.call(f"def f(): return {interfaces}", "f", [[]])
    if sandbox.has_no_network():
        assert inside == [1]  # the loopback, which is down
    else:
        allowed = subprocess.run(["unshare", "-Un", "true"], capture_output=True)
        assert allowed.returncode != 0
