"""The results of one point on disk: an append-only file of JSON lines.

Every line has a checksum and is synced to disk (``fsync``) before the next sample. A process may be killed at any
moment: an interrupted write leaves an unreadable line, which is skipped and counted; earlier lines stay valid. Nothing
is ever overwritten. Lines are validated on reading (:data:`_HOLDS`), so users of a record need not check them.

Kinds of lines, by ``kind``:

=========  ==========================================================================================
point      what the point is: model, options, task, seed, code version
segment    a process starts (or resumes) the point: environment and rows in flight
sample     a response with its statistics; ``elapsed`` seconds since the segment began to decode
memory     memory ran out in this segment; how many rows continued
result     the harness's scores of the complete point, and the names of the samples that they are of
failure    why the point could not be completed; the next run retries it
=========  ==========================================================================================
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, Strict, create_model

from s2d2_lmeval.decoding.generation import Step, verifications
from s2d2_lmeval.errors import StudyError, shown
from s2d2_lmeval.harness.identity import of_plain
from s2d2_lmeval.harness.responses import TracedResponse
from s2d2_lmeval.harness.upstream import redacted

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from s2d2_lmeval.harness.prompts import Prompt

ORDERS_KEPT = 4
"""Documents of each point whose decoding order is stored, for its figure."""

Line = dict[str, Any]
OnSample = Callable[[Line, int], None]


class StorageError(StudyError):
    """Results that cannot be written: the whole run must stop."""


def encode_line(line: Mapping[str, Any]) -> bytes:
    """``line`` as one line of JSON with its checksum."""
    text = json.dumps({**line, "check": _check(line)}, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def decode_line(data: bytes) -> Line | None:
    """Decode a line of :func:`encode_line`; None for anything else."""
    try:
        line = json.loads(data)
        if not isinstance(line, dict) or line.pop("check", None) != _check(line):
            return None
        _MODELS[line["kind"]].model_validate(line)
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return line


def _check(line: Mapping[str, Any]) -> str:
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that can be added up."""
    return isinstance(value, (int, float)) and -1e18 < value < 1e18


_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_Number = Annotated[float, Field(gt=-1e18, lt=1e18, allow_inf_nan=False)]
_Statistic = _Number | bool | str | list[Any] | dict[str, Any] | None
SUMMED = ("new_tokens", "nfe")
"""Statistics that are added up over samples."""


def _summable(stats: dict[str, Any]) -> dict[str, Any]:
    if not all(is_number(stats.get(name, 0)) for name in SUMMED):
        raise ValueError("a count is not a number")
    return stats


_Statistics = Annotated[dict[str, _Statistic], AfterValidator(_summable)]
_Place = Annotated[tuple[_Count, _Count, _Count], Strict(False)]
_Score = Annotated[tuple[_Count, _Number], Strict(False)]
_HOLDS: dict[str, dict[str, Any]] = {
    "point": {"definition": dict[str, Any]},
    "segment": {
        "number": _Count,
        "environment": dict[str, str | int | float | None],
        "rows": int | str,
        "decoding": dict[str, Any] | None,
    },
    "sample": {
        "name": str,
        "text": str,
        "stats": _Statistics,
        "accepted": list[_Count],
        "order": list[_Place] | None,
        "segment": _Count,
        "elapsed": _Number,
    },
    "memory": {"rows": int | str},
    "result": {
        "settings": dict[str, Any],
        "samples": list[str],
        "metrics": dict[str, _Number],
        "documents": dict[str, list[_Score]],
        "metric_list": list[str],
        "filters": list[str],
    },
    "failure": {"error": str},
}
"""Kind of line -> its required content."""
_MODELS: dict[str, Any] = {
    kind: create_model(kind, __config__=ConfigDict(strict=True), **{name: (of, ...) for name, of in holds.items()})  # type: ignore
    for kind, holds in _HOLDS.items()
}


@dataclass
class PointRecord:
    """The content of a point's file.

    ``unreadable`` are the numbers (from 1) of lines that are incomplete, precede the ``point`` line, or are samples of
    a lost segment: interrupted writes, or damage. If a request was answered twice (its first line was damaged), the
    last answer counts.
    """

    point: Line = field(default_factory=dict)
    segments: dict[int, Line] = field(default_factory=dict)
    samples: dict[str, Line] = field(default_factory=dict)
    memory: list[Line] = field(default_factory=list)
    result: Line | None = None
    failure: Line | None = None
    unreadable: list[int] = field(default_factory=list)

    def total(self, name: str) -> float:
        """A count of all samples together, one of :data:`SUMMED`."""
        return sum(sample["stats"].get(name, 0) for sample in self.samples.values())

    @property
    def decoding_seconds(self) -> float:
        """Wall-clock time of decoding: the sum over segments of the time up to the last sample."""
        last: dict[int, float] = {}
        for sample in self.samples.values():
            last[sample["segment"]] = max(last.get(sample["segment"], 0.0), sample["elapsed"])
        return sum(last.values())

    def is_complete(self, settings: Mapping[str, Any] | None = None) -> bool:
        """Whether there is a result with all its samples, and with these ``settings`` if given."""
        result = self.result
        return (
            result is not None
            and self.failure is None
            and bool(result["samples"])
            and all(name in self.samples for name in result["samples"])
            and (settings is None or result["settings"] == settings)
        )

    def of_the_result(self) -> PointRecord:
        """The same with only the result's samples, without others (of more documents, of another prompt)."""
        assert self.result is not None
        samples = {name: self.samples[name] for name in self.result["samples"]}
        used = {sample["segment"] for sample in samples.values()}
        segments = {number: segment for number, segment in self.segments.items() if number in used}
        return replace(self, samples=samples, segments=segments)

    def add(self, line: Line) -> bool:
        """Add the next line; returns whether it is valid here."""
        kind = line["kind"]
        if (not self.point and kind != "point") or (kind == "sample" and line["segment"] not in self.segments):
            return False
        if kind == "segment":
            self.segments[line["number"]] = line
        elif kind == "sample":
            self.samples[line["name"]] = line
        elif kind == "memory":
            self.memory.append(line)
        else:  # point, result, failure
            setattr(self, kind, line)
        if kind == "result":
            self.failure = None
        return True


