"""What a pretend device was asked to do."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

BLOCKING, STAGED, ASYNCHRONOUS = "blocking", "staged", "asynchronous"
"""Uploads: the host waits for it; it asked not to wait, but the memory is pageable, so the driver copies it first; it
goes on at once, from pinned memory.
"""

READ = "read"
"""Why the host waited: for something that it reads. Other reasons are names of operations."""

_OWN, _TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)


@dataclass
class Counts:
    """Everything counted since :meth:`reset`. Counters are keyed by what it was and where: ``(name, "file:line")``."""

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kernels launched one by one, outside captures."""
    captured: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kernels recorded in captures, which do not run then."""
    replayed: int = 0
    """Kernels run by replays."""
    captures: int = 0
    replays: int = 0
    uploads: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Transfers to a device: :data:`BLOCKING`, :data:`STAGED` or :data:`ASYNCHRONOUS`."""
    reads: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Transfers to the host: :data:`BLOCKING` or :data:`ASYNCHRONOUS`."""
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Where the host stood still until a device was through, by reason."""
    mismatches: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Operations on tensors of several devices, and kernels launched on another device than their tensors'."""
    capture_faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What cannot be captured, or replays as something else than was captured."""
    races: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Pinned memory written to before its upload was known to be over."""

    def reset(self) -> None:
        """Forget everything."""
        vars(self).update(vars(Counts()))

    def totals(self) -> Counter[str]:
        """The numbers by name. ``blocking`` counts blocking uploads and all waits that bring nothing to the host."""
        blocking_uploads = _of_kind(self.uploads, BLOCKING)
        idle = self.waits.total() - _of_kind(self.waits, READ)
        return Counter(
            launches_outside=self.launches.total(),
            launches_captured=self.captured.total(),
            launches_replayed=self.replayed,
            captures=self.captures,
            replays=self.replays,
            uploads=self.uploads.total(),
            staged=_of_kind(self.uploads, STAGED),
            reads=self.reads.total(),
            waits=self.waits.total(),
            blocking=blocking_uploads + idle,
            device_mismatches=self.mismatches.total(),
            capture_faults=self.capture_faults.total(),
            races=self.races.total(),
        )


def _of_kind(counter: Counter[tuple[str, str]], kind: str) -> int:
    return sum(count for (name, _), count in counter.items() if name == kind)


def place() -> str:
    """The innermost line, as ``file:line``, that belongs neither to torch nor to this folder."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _short(frame.f_code.co_filename) is None:
        frame = frame.f_back
    return f"{_short(frame.f_code.co_filename) or '?'}:{frame.f_lineno}"


@cache
def _short(file: str) -> str | None:
    """The end of a path; None for what only passes calls on."""
    path = Path(file)
    if file.startswith((_OWN, _TORCH, "<")) or path.name in ("contextlib.py", "functools.py"):
        return None
    return "/".join(path.parts[-3:])
