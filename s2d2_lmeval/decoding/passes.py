"""Laying out passes: a row's queries as segments, the logits that are read as groups, and what the device is to know
besides. All of it is arrays on the host, which go to the device in one transfer, exact or padded to a bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from s2d2_lmeval.runtime.passes import TARGET, Layout, ragged
from s2d2_lmeval.runtime.shapes import Frame

_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass
class Segment:
    """Some queries of some rows, row-major: ``count`` (R,) of each row."""

    count: np.ndarray
    columns: dict[str, np.ndarray | int] = field(default_factory=dict)
    row: np.ndarray = field(init=False)
    """(K,) index among the active rows, ascending."""
    local: np.ndarray = field(init=False)
    """(K,) index within the row's part of the segment."""
    first: np.ndarray = field(init=False)
    """(R,) packed index of each row's first query, once the pass is laid out."""
    query: np.ndarray = field(init=False)
    """(K,) packed index, once the pass is laid out."""

    def __post_init__(self) -> None:
        self.row, self.local, _ = ragged(self.count)

    @property
    def position(self) -> np.ndarray:
        """(K,) RoPE position."""
        return np.asarray(self.columns["position"])

    def set(self, **columns: np.ndarray | int) -> Segment:
        """Set further columns of the queries: (K,) each, or one value for all."""
        self.columns |= columns
        return self


@dataclass
class Plan:
    """The next forward of all R active rows and how to read its logits; arrays on the host.

    ``queries`` (N,) and ``tables`` (R, W), with their padding, tell of queries, ``reads`` (M,) of wanted logits,
    ``rows`` of every row of the decoder, active or not, and ``lists`` (K,) or (..., K) of some things, with their
    maximum (0: as many as rows); a list repeats its first entry where it is padded. ``groups`` names the ranges of
    wanted logits in order, ``query`` (M,) the queries that give them, which are about ``place`` (M,), one of
    ``places``, of the rows ``slot`` (M,). ``known`` is what the decoder keeps for itself.
    """

    layout: Layout
    phases: np.ndarray
    """(R,) what each row does (:data:`~s2d2_lmeval.decoding.state.KIND_OF_PHASE`)."""
    keep: np.ndarray
    """(R,) number of leading queries of each row that become prefix after this forward."""
    groups: Mapping[str, slice]
    query: np.ndarray
    slot: np.ndarray
    place: np.ndarray
    places: int
    queries: Mapping[str, np.ndarray]
    tables: Mapping[str, tuple[np.ndarray, int]]
    reads: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]
    lists: Mapping[str, tuple[np.ndarray, int]]
    known: Mapping[str, Any] = field(default_factory=dict)
    model: str = TARGET
    """Which model answers: the target, or the drafter loaded beside it."""
    feeds_drafter: bool = False
    """Whether the drafter is to read what becomes prefix by this pass."""
    moves: bool = False
    """Whether other than leading queries may become prefix, or the drafter is to read what does."""
    fixed: tuple[int, ...] = ()
    """Numbers that the decoder's device part depends on, besides shapes."""

    def tell(self, **rows: np.ndarray) -> Plan:
        """Tell of every row this too; returns the plan."""
        self.rows = {**self.rows, **rows}
        return self

    @property
    def wanted_counts(self) -> np.ndarray:
        """(R,) logits that each row reads."""
        return np.bincount(self.slot, minlength=int(self.layout.slots.max()) + 1)[self.layout.slots]

    def count(self, name: str) -> int:
        """The number of logits in a group; 0 without it."""
        group = self.groups.get(name, slice(0, 0))
        return group.stop - group.start

    @property
    def present(self) -> tuple[str, ...]:
        """The groups that are not empty."""
        return tuple(name for name, group in self.groups.items() if group.stop > group.start)

    def lay(self, frame: Frame, count: int) -> dict[str, np.ndarray]:
        """Everything for the device, in buffers of the shape of ``frame``; the decoder has ``count`` rows."""
        cells, nowhere = self.slot * self.places + self.place, count * self.places
        if frame.shape.padded:
            groups = [self.groups[name] for name in self.present]
            table = np.full((len(groups), frame.shape.wanted), nowhere, dtype=np.int64)
            for of_group, group in zip(table, groups, strict=True):
                of_group[group] = cells[group]
        else:
            table = cells[None]
        return {
            "read": frame.wanted(frame.at[self.query]),
            "read_slot": frame.wanted(self.slot),
            "read_place": frame.wanted(self.place),
            "cells": table,
            **{name: frame.queries(values) for name, values in self.queries.items()},
            **{name: frame.table(values, fill) for name, (values, fill) in self.tables.items()},
            **{name: frame.wanted(values) for name, values in self.reads.items()},
            **self.rows,
            **{
                name: _repeated(values, most or count) if frame.shape.padded else values
                for name, (values, most) in self.lists.items()
            },
        }


