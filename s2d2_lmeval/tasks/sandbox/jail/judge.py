"""The process that runs the tests. It holds what is expected, calls the program's function in the other process by
value, and says whether the tests ran to their end. No code of the program ever runs here.
"""

from __future__ import annotations

import builtins

from . import kernel, program, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_MEMORY = 2**30
_LARGEST = 2**30
_TEXT = 200
_NONSENSE = "the program broke the protocol"
# In `all(map(…))` these would end the loop over the tests, not fail it.
_ENDS_OF_LOOPS = (StopIteration, StopAsyncIteration)


class ProgramEnded(BaseException):
    """The program cannot go on: it is no :class:`Exception`, so that no test takes it for an expected error."""


class Candidate:
    """Stands for the program's function in the tests."""

    def __init__(self, name: str, questions: int, answers: int, limit: int) -> None:
        self.__name__ = name
        self._questions, self._answers, self._limit = questions, answers, limit
        self.lost: ProgramEnded | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the function returns; an exception of Python's own raises the same here."""
        try:
            values.send(self._questions, (arguments, named), self._limit)
        except BrokenPipeError:
            raise self.end("the program ended early") from None
        status, value = self.receive()
        if status == program.RETURNED:
            return value
        if status != program.RAISED:
            raise self.end(_NONSENSE)
        raise self._raised(*value)

    def receive(self) -> Any:
        """The next thing that the program says: a pair of a status and a value, or its layers."""
        try:
            answer = values.receive(self._answers, self._limit)
        except EOFError:
            raise self.end("the program ended early") from None
        except values.Malformed as error:
            raise self.end(f"the program answered with {error}") from None
        pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str)
        raised = pair and answer[0] == program.RAISED
        if not (pair or isinstance(answer, list)) or (raised and not _is_description(answer[1])):
            raise self.end(_NONSENSE)
        return answer

    def end(self, why: str) -> ProgramEnded:
        """The exception that says so; from now on nothing can pass."""
        self.lost = ProgramEnded(why)
        return self.lost

    def _raised(self, names: list[str], text: str) -> BaseException:
        for name in names:
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, _ENDS_OF_LOOPS):
                return RuntimeError(f"{name}: {text}")
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    return kind(text)
                except TypeError:  # UnicodeDecodeError and such take more than a text
                    continue
        return self.end(f"{names[0]}: {text}")  # SystemExit, KeyboardInterrupt


def _is_description(value: Any) -> bool:
    names, text = value if isinstance(value, tuple) and len(value) == 2 else (None, None)
    return isinstance(text, str) and isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)


def judge(job: Mapping[str, Any], questions: int, answers: int, report: int) -> None:
    """Read the tests from standard input, run them, write the verdict to ``report``."""
    try:
        tests = values.receive(0, _LARGEST)
        kernel.silence()
        limits = {**job["limits"], "memory_bytes": max(_MEMORY, job["limits"]["memory_bytes"]), "file_bytes": 0}
        kernel.lock(limits, job["readable"], ["/dev/null"], job["without"])
        candidate = Candidate(job["name"], questions, answers, job["limits"]["answer_bytes"])
        layers = candidate.receive()
    except BaseException as error:  # nothing of the program has run yet
        values.send(report, {"sandbox": f"{type(error).__name__}: {error}"}, _LARGEST)
        return
    if isinstance(layers, tuple):
        values.send(report, {"sandbox": str(layers)}, _LARGEST)
        return
    values.send(report, {"layers": layers, **_verdict(tests, candidate)}, _LARGEST)


def _verdict(tests: Mapping[str, Any], candidate: Candidate) -> dict[str, Any]:
    try:
        status, value = candidate.receive()
        if status != program.READY:
            raise candidate.end(f"{value[0][0]}: {value[1]}" if status == program.RAISED else _NONSENSE)
        results = _check(tests, candidate)
        if candidate.lost is not None:  # whatever the tests made of it
            raise candidate.lost
    except ProgramEnded as error:
        return {"error": str(error)}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {str(error)[:_TEXT]}"}
    return {"results": results}


def _check(tests: Mapping[str, Any], candidate: Candidate) -> list[Any] | None:
    """Run tests; or make calls, whose results are compared by who asked for them."""
    if tests["source"] is None:
        return [candidate(*arguments) for arguments in tests["calls"]]
    space: dict[str, Any] = {"__name__": "tests", candidate.__name__: candidate}
    exec(compile(tests["source"], "<tests>", "exec"), space)
    return None
