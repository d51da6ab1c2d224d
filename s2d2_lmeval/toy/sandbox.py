"""Call a function of untrusted source text in a short-lived, limited subprocess.

This keeps accidents of a model (endless loops, huge lists, early exits) away from the evaluation. It is no defence
against an attacker: run evaluations of unknown models inside a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

MEMORY_BYTES = 256 * 2**20
TIMEOUT_SECONDS = 5.0

LIMITS = {
    "RLIMIT_CPU": 2,
    "RLIMIT_AS": MEMORY_BYTES,
    "RLIMIT_FSIZE": 0,
    "RLIMIT_NPROC": 0,
    "RLIMIT_CORE": 0,
}
"""Resource limits of the subprocess: seconds, bytes, bytes, processes, bytes."""

_CHILD = """
import json, os, resource, sys
job = json.loads(sys.stdin.read())
for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
report = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
space = {"__name__": "candidate"}
exec(compile(job["source"], "<candidate>", "exec"), space)
function = space[job["name"]]
os.write(report, json.dumps([function(*arguments) for arguments in job["arguments"]]).encode())
os._exit(0)
"""


def call(source: str, name: str, arguments: list[list[Any]], timeout: float = TIMEOUT_SECONDS) -> list[Any] | None:
    """Results of ``name(*a)`` for every ``a`` in ``arguments``, or None when any call fails in any way.

    The child never learns which results are expected, so leaving early, however politely, cannot count as success.
    It gets no environment, no site packages and limits on CPU time, memory, file size and processes; its process group
    dies with it.
    """
    job = json.dumps({"source": source, "name": name, "arguments": arguments, "limits": LIMITS})
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
            text=True,
        )
        try:
            output, _ = process.communicate(job, timeout=timeout)
        except subprocess.TimeoutExpired:
            output = ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
    try:
        results = json.loads(output)
    except ValueError:
        return None
    return results if isinstance(results, list) and len(results) == len(arguments) else None
