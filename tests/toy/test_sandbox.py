"""Accidents of model-written code stay in the subprocess and never count as success."""

from __future__ import annotations

import os
import time

import pytest

from s2d2_lmeval.toy import sandbox


def test_results_come_back_in_order() -> None:
    assert sandbox.call("def f(a, b):\n    return [a + b]", "f", [[1, 2], [3, 4]]) == [[3], [7]]


@pytest.mark.parametrize(
    "body",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os; return os.write(os.open('x', os.O_CREAT | os.O_WRONLY), b'y' * 100)",
        "import os; return os.fork() and 1",
        "return 'x' * 10**10",
        "return object()",
        "undefined",
        "print('[1]')",
    ],
)
def test_failures(body: str) -> None:
    if "fork" in body and os.geteuid() == 0:
        pytest.skip("process limits do not bind the super-user")
    result = sandbox.call(f"def f():\n    {body}", "f", [[]])
    assert result is None or result == [None]


def test_early_exit_at_module_level() -> None:
    assert sandbox.call("import os\nos._exit(0)\ndef f(): return 1", "f", [[]]) is None


def test_missing_function() -> None:
    assert sandbox.call("def g(): return 1", "f", [[]]) is None


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(60)"])
def test_endless_functions_are_stopped(body: str) -> None:
    started = time.monotonic()
    assert sandbox.call(f"def f():\n    {body}", "f", [[]], timeout=1.0) is None
    assert time.monotonic() - started < 10


def test_memory_hogs_are_stopped() -> None:
    assert sandbox.call("def f():\n    x = []\n    while True: x.append(bytearray(10**7))", "f", [[]]) is None


def test_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_SECRET", "1")
    assert sandbox.call("import os\ndef f(): return os.environ.get('TOY_SECRET')", "f", [[]]) == [None]
