"""The one read of an engine step: what the device decided, as the host sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import ACCEPTED, DENOISED, HIGH_CONFIDENCE, KEPT, NOTHING, RATIO, RESAMPLED, Step
from s2d2_lmeval.decoding.rows import KIND_OF_PHASE, VERIFY, Rows


@dataclass(frozen=True)
class Outcome:
    """What one engine step did to each active row (R,), for the trace: tokens decided, put before the verifier,
    accepted; 1 if routed.
    """

    committed: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    routed: np.ndarray


@dataclass(frozen=True)
class Readback:
    """Tables (rows, B) of one step: the block ``before``, with every mask drafted (``draft``), and ``after``; ``marks``
    and the ``order`` within equal marks; the ``span`` that goes on to the verifier (empty where none). ``sound`` is
    false where logits were no numbers.
    """

    before: np.ndarray
    draft: np.ndarray
    after: np.ndarray
    marks: np.ndarray
    order: np.ndarray
    span: np.ndarray
    sound: bool

    @classmethod
    def read(cls, tables: list[torch.Tensor], sound: torch.Tensor) -> Readback:
        """Fetch six tables (rows, B) and a flag in one transfer. This is where the host waits for the device."""
        rows = tables[0].shape[0]
        packed = (
            torch.cat([*(table.long() for table in tables), sound.long().expand(rows).unsqueeze(1)], dim=1)
            .cpu()
            .numpy()
        )
        before, draft, after, marks, order, span = np.split(packed[:, :-1], len(tables), axis=1)
        return cls(before, draft, after, marks, order, span.astype(bool), bool(packed[:, -1].all()))

    def outcome(self, rows: Rows, slots: np.ndarray) -> Outcome:
        """The figures of the active rows ``slots``."""
        verifying = rows.phase[slots] == VERIFY
        accepted = (self.marks[slots] == ACCEPTED).sum(1)
        return Outcome(
            committed=(self.marks[slots] != NOTHING).sum(1),
            drafted=np.where(verifying, rows.span[slots].sum(1), 0),
            accepted=accepted,
            routed=self.span[slots].any(1).astype(np.int64),
        )

    def record(self, rows: Rows, slot: int, negate_denoised: bool) -> None:
        """Add the step of row ``slot`` to its request's record."""
        progress, start = rows.progress[slot], int(rows.start[slot])
        marks = self.marks[slot]
        progress.steps.append(
            Step(
                kind=KIND_OF_PHASE[rows.phase[slot]],
                start=start,
                before=self.before[slot].tolist(),
                draft=self.draft[slot].tolist(),
                tokens=self.after[slot].tolist(),
                marks=marks.tolist(),
            )
        )
        if rows.phase[slot] == VERIFY:
            progress.drafted += int(rows.span[slot].sum())
            progress.accepted += int((marks == ACCEPTED).sum())
        if (marks != NOTHING).any():
            entries = published_order(marks, self.order[slot], start, negate_denoised)
            progress.decoding_order.append(["|", *entries] if rows.step[slot] == 0 else entries)


def published_order(marks: np.ndarray, order: np.ndarray, start: int, negate_denoised: bool) -> list[int | float | str]:
    """Positions decided in a step in the published notation: p accepted or kept without resampling, p + 0.5 resampled,
    p + 0.2 by ratio, -p - 0.4 by high confidence, and -p (plain p without a verifier) by the remasking strategy.
    """
    sign = -1 if negate_denoised else 1
    shown = {
        ACCEPTED: lambda p: p,
        KEPT: lambda p: p,
        RESAMPLED: lambda p: p + 0.5,
        RATIO: lambda p: p + 0.2,
        HIGH_CONFIDENCE: lambda p: -p - 0.4,
        DENOISED: lambda p: sign * p,
    }
    entries: list[int | float | str] = []
    for mark, show in shown.items():
        places = np.flatnonzero(marks == mark)
        entries += [show(start + int(place)) for place in places[np.argsort(order[places], kind="stable")]]
    return entries
