"""No hostile program forges a pass, reads a secret, does harm or stays: with namespaces and without them."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.tasks import sandbox
from s2d2_lmeval.tasks.sandbox import Limits, modes
from s2d2_lmeval.tasks.sandbox.jail import kernel, program, values
from tests.harness.hostile_programs import EXCESS, FORGERIES, HARM, READS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "audit hook" in sandbox.active_layers(),
    reason="the kernel offers neither Landlock nor a filter of system calls",
)

QUICK = Limits(cpu_seconds=1, wall_seconds=5.0)
SHORT = Limits(cpu_seconds=1, wall_seconds=0.5, folder_bytes=2**25)
SECRET = "crown jewels"
TESTS = "def check(candidate):\n    assert all(map(lambda x: candidate(x) == 987654321, [20]))\ncheck(f)"
NAMESPACES = pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["namespaces", "without namespaces"])


class Target:
    """What a program could harm: files, a process, sockets, this process; and what all of it looks like."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.file, self.secret = folder, folder / "precious", folder / "secret"
        self.file.write_text("gold")
        self.secret.write_text(SECRET)
        self.victim = stack.enter_context(
            subprocess.Popen(["sleep", "1000"], env={"PATH": os.environ["PATH"], "X": SECRET})
        )
        stack.callback(self.victim.kill)
        self.signals: list[int] = []
        before = signal.signal(signal.SIGUSR1, lambda number, _: self.signals.append(number))
        stack.callback(signal.signal, signal.SIGUSR1, before)
        self.abstract = f"s2d2-{os.getpid()}-{folder.name}"
        self.tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = self.tcp.getsockname()[1]
        self.listeners = [self.tcp, self._local(stack, str(folder / "s")), self._local(stack, "\0" + self.abstract)]
        self.udp = self._datagrams(stack, socket.AF_INET, ("127.0.0.1", self.port))
        self.local = self._datagrams(stack, socket.AF_UNIX, str(folder / "d"))
        for one in (*self.listeners, self.udp, self.local):
            one.setblocking(False)

    def _local(self, stack: ExitStack, name: str) -> socket.socket:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(name)
        listener.listen()
        return listener

    def _datagrams(self, stack: ExitStack, family: int, name: Any) -> socket.socket:
        receiver = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        receiver.bind(name)
        return receiver

    def aim(self, text: str) -> str:
        verdict = values.framed({"layers": [], "results": None}, 1 << 20)
        places = {
            "FILE": repr(str(self.file)),
            "SECRET": repr(str(self.secret)),
            "FOLDER": repr(str(self.folder)),
            "MARK": repr(str(self.folder / "mark")),
            "HOME": repr(str(Path(sandbox.__file__).parent)),
            "VICTIM": str(self.victim.pid),
            "EVALUATOR": str(os.getpid()),
            "ADDRESS": str(id(self)),
            "PORT": str(self.port),
            "SOCKET": repr(str(self.folder / "s")),
            "DATAGRAMS": repr(str(self.folder / "d")),
            "ABSTRACT": repr(self.abstract),
            "VERDICT": repr(verdict),
            "ANSWER": repr(values.framed((program.RETURNED, 987654320), 1 << 20)),
        }
        return re.sub("@([A-Z]+)@", lambda match: places[match[1]], text)

    def state(self) -> dict[str, Any]:
        info = self.file.stat() if self.file.exists() else None
        return {
            "files": sorted(os.listdir(self.folder)),
            "file": info and (self.file.read_text(), info.st_mode, info.st_uid, info.st_mtime_ns, info.st_nlink),
            "attributes": os.listxattr(self.file) if info else None,
            "victim": self.victim.poll(),
            "stopped": Path(f"/proc/{self.victim.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "tT",
            "signals": self.signals,
            "limits": [resource.prlimit(p, n) for p in (0, self.victim.pid) for n in range(16)],
            "priority": os.getpriority(os.PRIO_PROCESS, self.victim.pid),
            "processors": os.sched_getaffinity(self.victim.pid),
            "host": socket.gethostname(),
            "received": [self._received(one) for one in (*self.listeners, self.udp, self.local)],
            "left": survivors(),
        }

    def _received(self, one: socket.socket) -> bool:
        try:
            one.accept()[0].close() if one in self.listeners else one.recv(1)
        except BlockingIOError:
            return False
        return True


def survivors() -> list[str]:
    """Processes that work in the sandbox's folder, other than the one that starts all."""
    assert sandbox._starter is not None
    left = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            inside = os.readlink(entry / "cwd").startswith(sandbox._starter._folder)
        except OSError:
            continue
        if inside and int(entry.name) != sandbox._starter._process.pid:
            left.append(entry.name)
    return left


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with ExitStack() as stack:
        yield Target(tmp_path_factory.mktemp("t"), stack)


def run(source: str, tests: str | None, without: tuple[str, ...], limits: Limits = QUICK) -> dict[str, Any]:
    """The raw answer; one that is the sandbox's own failure would be tried again."""
    calls = [[20]] if tests is None else []
    return sandbox._run(modes.Mode("process"), source, "f", {"source": tests, "calls": calls}, limits, without)


@NAMESPACES
def test_the_right_program_passes(without: tuple[str, ...]) -> None:
    answer = run("def f(x): return 987654321", TESTS, without, Limits(cpu_seconds=20, wall_seconds=60.0))
    assert "results" in answer
    assert ("pid namespace" in answer["layers"]) <= (not without)


@NAMESPACES
@pytest.mark.parametrize("name", FORGERIES)
def test_no_pass_is_forged(name: str, without: tuple[str, ...], target: Target) -> None:
    answer = run(target.aim(FORGERIES[name]), TESTS, without, Limits(cpu_seconds=1, wall_seconds=1.0))
    assert answer.keys() <= {"error", "layers"}
    assert answer["error"]


@pytest.mark.parametrize("name", FORGERIES)
def test_no_pass_is_forged_with_layers_of_python_alone(name: str, target: Target) -> None:
    without = ("namespaces", "landlock", "seccomp")
    answer = run(target.aim(FORGERIES[name]), TESTS, without, Limits(cpu_seconds=1, wall_seconds=1.0))
    assert "results" not in answer


@NAMESPACES
@pytest.mark.parametrize("name", READS)
def test_no_secret_is_read(name: str, without: tuple[str, ...], target: Target) -> None:
    answer = run(target.aim(READS[name]), None, without)
    own = Path("/proc/self/environ").read_text().split("\0")[0]
    assert SECRET not in str(answer)
    assert not own or own not in str(answer)


@NAMESPACES
@pytest.mark.parametrize("name", HARM)
def test_no_harm_is_done(name: str, without: tuple[str, ...], target: Target) -> None:
    before = target.state()
    answer = run(target.aim(HARM[name]), TESTS, without)
    assert "error" in answer
    assert target.state() == before


@NAMESPACES
@pytest.mark.parametrize("name", EXCESS)
def test_excess_ends_and_leaves_nothing(name: str, without: tuple[str, ...], target: Target) -> None:
    before = target.state()
    answer = run(target.aim(EXCESS[name]), TESTS, without, SHORT)
    assert "error" in answer
    assert target.state() == before
    assert sandbox._starter is not None
    assert os.listdir(sandbox._starter._folder) == []


@NAMESPACES
def test_every_call_that_is_not_listed_is_refused(without: tuple[str, ...]) -> None:
    column = 0 if os.uname().machine == "x86_64" else 1
    known = {*kernel._numbers(kernel._ALLOWED, column).values(), *kernel._numbers(kernel._PARTLY, column).values()}
    known |= {335, 336}  # of uprobes' own trampolines, which no filter sees and which do nothing elsewhere
    source = f"""import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
    tried = set(range(600)) - {known}
    return [n for n in tried if libc.syscall(n, *([-1] * 6)) != -1 or ctypes.get_errno() not in (1, 38)], len(tried)"""
    ((allowed, tried),) = run(source, None, without)["results"]
    assert allowed == []
    assert tried > 400
