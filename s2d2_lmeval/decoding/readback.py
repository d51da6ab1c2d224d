"""The one read of an engine step: what the device decided, as the host sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import (
    ACCEPTED,
    AUTOREGRESSIVE,
    DENOISED,
    HIGH_CONFIDENCE,
    KEPT,
    RATIO,
    RESAMPLED,
    Progress,
    Step,
)

Table = TypeVar("Table", torch.Tensor, np.ndarray)


@dataclass
class Outcome:
    """What of one engine step's queries became prefix of each active row (R,).

    ``kept`` leading queries that did so only now, by being accepted. Where they are not the leading queries after the
    prefix, ``path`` names them, counted from its end, per row.
    """

    kept: np.ndarray
    path: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def zeros(cls, rows: int) -> Outcome:
        """Nothing yet, for R rows."""
        return cls(np.zeros(rows, dtype=np.int64))


@dataclass(frozen=True)
class StepTables(Generic[Table]):
    """One denoising step of every row, tables (rows, B), on the device or on the host.

    ``before`` the block, ``draft`` the same with every mask drafted, ``after`` what the step made of it; ``marks`` how
    each place was decided and the ``order`` within equal marks.
    """

    before: Table
    draft: Table
    after: Table
    marks: Table
    order: Table

    def all(self) -> tuple[Table, ...]:
        """The tables in order."""
        return self.before, self.draft, self.after, self.marks, self.order


@dataclass(frozen=True)
class Readback:
    """What came back: the steps that ended with a verification, those that began with a draft, and where drafts go.

    ``span`` (rows, B) is what goes on to the verifier (empty where nothing does); ``moved`` (rows,) rows whose
    verification finished the block exactly as drafted, so that the draft it carried for the next block holds;
    ``sound`` is false where logits were no numbers.
    """

    verified: StepTables[np.ndarray] | None
    drafted: StepTables[np.ndarray] | None
    span: np.ndarray
    moved: np.ndarray
    sound: bool


def read_back(
    verified: StepTables[torch.Tensor] | None,
    drafted: StepTables[torch.Tensor] | None,
    span: torch.Tensor,
    moved: torch.Tensor,
    sound: torch.Tensor,
) -> Readback:
    """Fetch everything in one transfer. This is where the host waits for the device."""
    steps = [step for step in (verified, drafted) if step is not None]
    columns = [span, *(table for step in steps for table in step.all())]
    *tables, moves, soundness = fetch([*columns, moved.unsqueeze(1), sound.expand_as(moved).unsqueeze(1)])
    host = [StepTables(*tables[first : first + 5]) for first in range(1, len(tables), 5)]
    return Readback(
        verified=host[0] if verified is not None else None,
        drafted=host[-1] if drafted is not None else None,
        span=tables[0].astype(bool),
        moved=moves[:, 0].astype(bool),
        sound=bool(soundness.all()),
    )


def fetch(columns: list[torch.Tensor]) -> list[np.ndarray]:
    """Tables (rows, any) of whole numbers, fetched in one transfer."""
    packed = torch.cat([column.long() for column in columns], dim=1).cpu().numpy()
    return np.split(packed, np.cumsum([column.shape[1] for column in columns])[:-1], axis=1)


def as_step(step: StepTables[np.ndarray], slot: int, kind: str, start: int, span: np.ndarray) -> Step:
    """The step of row ``slot``, whose block begins at ``start``; ``span`` (B,) is what the verifier had before it."""
    return Step(
        kind=kind,
        start=start,
        before=step.before[slot].tolist(),
        draft=step.draft[slot].tolist(),
        tokens=step.after[slot].tolist(),
        marks=step.marks[slot].tolist(),
        drafted=(start + np.flatnonzero(span)).tolist() if kind == "verify" else [],
    )


def record_step(progress: Progress, done: Step, order: np.ndarray, first: bool, verifies: bool) -> None:
    """Add a step to its request's record; ``order`` (B,) within equal marks."""
    progress.steps.append(done)
    marks = np.array(done.marks)
    if marks.any():
        entries = published_order(marks, order, done.start, verifies)
        progress.decoding_order.append(["|", *entries] if first else entries)


_PUBLISHED = (
    *((ACCEPTED, 1, 0), (KEPT, 1, 0), (RESAMPLED, 1, 0.5), (RATIO, 1, 0.2)),
    *((HIGH_CONFIDENCE, -1, -0.4), (DENOISED, -1, 0), (AUTOREGRESSIVE, -1, -0.5)),
)
_SHOWN = [(sign, offset) for _, sign, offset in _PUBLISHED]
"""Sign and offset of a position in the published notation, in the order in which kinds of decisions are listed."""
_SHOWN_AFTER = {mark: kind for kind, (mark, _, _) in enumerate(_PUBLISHED)}
_DENOISED = _SHOWN_AFTER[DENOISED]


def published_order(marks: np.ndarray, order: np.ndarray, start: int, verifies: bool) -> list[int | float | str]:
    """Positions decided in a step in the published notation.

    p accepted or kept without resampling, p + 0.5 resampled, p + 0.2 by ratio, -p - 0.4 by high confidence, -p - 0.5
    from the last row of committed text, and -p (plain p in a decoder without a verifier) by the remasking strategy.
    """
    found = [
        (_SHOWN_AFTER[mark], rank, start + place)
        for place, (mark, rank) in enumerate(zip(marks.tolist(), order.tolist(), strict=True))
        if mark in _SHOWN_AFTER
    ]
    entries: list[int | float | str] = []
    for kind, _, position in sorted(found):
        sign, offset = _SHOWN[kind]
        entries.append(position if kind == _DENOISED and not verifies else sign * position + offset)
    return entries
