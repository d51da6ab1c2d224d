"""The process that runs the program. It knows the program and the arguments of its calls, and nothing else.

There is nothing in it to find or to forge: what it says is taken as results of the function, never as a verdict.
"""

from __future__ import annotations

import os
import sys

from . import guard, kernel, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

READY, RETURNED, RAISED, FAILED = "ready", "returned", "raised", "the sandbox failed"
_TEXT = 200


def serve(job: Mapping[str, Any], questions: int, answers: int, layers: list[str]) -> None:
    """Load the program of ``job``, then answer calls: ``(status, value)`` for every tuple of arguments."""
    limit, folder = job["limits"]["answer_bytes"], job["folder"]
    try:
        os.chdir(folder)
        kernel.silence()
        layers = layers + kernel.lock(job["limits"], job["readable"], [folder, os.devnull], job["without"])
        if "seccomp" not in layers or not any(layer.startswith("landlock") for layer in layers):
            guard.install(folder)
            layers.append("audit hook")
    except BaseException as error:
        values.send(answers, (FAILED, str(error)), limit)
        return
    values.send(answers, layers, limit)
    module = type(sys)("candidate")
    sys.modules["candidate"] = module
    try:
        exec(compile(job["program"], "<candidate>", "exec"), module.__dict__)
        function = getattr(module, job["name"])
    except BaseException as error:
        values.send(answers, (RAISED, _described(error)), limit)
        return
    values.send(answers, (READY, None), limit)
    while True:
        arguments, named = values.receive(questions, limit)
        try:
            data = (RETURNED, function(*arguments, **named))
        except BaseException as error:
            data = (RAISED, _described(error))
        try:
            values.send(answers, data, limit)
        except values.Malformed as error:
            values.send(answers, (RAISED, _described(error)), limit)


def _described(error: BaseException) -> tuple[list[str], str]:
    """The names of an exception's classes, nearest first, and its text."""
    try:
        text = str(error)[:_TEXT]
    except Exception:
        text = ""
    return [kind.__name__ for kind in type(error).__mro__], text
