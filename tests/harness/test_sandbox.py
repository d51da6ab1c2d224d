"""Programs run, are judged from outside, and cannot end more than their own run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.tasks import sandbox
from s2d2_lmeval.tasks.sandbox import Limits, modes, starting
from s2d2_lmeval.tasks.sandbox.jail import kernel

PYTHON_ALONE = ("namespaces", "landlock", "seccomp")
LAYERS = pytest.mark.parametrize(
    "without", [(), ("namespaces",), PYTHON_ALONE], ids=["all", "without namespaces", "Python alone"]
)
ROOMY = Limits(cpu_seconds=20, wall_seconds=60.0, memory_bytes=2**31)


def results(source: str, without: tuple[str, ...] = (), limits: Limits = ROOMY) -> Any:
    """What ``f()`` of a program returns; the error where it does not."""
    answer = sandbox._run(modes.Mode("process"), source, "f", {"source": None, "calls": [[]]}, limits, without)
    return answer["results"][0] if "results" in answer else answer


def test_results_come_back_in_order() -> None:
    assert sandbox.call("def f(a, b):\n    return [a + b]", "f", [[1, 2], [3, 4]]) == [[3], [7]]


def test_other_numbers_and_subclasses_arrive_by_value() -> None:
    source = """
import collections, decimal, enum, fractions, numpy, sympy
class E(enum.IntEnum):
    A = 3
P = collections.namedtuple('P', 'x y')
def f():
    return [E.A, P(1, 2), collections.Counter('aab'), collections.OrderedDict(a=1), numpy.int64(3),
            numpy.float32(0.5), numpy.bool_(True), sympy.Integer(3), sympy.Rational(1, 2), decimal.Decimal('0.1'),
            fractions.Fraction(1, 3)]"""
    from decimal import Decimal
    from fractions import Fraction

    expected = [3, (1, 2), {"a": 2, "b": 1}, {"a": 1}, 3, 0.5, True, 3, Fraction(1, 2), Decimal("0.1"), Fraction(1, 3)]
    got = results(source)
    assert got == expected
    assert list(map(type, got)) == list(map(type, expected))


def test_exceptions_of_python_are_raised_in_the_tests() -> None:
    source = "def f(x):\n    if x < 0: raise ValueError('negative')\n    return {}[x]"
    tests = """
for x, kind in ((-1, ValueError), (1, KeyError)):
    try: f(x)
    except kind: continue
    assert False"""
    assert sandbox.run_tests(source, "f", tests).passed
    assert sandbox.run_tests(source, "f", "f(-1)").detail == "ValueError: negative"


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("undefined", "NameError: name 'undefined' is not defined"),
        ("def (", "SyntaxError: "),
        ("def g(): pass", "AttributeError: "),
        ("def f(x): return 2", "AssertionError: too much"),
        ("import os; os._exit(0)", "the program ended early"),
        ("def f(x): return 'x' * 2**21", "a value of more than 1048576 bytes"),
        ("def f(x):\n    while True: pass", "the program ended early"),
        ("import time\ndef f(x): time.sleep(60)", "ran longer than 1.5 s"),
    ],
)
def test_why_a_program_fails(source: str, detail: str) -> None:
    limits = Limits(cpu_seconds=1, wall_seconds=1.5 if "sleep" in source else 60.0)
    outcome = sandbox.run_tests(source, "f", "assert f(1) == 1, 'too much'", limits)
    assert not outcome.passed
    assert not outcome.sandbox_failed
    assert detail in outcome.detail


@LAYERS
@pytest.mark.parametrize(
    "source",
    [
        "import numpy\ndef f(): return numpy.linalg.inv(numpy.eye(2)).tolist() == [[1, 0], [0, 1]]",
        "import sympy\ndef f(): return str(sympy.factor(sympy.Symbol('x')**2 - 1)) == '(x - 1)*(x + 1)'",
        """
import asyncio
async def g(x):
    await asyncio.sleep(0.001)
    return x
async def both(): return await asyncio.gather(g(1), asyncio.to_thread(abs, -2))
def f(): return asyncio.run(both()) == [1, 2]""",
        """
import os, tempfile
def f():
    with tempfile.TemporaryDirectory() as d, open(d + '/x', 'w') as file:
        file.write('text')
        file.flush()
        os.rename(d + '/x', d + '/y')
        return open(d + '/y').read() == 'text'""",
        "import tempfile\ndef f():\n    with tempfile.NamedTemporaryFile('w+') as t:\n        return t.write('x') == 1",
        """
from __future__ import annotations
import bisect, collections, copy, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json
import math, operator, pickle, random, re, sqlite3, statistics, string, typing, uuid, zoneinfo
@dataclasses.dataclass
class D:
    x: typing.Optional[int] = None
def f(): return pickle.loads(pickle.dumps(D(1))) == D(1) and copy.deepcopy(D()) == D() and uuid.uuid4() is not None""",
        """
