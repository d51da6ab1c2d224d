"""Chat templates under limits: a template is a program from the checkpoint, and may not terminate.

transformers renders it in a sandbox that protects the machine, but does not stop infinite loops or memory growth. So
the rendering itself, but nothing else of ``apply_chat_template``, runs in a separate process (:func:`serve`) with
limits on CPU time and memory: one line of JSON in, one line out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from jinja2 import TemplateError
from transformers import tokenization_utils_base
from transformers.utils.chat_template_utils import render_jinja_template

from s2d2_lmeval.errors import CheckpointError, S2D2Error, first_line

SECONDS = 10
"""CPU seconds for one conversation; a template normally takes a millisecond."""

LONGEST = 16 << 20
"""Characters of a rendered conversation."""
MEMORY = 1 << 30
"""Bytes beyond those that the empty process takes."""

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

_START = "import sys; sys.path[0] = {!r}; from s2d2_lmeval.templates import serve; serve()"
_workers: dict[int, subprocess.Popen[str]] = {}
_one_at_a_time = RLock()
"""Threads of an endpoint share the process that renders, and transformers' function, which is exchanged."""


@contextmanager
def limited() -> Iterator[None]:
    """Inside, ``tokenizer.apply_chat_template`` renders under limits; CheckpointError for whatever goes wrong."""
    with _one_at_a_time:
        own = tokenization_utils_base.render_jinja_template
        tokenization_utils_base.render_jinja_template = _render
        try:
            yield
        except S2D2Error:
            raise
        except Exception as error:
            raise _unusable(first_line(error)) from None
        finally:
            tokenization_utils_base.render_jinja_template = own


def _unusable(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer's chat template cannot be used ({reason}). Correct it (chat_template.jinja or "
        "tokenizer_config.json), name another tokenizer of the same vocabulary, or go without a chat template."
    )


def _render(*args: Any, **job: Any) -> tuple[list[str], list[Any]]:
    """As transformers' ``render_jinja_template``, which the worker runs."""
    job.update(zip(("conversations",), args, strict=False))
    try:
        request = json.dumps({"seconds": SECONDS, "job": job})
    except (TypeError, ValueError, RecursionError) as error:
        raise _unusable(f"its arguments are no JSON: {first_line(error)}") from None
    said = _ask(request)
    if "rendered" in said:
        return said["rendered"], []
    raise TemplateError(said["error"]) if said.get("by_template") else _unusable(said["error"])


def _ask(request: str) -> dict[str, Any]:
    worker = _workers.get(os.getpid())
    if worker is None or worker.poll() is not None:
        worker = _workers[os.getpid()] = _start()
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(request + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BaseException as error:  # a late answer would be mistaken for that of the next request
        worker.kill()
        worker.wait()
        if not isinstance(error, OSError):
            raise
        line = ""
    if not line:
        ended = worker.wait()
        why = f"it ran longer than {SECONDS} seconds" if ended < 0 else f"its process ended with code {ended}"
        raise _unusable(why)
    found: dict[str, Any] = json.loads(line)
    return found


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _START.format(str(Path(__file__).parents[1]))],  # not the folder that we happen to be in
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )


def serve() -> None:
    """The other process: answer until the input ends."""
    _limit_memory()
    for line in sys.stdin:
        request = json.loads(line)
        _limit_time(request["seconds"])
        print(json.dumps(_answer(request["job"])), flush=True)


def _limit_memory() -> None:
    """Limit this process to :data:`MEMORY` more than it has now."""
    if resource is None or not sys.platform.startswith("linux"):
        return
    with open("/proc/self/statm") as stream:
        size = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: int) -> None:
    """Let the system kill this process when it has used that much more CPU time."""
    if resource is None:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + 2 + seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """The rendered conversations, or an error."""
    try:
        rendered, _ = render_jinja_template(**job)
        if sum(map(len, rendered)) > LONGEST:
            return {"error": f"it writes more than {LONGEST} characters"}
        return {"rendered": rendered}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:
        said = str(error)[:300] or type(error).__name__
        return {"error": said, "by_template": isinstance(error, TemplateError)}
