"""Run what a model wrote in a short-lived, limited subprocess.

What keeps accidents (endless loops, huge lists, early exits, forks, deleted files) away from the evaluation, innermost
first:

* an audit hook, which Python code cannot remove, refuses sockets, processes, signals to others, foreign libraries and
  every change of a file;
* resource limits: CPU time, memory, bytes written, processes (the last does not bind the super-user);
* a user and a network namespace of its own, where the kernel allows them (Linux, unless an administrator forbids it);
  :func:`has_no_network` says whether it did;
* wall time, and a limit on what is read back; the whole process group is killed whatever happened.

Success is a word that only the caller and the child's own last line know, so leaving early, however politely, is a
failure. All this is no defence against an attacker: run evaluations of models that you do not trust in a container.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What a subprocess may use: seconds of CPU and wall time, bytes of memory, of files and of its answer, and
    processes beside itself.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 5.0
    memory_bytes: int = 256 * 2**20
    file_bytes: int = 0
    processes: int = 0
    answer_bytes: int = 2**20


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why: an exception, or what it was stopped for."""

    passed: bool
    detail: str


# Read by a bare interpreter (-I -S). A refused event raises inside the program, which is then free to fail.
_CHILD = r"""
import json, os, sys

def isolate():
    try:
        if hasattr(os, "unshare"):
            unshare = os.unshare
        else:
            import ctypes
            libc = ctypes.CDLL(None, use_errno=True)
            def unshare(flags):
                if libc.unshare(flags):
                    raise OSError(ctypes.get_errno(), "unshare")
    except Exception:
        return False
    for flags in (0x50000000, 0x40000000):  # CLONE_NEWUSER | CLONE_NEWNET, or the network alone
        try:
            unshare(flags)
            return True
        except Exception:
            continue
    return False

def limit(limits):
    import resource
    for name, value in (("CPU", "cpu_seconds"), ("AS", "memory_bytes"), ("FSIZE", "file_bytes"),
                        ("NPROC", "processes"), ("CORE", None)):
        wanted = limits[value] if value else 0
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (wanted, wanted))
        except (ValueError, OSError):
            if sys.platform == "linux":  # macOS does not know every limit
                raise

def guard():
    refused = ("socket.", "subprocess.", "shutil.", "ctypes.", "pty.", "ftplib.", "urllib.", "syslog.")
    named = {"os." + name for name in (
        "fork", "forkpty", "posix_spawn", "spawn", "startfile", "system", "exec", "kill", "killpg", "putenv",
        "remove", "rename", "rmdir", "mkdir", "link", "symlink", "truncate", "chmod", "chown", "chflags", "lockf",
        "utime", "setxattr", "removexattr", "unsetenv")} | {"signal.pthread_kill", "tempfile.mkstemp",
        "tempfile.mkdtemp", "sys.addaudithook", "fcntl.fcntl", "fcntl.ioctl", "mmap.__new__"}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    try:
        import _posixsubprocess
        _posixsubprocess.fork_exec = None  # the only way to a process that raises no event
    except ImportError:
        pass
    def hook(event, arguments):
        if event in named or event.startswith(refused) or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & writing
        ):
            raise PermissionError("the sandbox refuses " + event)
    sys.addaudithook(hook)

def main():
    job = json.loads(sys.stdin.read())
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    isolated = isolate()
    limit(job["limits"])
    guard()
    write, leave, dumps = os.write, os._exit, json.dumps
    answer = {"isolated": isolated}
    try:
        space = {"__name__": "candidate"}
        exec(compile(job["source"], "<candidate>", "exec"), space)
        if job["name"] is not None:
            answer["results"] = [space[job["name"]](*arguments) for arguments in job["arguments"]]
        answer["word"] = job["word"]
        text = dumps(answer)
    except BaseException as error:
        text = dumps({"isolated": isolated, "error": type(error).__name__ + ": " + str(error)[:200]})
    data = text.encode()
    while data:
        data = data[write(report, data):]
    leave(0)

main()
"""


def call(source: str, name: str, arguments: list[list[Any]], limits: Limits | None = None) -> list[Any] | None:
    """Results of ``name(*a)`` for every ``a`` in ``arguments``, or None when any call fails in any way.

    The child never learns which results are expected.
    """
    answer = _run({"source": source, "name": name, "arguments": arguments}, limits or Limits())
    results = answer.get("results")
    return results if isinstance(results, list) and len(results) == len(arguments) else None


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Whether ``source`` runs to its end without an exception."""
    answer = _run({"source": source, "name": None, "arguments": []}, limits or Limits())
    return Outcome("error" not in answer, str(answer.get("error", "passed")))


@functools.cache
def has_no_network() -> bool:
    """Whether subprocesses get a network namespace of their own here, beside the hook that refuses sockets."""
    return bool(_run({"source": "", "name": None, "arguments": []}, Limits()).get("isolated"))


def _run(job: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """What the child reports; ``{"error": why}`` unless it reached its end."""
    word = secrets.token_hex(16)
    text = json.dumps({**job, "word": word, "limits": asdict(limits)})
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            output, stopped = _exchange(process, text.encode(), limits)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
    if stopped:
        return {"error": stopped}
    try:
        answer = json.loads(output)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        return {"error": f"left without an answer (exit status {process.returncode})"}
    if "error" in answer:
        return {"isolated": answer.get("isolated"), "error": str(answer["error"])}
    return answer if answer.pop("word", None) == word else {"error": "forged answer"}


def _exchange(process: subprocess.Popen[bytes], text: bytes, limits: Limits) -> tuple[bytes, str]:
    """Hand the job over, read the answer; what came, and why the child was stopped ("" where it ended by itself)."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(text)
        process.stdin.close()
    deadline, output = time.monotonic() + limits.wall_seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return output, f"ran longer than {limits.wall_seconds:g} s"
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return output, ""
            output += part
            if len(output) > limits.answer_bytes:
                return b"", f"answered with more than {limits.answer_bytes} bytes"
