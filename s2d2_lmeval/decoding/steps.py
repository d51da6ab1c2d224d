"""A denoising step of every row: the device's decisions, and the table that brings them to the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import NOTHING, Step
from s2d2_lmeval.decoding.sampling.laws import as_bits, as_laws

Table = TypeVar("Table", torch.Tensor, np.ndarray)


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
    laws: Table | None = None
    """(rows, B * size) entries of what the step decided, 0 elsewhere, if they are kept
    (:func:`~s2d2_lmeval.decoding.sampling.laws.as_bits`)."""


class Decisions:
    """What one step decides: ``block``, ``masks``, ``marks`` and the ``order`` within equal marks, all (rows, B)."""

    def __init__(self, block: torch.Tensor, mask_token_id: int) -> None:
        self.block = self.before = block
        self.masks = self.masked_before = block == mask_token_id
        self.marks = self.order = torch.full_like(block, NOTHING)

    def decide(self, places: torch.Tensor, tokens: torch.Tensor, mark: int, order: torch.Tensor | None = None) -> None:
        """Write ``tokens`` at ``places``."""
        self.block = torch.where(places, tokens, self.block)
        self.masks = self.masks > places  # and not
        self.marks = self.marks.masked_fill(places, mark)
        if order is not None:
            self.order = torch.where(places, order, self.order)

    @property
    def count(self) -> torch.Tensor:
        """(rows,) tokens decided so far."""
        return (self.masked_before > self.masks).sum(-1)  # and not

    def tables(self, draft: torch.Tensor, laws: torch.Tensor | None = None) -> StepTables[torch.Tensor]:
        """The tables for the host; ``draft`` (rows, B) are the drafted tokens, and ``laws`` (rows, B, size) the entries
        of decided ones if they are kept.
        """
        drafted = torch.where(self.masked_before, draft, self.before)
        if laws is not None:
            laws = as_bits(laws.masked_fill((self.marks == NOTHING).unsqueeze(-1), 0))
        return StepTables(self.before, drafted, self.block, self.marks, self.order, laws)


@dataclass
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


def columns_of(
    verified: StepTables[torch.Tensor] | None,
    drafted: Sequence[StepTables[torch.Tensor]],
    span: torch.Tensor,
    moved: torch.Tensor,
    sound: torch.Tensor,
    made: torch.Tensor | None = None,
) -> torch.Tensor:
    """Everything as one table (rows, any), which :func:`step_result` takes apart."""
    steps = [*drafted, *([] if verified is None else [verified])]
    facts = (moved, sound.expand_as(moved), torch.ones_like(moved) if made is None else made)
    return pack(
        [
            span,
            *(fact.unsqueeze(1) for fact in facts),
            *(table for step in steps for table in step if table is not None),
        ]
    )


def step_result(table: np.ndarray, length: int, verified: bool, size: int) -> StepResult:
    """What :func:`columns_of` packed, for blocks of ``length``; ``verified`` says whether there was a verification,
    ``size`` is that of the laws' entries, if they are kept.
    """
    steps = [
        steps_of(table[:, at : at + (5 + size) * length], length)
        for at in range(length + 3, table.shape[1], (5 + size) * length)
    ]
    moved, sound, made = table[:, length : length + 3].T
    return StepResult(
        verified=steps.pop() if verified else None,
        drafted=steps,
        span=table[:, :length].astype(bool),
        moved=moved,
        made=made,
        sound=bool(sound.all()),
    )


def steps_of(table: np.ndarray, width: int) -> StepTables[np.ndarray]:
    """The tables of one step, of ``width`` places, which are side by side in ``table``."""
    return StepTables(*cut(table, range(width, 6 * width, width)))


def cut(table: np.ndarray, ends: Iterable[int]) -> list[np.ndarray]:
    """The columns of ``table`` (R, C) up to each of the rising ``ends``, and those after the last."""
    return [table[:, begin:end] for begin, end in pairwise((0, *ends, table.shape[1]))]


def narrow(step: StepTables[np.ndarray], width: int) -> StepTables[np.ndarray]:
    """The first ``width`` places of a step that the host has."""
    places = step.before.shape[1]
    return StepTables(*(table[:, : width * table.shape[1] // places] for table in step if table is not None))


def pack(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tables (rows, any) of whole numbers side by side."""
    return torch.cat([column.long() for column in columns], dim=1)


def as_step(step: StepTables[np.ndarray], slot: int, kind: str, start: int, span: np.ndarray) -> Step:
    """The step of row ``slot``, whose block begins at ``start``; ``span`` (B,) is what the verifier had before it."""
    before, draft, after, marks, order = (table[slot].tolist() for table in step[:5])
    assert step.laws is not None
    laws = as_laws(step.laws[slot], step.laws.shape[1] // len(before))
    drafted = (start + np.flatnonzero(span)).tolist() if kind == "verify" else []
    return Step(kind, start, before, draft, after, marks, drafted, order, laws)
