"""The results of one point on disk: a file of JSON lines to which lines are only ever added.

Every line carries a checksum and is on the disk (``fsync``) before the next sample is waited for. A process may be
killed at any moment: what it was writing is an unreadable line, which is skipped from then on and counted; everything
before it stands. Nothing is ever overwritten.

Kinds of lines, by ``kind``:

=========  ==========================================================================================
point      what the point is: model, options, task, seed, code version
segment    a process begins (or goes on) with the point: environment and rows in flight
sample     a response with its statistics; ``elapsed`` seconds since the segment began to decode
memory     memory ran out in this segment; how many rows went on
result     the harness's scores of the complete point
failure    why the point could not be completed; it is tried again by the next run
=========  ==========================================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness.responses import TracedResponse

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.generation import Step
    from s2d2_lmeval.harness.prompts import Prompt

ORDERS_KEPT = 4
"""Documents of each point whose decoding order is kept, for the picture of it."""

Line = dict[str, Any]


class StorageError(StudyError):
    """Results that cannot be written: the run must stop, whatever point it is at."""


def encode_line(line: Mapping[str, Any]) -> bytes:
    """``line`` as one line of JSON with its checksum."""
    text = json.dumps({**line, "check": _check(line)}, ensure_ascii=False, separators=(",", ":"))
    return text.encode() + b"\n"


def decode_line(data: bytes) -> Line | None:
    """What :func:`encode_line` wrote; None for anything else."""
    try:
        line = json.loads(data)
    except ValueError:
        return None
    if not isinstance(line, dict) or "kind" not in line or line.pop("check", None) != _check(line):
        return None
    return line


def _check(line: Mapping[str, Any]) -> str:
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class PointRecord:
    """What a point's file says.

    ``unreadable`` are the numbers of lines that are no whole lines (from 1): a write that was cut short, or damage.
    Where a request was answered twice (its first line was damaged) the last answer counts.
    """

    point: Line = field(default_factory=dict)
    segments: list[Line] = field(default_factory=list)
    samples: dict[str, Line] = field(default_factory=dict)
    memory: list[Line] = field(default_factory=list)
    result: Line | None = None
    failure: Line | None = None
    unreadable: list[int] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        """Of all samples."""
        return int(sum(sample["stats"].get("new_tokens", 0) for sample in self.samples.values()))

    @property
    def decoding_seconds(self) -> float:
        """Wall time of decoding: of each segment the time up to its last sample."""
        last: dict[int, float] = {}
        for sample in self.samples.values():
            last[sample["segment"]] = max(last.get(sample["segment"], 0.0), sample["elapsed"])
        return sum(last.values())

    def add(self, line: Line) -> None:
        """Take the next line in."""
        kind = line["kind"]
        if kind == "point":
            self.point = line
        elif kind == "segment":
            self.segments.append(line)
        elif kind == "sample":
            self.samples[line["name"]] = line
        elif kind == "memory":
            self.memory.append(line)
        elif kind == "result":
            self.result, self.failure = line, None
        elif kind == "failure":
            self.failure = line


def read_point(path: Path) -> PointRecord:
    """The record in ``path``; an empty one if there is no such file."""
    record = PointRecord()
    if path.exists():
        for number, data in enumerate(path.read_bytes().split(b"\n"), 1):
            line = decode_line(data) if data else None
            if line is not None:
                record.add(line)
            elif data:
                record.unreadable.append(number)
    return record


class PointStore:
    """A point's file, open for one process at a time; also what a model keeps its responses in
    (:class:`~s2d2_lmeval.harness.responses.ResponseStore`).
    """

    shows_progress = True

    def __init__(self, path: Path, on_sample: Callable[[Line], None] | None = None) -> None:
        """
        :param on_sample: told of every sample that is added.
        :raises StudyError: when another process has the file open.
        :raises StorageError: when it cannot be written.
        """
        self.path = path
        self._on_sample = on_sample
        self._began = 0.0
        self._orders = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab", buffering=0)
        except OSError as error:
            raise _cannot_write(path, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise StudyError(f"another process is working on {path}; wait for it, or use another folder.") from None
        except OSError:  # a file system without locks
            pass
        self.record = read_point(path)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._write(b"\n")  # what was cut short stays, as a line of its own

    def __enter__(self) -> PointStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, kind: str, **content: Any) -> Line:
        """Add a line, and wait until the disk has it.

        :raises StorageError: when it has not.
        """
        line: Line = {"kind": kind, **content}
        self._write(encode_line(line))
        self.record.add(line)
        return line

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    # What the model sees

    def find(self, prompt: Prompt) -> TracedResponse | None:
        """The response that is on disk."""
        sample = self.record.samples.get(prompt.name)
        return TracedResponse(sample["text"], sample["stats"]) if sample is not None else None

    def decoding_begins(self) -> None:
        """Start the clock of this segment."""
        self._began = time.perf_counter()

    def add(self, prompt: Prompt, response: TracedResponse, steps: Sequence[Step]) -> None:
        """Put a response on disk."""
        content: Line = {
            "name": prompt.name,
            "document": prompt.document,
            "text": str(response),
            "stats": dict(response.stats),
            "accepted": acceptance_lengths(steps),
            "segment": len(self.record.segments) - 1,
            "elapsed": time.perf_counter() - self._began,
        }
        if prompt.document is not None and prompt.document < ORDERS_KEPT and not prompt.occurrence:
            content["order"] = decoding_order(steps)
        line = self.append("sample", **content)
        if self._on_sample is not None:
            self._on_sample(line)


def acceptance_lengths(steps: Sequence[Step]) -> list[int]:
    """How many drafted tokens each verification accepted."""
    from s2d2_lmeval.decoding.generation import ACCEPTED

    return [step.marks.count(ACCEPTED) for step in steps if step.kind == "verify"]


def decoding_order(steps: Sequence[Step]) -> list[list[int]]:
    """[position, number of the step, mark] of every place in the order in which it was decided (for the last time)."""
    decided: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for offset, mark in enumerate(step.marks):
            if mark:
                decided[step.start + offset] = [step.start + offset, number, int(mark)]
    return sorted(decided.values(), key=lambda place: (place[1], place[0]))


def write_whole(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``, at once or not at all.

    :raises StorageError: when it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}: {error.strerror or error}. What was finished is kept; make room, and start again."
    )
