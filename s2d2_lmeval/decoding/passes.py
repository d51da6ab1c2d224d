"""Laying out passes: a row's queries as segments, the logits that are read as groups, one transfer to the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch

from s2d2_lmeval.runtime.passes import TARGET, Layout, Pass

Sent = dict[str, torch.Tensor]

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
        self.row, self.local = ragged(self.count)

    @property
    def position(self) -> np.ndarray:
        """(K,) RoPE position."""
        return np.asarray(self.columns["position"])

    def set(self, **columns: np.ndarray | int) -> Segment:
        """Set further columns of the queries: (K,) each, or one value for all."""
        self.columns |= columns
        return self


@dataclass(frozen=True)
class Plan:
    """The next forward of all R active rows and how to read its logits.

    ``reads`` names the groups of wanted logits in order; the table ``(slot, place)`` of each logit is on the
    device (:meth:`at`). ``sent`` is what else the decoder sent to the device, ``known`` what it keeps about the plan
    on the host.
    """

    request: Pass
    phases: np.ndarray
    """(R,) what each row does (:data:`~s2d2_lmeval.decoding.state.KIND_OF_PHASE`)."""
    wanted_counts: np.ndarray
    """(R,) logits that each row reads."""
    reads: Mapping[str, slice]
    sent: Sent
    known: Mapping[str, np.ndarray] = field(default_factory=dict)

    def at(self, first: str, last: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(slots, places) of the logits of a group, or of the groups from ``first`` to ``last``, if present."""
        groups = [self.reads[name] for name in (first, last or first) if name in self.reads] or [slice(0, 0)]
        which = slice(groups[0].start, groups[-1].stop)
        return self.sent["read_slot"][which], self.sent["read_place"][which]

    def count(self, name: str) -> int:
        """The number of logits in a group; 0 without it."""
        group = self.reads.get(name, slice(0, 0))
        return group.stop - group.start


class PassBuilder:
    """Collects the segments of one forward over the rows ``slots`` (R,); a row's segments keep the order of adding."""

    def __init__(self, slots: np.ndarray) -> None:
        self.slots = slots
        self._segments: list[Segment] = []
        self._reads: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

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
        self.layout = Layout(self.slots, np.add.reduce([segment.count for segment in self._segments]))
        first = self.layout.offsets
        for segment in self._segments:
            segment.first, segment.query = first, segment.row
            if len(segment.row):
                segment.query = first[segment.row] + segment.local
                first = first + segment.count
        self._segments = [segment for segment in self._segments if len(segment.row)]
        return self.layout

    def column(self, name: str, default: int = 0) -> np.ndarray:
        """(N,) the segments' values of ``name`` (also ``position``); ``default`` for segments without one."""
        values = np.full(self.layout.queries, default, dtype=np.int64)
        for segment in self._segments:
            if name in segment.columns:
                values[slice(None) if len(self._segments) == 1 else segment.query] = segment.columns[name]
        return values

    def padded(self, name: str, fill: int, default: int = 0) -> np.ndarray:
        """A column spread over a table (R, W); unused places hold ``fill``."""
        return self.layout.padded(self.column(name, default), fill)

    def read(self, name: str, row: np.ndarray, place: np.ndarray, query: np.ndarray) -> None:
        """Request the logits at packed queries (K,), which are about ``place`` (K,) of active rows ``row`` (K,)."""
        self._reads[name] = row, place, query

    def send(self, device: torch.device, **facts: np.ndarray) -> Sent:
        """Send positions, reads and ``facts`` to the device in one transfer."""
        groups = [group for group in self._reads.values() if len(group[0])] or [(_NOTHING,) * 3]
        rows, places, queries = map(np.concatenate, zip(*groups, strict=True))
        self._read_rows = rows
        return upload(
            device,
            positions=self.column("position"),
            read=queries,
            read_slot=self.slots[rows],
            read_place=places,
            **facts,
        )

    def plan(
        self,
        sent: Sent,
        phases: np.ndarray,
        tokens: torch.Tensor,
        visible: torch.Tensor,
        keep: np.ndarray,
        model: str = TARGET,
        feeds_drafter: bool = False,
        **known: np.ndarray,
    ) -> Plan:
        """The plan of what was laid out and ``sent``; arguments as in :class:`~s2d2_lmeval.runtime.passes.Pass`."""
        ends = list(accumulate(len(row) for row, _, _ in self._reads.values()))
        return Plan(
            request=Pass(
                self.layout, tokens, sent["positions"], visible, sent["read"], keep, model, feeds_drafter=feeds_drafter
            ),
            phases=phases,
            wanted_counts=np.bincount(self._read_rows, minlength=len(self.slots)),
            reads=dict(zip(self._reads, map(slice, [0, *ends], ends), strict=True)),
            sent=sent,
            known=known,
        )


def ragged(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the index within it of each of ``count`` (R,) things per row, row-major."""
    if not count.any():
        return _NOTHING, _NOTHING
    row = np.repeat(np.arange(len(count)), count)
    return row, np.arange(len(row)) - (count.cumsum() - count)[row]


def upload(device: torch.device, **arrays: np.ndarray) -> Sent:
    """``arrays`` as int64 tensors on ``device``, shapes kept, in one transfer."""
    parts = {name: np.asarray(values, dtype=np.int64) for name, values in arrays.items()}
    flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts.values()]))
    pieces = flat.to(device, non_blocking=True).split([part.size for part in parts.values()])
    shaped = [
        piece if part.ndim == 1 else piece.view(part.shape) for part, piece in zip(parts.values(), pieces, strict=True)
    ]
    return dict(zip(parts, shaped, strict=True))