import threading
def f():
    seen = []
    thread = threading.Thread(target=seen.append, args=(1,))
    thread.start()
    thread.join()
    return seen == [1]""",
        """
from concurrent.futures import ThreadPoolExecutor
def f():
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(abs, [-1])) == [1]""",
        "import os\ndef f(): return os.listdir() == [] and open('x', 'w').write('a') == 1 and os.listdir() == ['x']",
    ],
    ids=["numpy", "sympy", "asyncio", "folders", "files", "library", "threads", "pools", "an empty folder"],
)  # fmt: skip
def test_ordinary_programs_run(source: str, without: tuple[str, ...]) -> None:
    if without == PYTHON_ALONE and ("hread" in source or "asyncio" in source) and os.getuid():
        pytest.skip("the limit of processes binds threads, too")
    assert results(source, without) is True


def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert sandbox.call("import os\ndef f(): return os.environ.get('SECRET')", "f", [[]]) == [None]


@pytest.mark.parametrize(
    "prank",
    ["os.fork()", "os.system('true')", "open('/tmp/x', 'w')", "os.kill(os.getppid(), 15)", "os.remove('/etc/passwd')",
     "__import__('subprocess').run(['true'])", "__import__('socket').create_connection(('127.0.0.1', 9))",
     "__import__('shutil').rmtree('/etc')", "__import__('ctypes').CDLL('libc.so.6')"],
)  # fmt: skip
def test_accidents_are_refused_by_python_alone(prank: str) -> None:
    error = results(f"import os\ndef f(): {prank}", PYTHON_ALONE)["error"]
    assert "PermissionError: the sandbox refuses" in error


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_namespaces_are_reported_truthfully() -> None:
    layers = sandbox.active_layers()
    allowed = subprocess.run(["unshare", "-Upinmr", "true"], capture_output=True).returncode == 0
    assert ("pid namespace" in layers) == allowed
    assert ("pid namespace" in layers) == (results("import os\ndef f(): return os.getpid()") < 5)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's")
def test_the_evaluator_is_closed_while_it_judges_and_open_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, exchange = [], starting.Starter._exchange

    def watched(*arguments: Any) -> Any:
        seen.append(kernel.dumpable())
        return exchange(*arguments)

    sandbox.active_layers()  # the first call of a process makes a run of its own, to see what works
    monkeypatch.setattr(starting.Starter, "_exchange", watched)
    before = kernel.dumpable()
    assert sandbox.call("def f(): return 1", "f", [[]]) == [1]
    assert seen == [0]
    assert kernel.dumpable() == before == 1


def test_an_interrupt_leaves_nothing_for_the_next_run(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.active_layers()
    with monkeypatch.context() as patch:
        patch.setattr(starting.values, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sandbox.call("def f(): return 1", "f", [[]])
    assert sandbox.call("def f(): return 2", "f", [[]]) == [2]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of its own to start from, and nothing known yet."""
    monkeypatch.setattr(sandbox, "_starter", None)
    monkeypatch.setattr(sandbox, "_record", None)
    sandbox._probed.cache_clear()
    yield
    if sandbox._starter is not None:
        sandbox._starter.close()
    sandbox._probed.cache_clear()


def test_the_record_says_how_programs_ran(fresh: None) -> None:
    assert sandbox.record() is None
    sandbox.call("def f(): return 1", "f", [[]])
    assert sandbox.record() == f"{sandbox._probed(None)[0].name}: {', '.join(sandbox.active_layers())}"


