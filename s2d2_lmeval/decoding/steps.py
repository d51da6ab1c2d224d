"""A denoising step of every row: the device's decisions, and the one read that brings them to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import NOTHING, Step

Table = TypeVar("Table", torch.Tensor, np.ndarray)


@dataclass
class Outcome:
    """The queries of an engine step that became prefix of each active row (R,).

    ``kept`` counts leading queries that became prefix by being accepted. If they are not the leading queries after the
    prefix, ``path`` lists them per row, counted from its end.
    """

    kept: np.ndarray
    path: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def zeros(cls, rows: int) -> Outcome:
        """Nothing yet, for R rows."""
        return cls(np.zeros(rows, dtype=np.int64))


class StepTables(NamedTuple, Generic[Table]):
    """One denoising step of every row, tables (rows, B), on the device or on the host."""

    before: Table
    """The block."""
    draft: Table
    """The same with every mask drafted."""
    after: Table
    """What the step made of it."""
    marks: Table
    """How each place was decided (:data:`~s2d2_lmeval.decoding.generation.MARK_NAMES`)."""
    order: Table
    """In which order, within equal marks."""


class Decisions:
    """What one step decides: ``block``, ``masks``, ``marks`` and the ``order`` within equal marks, all (rows, B)."""

    def __init__(self, block: torch.Tensor, mask_token_id: int) -> None:
        self.block = self.before = block
        self.masks = self.masked_before = block == mask_token_id
        self.marks = self.order = torch.full_like(block, NOTHING)

    def decide(self, places: torch.Tensor, tokens: torch.Tensor, mark: int, order: torch.Tensor | None = None) -> None:
        """Write ``tokens`` at ``places``."""
        self.block = torch.where(places, tokens, self.block)
        self.masks = self.masks & ~places
        self.marks = self.marks.masked_fill(places, mark)
        if order is not None:
            self.order = torch.where(places, order, self.order)

    @property
    def count(self) -> torch.Tensor:
        """(rows,) tokens decided so far."""
        return (self.masked_before & ~self.masks).sum(-1)

    def tables(self, draft: torch.Tensor) -> StepTables[torch.Tensor]:
        """The tables for the host; ``draft`` (rows, B) are the drafted tokens."""
        drafted = torch.where(self.masked_before, draft, self.before)
        return StepTables(self.before, drafted, self.block, self.marks, self.order)


@dataclass(frozen=True)
class StepResult:
    """What an engine step decided, as the host sees it."""

    verified: StepTables[np.ndarray] | None
    """The step that ended with a verification."""
    drafted: list[StepTables[np.ndarray]]
    """The steps that began with a draft, one after the other: Spiffy makes several from one forward."""
    span: np.ndarray
    """(rows, B) bool: the spans that go to the verifier."""
    moved: np.ndarray
    """(rows,) positive where the forward already had the next block's draft and the block ended as drafted."""
    made: np.ndarray
    """(rows,) how many of the steps that were drafted each row made."""
    sound: bool
    """False where logits were not numbers."""


def read_back(
    verified: StepTables[torch.Tensor] | None,
    drafted: Sequence[StepTables[torch.Tensor]],
    span: torch.Tensor,
    moved: torch.Tensor,
    sound: torch.Tensor,
    made: torch.Tensor | None = None,
) -> StepResult:
    """Fetch everything in one transfer. Here the host waits for the device."""
    steps = [*drafted, *([] if verified is None else [verified])]
    columns = [span, *(fact.unsqueeze(1) for fact in (moved, sound.expand_as(moved)))]
    if made is not None:
        columns.append(made.unsqueeze(1))
    read = fetch([*columns, *(table for step in steps for table in step)])
    host = [StepTables(*read[first : first + 5]) for first in range(len(columns), len(read), 5)]
    return StepResult(
        verified=None if verified is None else host.pop(),
        drafted=host,
        span=read[0].astype(bool),
        moved=read[1][:, 0],
        made=np.ones(len(span), dtype=np.int64) if made is None else read[3][:, 0],
        sound=bool(read[2].all()),
    )


def fetch(columns: list[torch.Tensor]) -> list[np.ndarray]:
    """Tables (rows, any) of whole numbers, fetched in one transfer."""
    packed = torch.cat([column.long() for column in columns], dim=1).cpu().numpy()
    return np.split(packed, np.cumsum([column.shape[1] for column in columns])[:-1], axis=1)


def as_step(step: StepTables[np.ndarray], slot: int, kind: str, start: int, span: np.ndarray) -> Step:
    """The step of row ``slot``, whose block begins at ``start``; ``span`` (B,) is what the verifier had before it."""
    before, draft, after, marks, order = (table[slot].tolist() for table in step)
    drafted = (start + np.flatnonzero(span)).tolist() if kind == "verify" else []
    return Step(kind, start, before, draft, after, marks, drafted, order)