def read_point(path: Path) -> PointRecord:
    """The record in ``path``; an empty one if there is no such file, a failure alone if it is another point's.

    Raises:
        StudyError: if it cannot be read at all.
    """
    record = PointRecord()
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror or error}.") from None
    for number, text in enumerate(data.split(b"\n"), 1):
        line = decode_line(text) if text else None
        if text and (line is None or not record.add(line)):
            record.unreadable.append(number)
    if record.point and of_plain(record.point["definition"]) != path.stem:
        of = shown(record.point.get("label", "another point"))
        foreign = f"{path} holds the results of something else ({of}): it was copied or renamed. Move it away."
        return PointRecord(failure={"kind": "failure", "error": foreign})
    return record


class PointStore:
    """A point's file, open in one process at a time; also the model's response store
    (:class:`~s2d2_lmeval.harness.responses.ResponseStore`).
    """

    shows_progress = True

    def __init__(self, path: Path, on_sample: OnSample | None = None) -> None:
        """
        Args:
            on_sample: called for every added sample, with the point's number of samples.

        Raises:
            StudyError: if another process has the file open, or it is another point's.
            StorageError: if it cannot be written.
        """
        self.path = path
        self._on_sample = on_sample
        self._began, self._before, self.added = 0.0, 0, 0
        self.asked: dict[str, None] = {}
        self.token_text: Callable[[int], str] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab", buffering=0)
        except OSError as error:
            raise _cannot_write(path, error) from None
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise StudyError(f"another process is working on {path}; wait for it, or use another folder.") from None
        except OSError:  # a file system without locks
            pass
        try:
            self.record = read_point(path)
            if self.record.failure is not None and not self.record.point:
                raise StudyError(self.record.failure["error"])
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                self._write(b"\n")  # an interrupted write stays, as a separate line
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> PointStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, kind: str, **content: Any) -> Line:
        """Append a line, and wait until it is on disk.

        Raises:
            StorageError: if that fails.
        """
        line: Line = {"kind": kind, **(redacted(content) if kind in ("result", "failure") else content)}
        self._write(encode_line(line))
        self.record.add(line)
        return line

    def begin(self, definition: Mapping[str, Any], label: str) -> None:
        """Write the ``point`` line if it is missing; lines before it do not count."""
        if not self.record.point:
            self.append("point", definition=definition, label=label)

    def begin_segment(self, **about: Any) -> None:
        """A process starts (or resumes) the point."""
        self.append("segment", number=1 + max(self.record.segments, default=-1), **about)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
            if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                raise FileNotFoundError(errno.ENOENT, "it was replaced by another file")
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    # What the model sees

    def find(self, prompt: Prompt) -> TracedResponse | None:
        """The response that is on disk."""
        self.asked[prompt.name] = None
        sample = self.record.samples.get(prompt.name)
        return TracedResponse(sample["text"], sample["stats"]) if sample is not None else None

    def decoding_begins(self) -> None:
        """Start the clock of this segment."""
        self._before = sum(name in self.record.samples for name in self.asked) - self.added
        self._began = time.perf_counter()

    def _pieces(self, steps: Sequence[Step], end: int) -> list[str] | None:
        """The texts of the tokens in their decoding order, if somebody knows them."""
        return None if self.token_text is None else [self.token_text(token) for token in decided_tokens(steps, end)]

    def add(self, prompt: Prompt, response: TracedResponse, steps: Sequence[Step]) -> None:
        """Put a response on disk."""
        end = len(prompt.ids) + int(response.stats["new_tokens"])
        is_kept = prompt.document is not None and prompt.document < ORDERS_KEPT and not prompt.occurrence
        content: Line = {
            "name": prompt.name,
            "document": prompt.document,
            "text": str(response),
            "stats": dict(response.stats),
            "accepted": [verification.accepted for verification in verifications(steps, end)],
            "order": decoding_order(steps, end) if is_kept else None,
            "pieces": self._pieces(steps, end) if is_kept else None,
            "segment": max(self.record.segments),
            "elapsed": time.perf_counter() - self._began,
        }
        line = self.append("sample", **content)
        self.added += 1
        if self._on_sample is not None:
            self._on_sample(line, self._before + self.added)


def decided_tokens(steps: Sequence[Step], end: int) -> list[int]:
    """The token in every place of :func:`decoding_order`."""
    tokens = {at: token for step in steps for at, token in enumerate(step.tokens, step.start)}
    return [tokens[place] for place, _, _ in decoding_order(steps, end)]


def decoding_order(steps: Sequence[Step], end: int) -> list[list[int]]:
    """[position, number of the step, mark] of every place before ``end``, where the answer ends, in the order in which
    it was decided (for the last time).
    """
    decided: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for place, mark in enumerate(step.marks, step.start):
            if mark and place < end:
                decided[place] = [place, number, int(mark)]
    return sorted(decided.values(), key=lambda one: (one[1], one[0]))


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` atomically.

    Raises:
        StorageError: if it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> StorageError:
    why = error.strerror or str(error)
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return StorageError(f"cannot write {path}: {why}. It was moved or deleted meanwhile; start again.")
    return StorageError(f"cannot write {path}: {why}. What was finished is kept; make room, and start again.")