def test_where_little_protects_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sandbox, "active_layers", lambda: ["resource limits", "audit hook"])
    with caplog.at_level(logging.WARNING):
        sandbox.prepare()
    assert "S2D2_SANDBOX=docker" in caplog.text


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), OSError(24, "Too many open files"), BlockingIOError(11, "no fork")],
)
@pytest.mark.parametrize("times", [1, 99])
def test_a_failure_of_the_sandbox_is_tried_again_and_then_a_failed_document(
    error: OSError, times: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.active_layers()
    monkeypatch.setattr(sandbox, "PAUSES", (0.0, 0.0))
    left, make = [times], starting.tempfile.mkdtemp

    def full(*args: Any, **kwargs: Any) -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return make(*args, **kwargs)

    monkeypatch.setattr(starting.tempfile, "mkdtemp", full)
    outcome = sandbox.run_tests("def f(): return 1", "f", "assert f() == 1")
    assert outcome.passed == (times == 1)
    assert outcome.sandbox_failed == (times == 99)
    assert ("the sandbox failed" in caplog.text) == (times == 99)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_starter_that_was_killed_is_replaced(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "PAUSES", (0.0,))
    assert sandbox.call("def f(): return 1", "f", [[]]) == [1]
    assert sandbox._starter is not None
    assert sandbox._starter._process is not None
    os.kill(sandbox._starter._process.pid, signal.SIGKILL)
    assert sandbox.call("def f(): return 1", "f", [[]]) == [1]


def test_what_hangs_is_ended_from_outside(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.active_layers()
    monkeypatch.setattr(starting, "GRACE", -59.5)
    answer = results("import time\ndef f(): time.sleep(50)", limits=Limits(wall_seconds=60.0))
    assert "sandbox" in answer


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for its new parent, the system's first process, to see it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a limit ends it")
def test_an_evaluator_that_dies_takes_everything_with_it(tmp_path: Path) -> None:
    source = """
from s2d2_lmeval.tasks import sandbox
program = "import time\\ndef f():\\n    time.sleep(300)"
print("ready", flush=True)
sandbox.call(program, "f", [[]], sandbox.Limits(wall_seconds=300.0))"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, cwd=tmp_path) as evaluator:
        assert evaluator.stdout is not None
        evaluator.stdout.readline()

        def children(pid: int) -> list[int]:
            found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [child for one in found for child in (int(one), *children(int(one)))]

        for _ in range(600):
            family = children(evaluator.pid)
            if len(family) >= 4:  # starter, supervisor, judge, program
                break
            time.sleep(0.05)
        evaluator.kill()
    assert len(family) >= 4
    for _ in range(1200):
        alive = [pid for pid in family if _is_alive(pid)]
        if not alive:
            return
        time.sleep(0.05)
    assert alive == []


@pytest.mark.parametrize("text", ["podman", "process:x", "bwrap:x", "Docker", " ", ""])
def test_unknown_modes_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(modes.VARIABLE, "process")
    with pytest.raises(ConfigError, match="process, bwrap, docker"):
        modes.choose(text)


def test_commands_take_the_mode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(modes.VARIABLE, "process")
    for command in (
        ["eval", "--tasks", "s2d2_toy_programs", "--sandbox=podman"],
        ["sweep", "x.yaml", "--sandbox", "podman"],
    ):
        assert main(command) == 2
        assert "process, bwrap, docker" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bwrap", "docker"])
def test_modes_whose_program_is_missing_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(modes.VARIABLE, name)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="install it"):
        sandbox.prepare()


def _stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv(modes.VARIABLE, name)


def test_a_container_that_does_not_start_is_refused(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(
        tmp_path,
        monkeypatch,
        "docker",
        "echo 'Cannot connect to the Docker daemon' >&2; echo 'Run docker --help' >&2; exit 125",
    )
    with pytest.raises(ConfigError, match=r"Cannot connect to the Docker daemon.*docker build"):
        sandbox.prepare()


def test_a_container_gets_each_program_by_its_standard_input(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker itself is not part of the tests: a script stands in, which starts the same command without a container."""
    home = Path(sandbox.__file__).parent
    script = f"""echo "$@" >> {tmp_path}/log
while [ "$1" != s2d2-sandbox ]; do shift; done
shift 5
exec {sys.executable} -I -S -c "$(echo "$1" | sed 's#/sandbox#{home}#')" """
    _stand_in(tmp_path, monkeypatch, "docker", script)
    assert sandbox.call("import numpy\ndef f(): return 1", "f", [[]], ROOMY) == [1]
    assert not sandbox.run_tests("def f(): return 1", "f", "assert f() == 2").passed
    assert str(sandbox.record()).startswith("docker: docker, ")
    logged = (tmp_path / "log").read_text()
    for option in (
        "--network none",
        "--cap-drop ALL",
        "--read-only",
        "--security-opt no-new-privileges",
        "--pids-limit",
    ):
        assert option in logged


def _bwrap_works() -> bool:
    try:
        return (
            subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True).returncode
            == 0
        )
    except OSError:
        return False


@pytest.mark.skipif(not _bwrap_works(), reason="bubblewrap is not installed, or may not make namespaces")
def test_bubblewrap(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(modes.VARIABLE, "bwrap")
    assert sandbox.call("def f():\n    open('x', 'w').write('x')\n    return 1", "f", [[]]) == [1]
    assert not sandbox.run_tests("def f(): return 1", "f", "assert f() == 2").passed
    assert sandbox.active_layers()[0] == "bwrap"


@pytest.mark.parametrize("works", [True, False])
def test_bubblewrap_stands_in_where_namespaces_are_not_ours_to_make(
    works: bool, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(modes.VARIABLE, raising=False)

    def run(mode: modes.Mode, *_: Any) -> dict[str, Any]:
        if mode.name == "bwrap" and not works:
            return {"sandbox": "FileNotFoundError: bwrap"}
        return {"results": [1], "layers": ["landlock 7", "seccomp"]}

    monkeypatch.setattr(sandbox, "_run", run)
    assert sandbox.active_layers() == (["bwrap"] if works else []) + ["landlock 7", "seccomp"]
    assert str(sandbox.record()).startswith("bwrap: " if works else "process: ")