def _repeated(values: np.ndarray, length: int) -> np.ndarray:
    """``values`` (..., K) extended to ``length`` by the first; zeros of none."""
    if not values.shape[-1]:
        return np.zeros((*values.shape[:-1], length), dtype=np.int64)
    return np.concatenate([values, values[..., :1].repeat(length - values.shape[-1], axis=-1)], axis=-1)


class Sent(dict[str, torch.Tensor]):
    """What :meth:`Plan.lay` tells, on the device, by name; and where a group's logits are.

    In a bucket every group looks at all wanted logits, and has a cell for its own only: the others go to the cell after
    the last, which nobody reads (:class:`Cells`). So its graph depends on their number alone.
    """

    def __init__(self, told: Mapping[str, torch.Tensor], plan: Plan, frame: Frame) -> None:
        super().__init__(told)
        self.groups, self.present, self.fixed = plan.groups, plan.present, plan.fixed
        self.frame, self.moves, self.model = frame, plan.moves, plan.model
        self.places = plan.places

    def has(self, name: str) -> bool:
        """Whether any logits of the group are wanted."""
        return name in self.present

    def part(self, name: str) -> slice:
        """Which of the wanted logits to look at for a group."""
        if self.frame.shape.padded:
            return slice(0, self.frame.shape.wanted if self.has(name) else 0)
        return self.groups.get(name, slice(0, 0))

    def at(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(slots, places) of a group's logits."""
        part = self.part(name)
        return self["read_slot"][part], self["read_place"][part]

    def cells(self, name: str) -> torch.Tensor:
        """The cell of each of a group's logits, slot * places + place."""
        if not self.frame.shape.padded:
            return self["cells"][0, self.part(name)]
        return self["cells"][self.present.index(name)] if self.has(name) else self["read_slot"][:0]


class Cells:
    """A table (rows, places, ...) that is written by cell, and one cell more for what belongs nowhere."""

    def __init__(self, flat: torch.Tensor, places: int) -> None:
        self.flat = flat
        self.table = flat[:-1].unflatten(0, (-1, places))

    @classmethod
    def like(cls, table: torch.Tensor, fill: float = 0) -> Cells:
        """An empty one of the shape and type of ``table``."""
        return cls(table.new_full((table.numel() + 1,), fill), table.shape[1])

    @classmethod
    def of_entries(cls, table: torch.Tensor, size: int) -> Cells:
        """An empty one with ``size`` float64 numbers in every place of ``table``."""
        return cls(table.new_zeros((table.numel() + 1, size), dtype=torch.double), table.shape[1])

    def put(self, cells: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Write ``values`` (K, ...) to ``cells`` (K,); returns the table."""
        self.flat.index_copy_(0, cells, values.to(self.flat.dtype))
        return self.table

    def __getitem__(self, cells: torch.Tensor) -> torch.Tensor:
        return self.flat[cells]


class PassBuilder:
    """Collects the segments of one forward over the rows ``slots`` (R,); a row's segments keep the order of adding."""

    def __init__(self, slots: np.ndarray) -> None:
        self.slots = slots
        self._segments: list[Segment] = []
        self._reads: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._facts: dict[str, dict[str, np.ndarray]] = {}

    def add(self, count: np.ndarray) -> Segment:
        """``count`` (R,) queries of each row, without ``position``, which is set later."""
        self._segments.append(Segment(count))
        return self._segments[-1]

    def span(self, first: np.ndarray, count: np.ndarray) -> Segment:
        """``count`` (R,) consecutive positions of each row, from ``first`` (R,) on."""
        segment = self.add(count)
        return segment.set(position=first[segment.row] + segment.local)

    def each(self, row: np.ndarray, position: np.ndarray) -> Segment:
        """Queries one by one, ``row`` (K,) ascending."""
        return self.add(np.bincount(row, minlength=len(self.slots))).set(position=position)

    def lay_out(self) -> Layout:
        """Fix the order of all queries; :attr:`Segment.query` is valid afterwards."""
        counts = [segment.count for segment in self._segments]
        self.layout = Layout(self.slots, counts[0] if len(counts) == 1 else np.add.reduce(counts))
        first, used = self.layout.offsets, [segment for segment in self._segments if len(segment.row)]
        for segment in self._segments:
            segment.first, segment.query = first, segment.row
            if len(used) == 1 and segment is used[0]:
                segment.query = np.arange(len(segment.row))
            elif len(segment.row):
                segment.query = first[segment.row] + segment.local
                first = first + segment.count
        self._segments = used
        return self.layout

    def column(self, name: str, default: int = 0) -> np.ndarray:
        """(N,) the segments' values of ``name`` (also ``position``); ``default`` for segments without one."""
        if len(self._segments) == 1:
            only = self._segments[0].columns.get(name, default)
            if isinstance(only, np.ndarray):
                return only
        values = np.full(self.layout.queries, default, dtype=np.int64)
        for segment in self._segments:
            if name in segment.columns:
                values[segment.query] = segment.columns[name]
        return values

    def padded(self, name: str, fill: int, default: int = 0) -> np.ndarray:
        """A column spread over a table (R, W); unused places hold ``fill``."""
        return self.layout.padded(self.column(name, default), fill)

    def read(self, name: str, row: np.ndarray, place: np.ndarray, query: np.ndarray, **facts: np.ndarray) -> None:
        """Request the logits at packed queries (K,), which are about ``place`` (K,) of active rows ``row`` (K,); the
        device is told the ``facts`` (K,) of them.
        """
        self._reads[name] = row, place, query
        for fact, values in facts.items():
            self._facts.setdefault(fact, {})[name] = values

    @property
    def groups(self) -> dict[str, slice]:
        """The ranges of the wanted logits requested so far."""
        ends = list(accumulate(len(row) for row, _, _ in self._reads.values()))
        return dict(zip(self._reads, map(slice, [0, *ends], ends), strict=True))

    def plan(
        self,
        phases: np.ndarray,
        keep: np.ndarray,
        places: int,
        *,
        queries: Mapping[str, np.ndarray] = MappingProxyType({}),
        tables: Mapping[str, tuple[int, int]] = MappingProxyType({}),
        rows: Mapping[str, np.ndarray] = MappingProxyType({}),
        lists: Mapping[str, tuple[np.ndarray, int]] = MappingProxyType({}),
        known: Mapping[str, Any] = MappingProxyType({}),
        **more: Any,
    ) -> Plan:
        """The plan of what was laid out. ``tables`` names the columns to tell as tables, with the value for queries
        without it and the padding; the rest is as in :class:`Plan`.
        """
        read = {name: group for name, group in self._reads.items() if len(group[0])}
        row, place, query = map(_joined, zip(*read.values(), strict=True)) if read else (_NOTHING,) * 3
        reads = {
            fact: _joined([of.get(name, np.zeros(len(rows), dtype=np.int64)) for name, (rows, _, _) in read.items()])
            for fact, of in self._facts.items()
        }
        return Plan(
            layout=self.layout,
            phases=phases,
            keep=keep,
            groups=self.groups,
            query=query,
            slot=self.slots[row],
            place=place,
            places=places,
            queries={"positions": self.column("position"), **queries},
            tables={name: (self.padded(name, fill, default), fill) for name, (default, fill) in tables.items()},
            reads=reads,
            rows=rows,
            lists=lists,
            known=known,
            **more,
        )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The ``parts`` one after the other."""
    return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else _NOTHING
