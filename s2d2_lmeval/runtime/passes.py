"""The pass: a decoder's request for one forward of the model.

Each row of the batch has some query tokens. Every query sees the row's whole committed prefix, and the row's other
queries according to :attr:`Pass.visible`; logits are returned for some of the queries; afterwards the leading
:attr:`Pass.keep` queries become prefix.

Queries of all rows are packed one after the other (no padding), so a prefill chunk, a draft and a verifier of different
widths share one forward and cost what their tokens cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

TARGET, DRAFTER = "target", "drafter"

REMEMBERED = 512
"""Things of all rows up to which :func:`ragged` remembers: steps that decode lay out the same few counts again."""


def ragged(count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row and the index within it of each of ``count`` (R,) things per row, row-major, and the first of each row.
    Not to be written to.
    """
    if count.sum() <= REMEMBERED:
        return _remembered(count.astype(np.int64, copy=False).tobytes())
    return _ragged(count)


@lru_cache(maxsize=1024)
def _remembered(count: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _ragged(np.frombuffer(count, dtype=np.int64))


def _ragged(count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, row = count.cumsum() - count, np.arange(len(count)).repeat(count)
    return row, np.arange(len(row)) - first[row], first


@dataclass(frozen=True)
class Layout:
    """Where each row's queries lie in the packed sequence of one forward. All of it is known on the host.

    ``slots`` (R,) cache slot of each row; ``widths`` (R,) number of queries of each row (positive).
    """

    slots: np.ndarray
    widths: np.ndarray
    offsets: np.ndarray = field(init=False)
    """(R,) index of each row's first query."""
    row_of: np.ndarray = field(init=False)
    """(N,) row of each query, as an index into ``slots``."""
    local: np.ndarray = field(init=False)
    """(N,) index of each query inside its row."""
    widest: int = field(init=False)
    """W, the number of queries of the widest row."""

    def __post_init__(self) -> None:
        row_of, local, offsets = ragged(self.widths)
        self.__dict__.update(offsets=offsets, row_of=row_of, local=local, widest=int(self.widths.max()))

    @property
    def queries(self) -> int:
        """N, the number of queries of the forward."""
        return len(self.row_of)

    def padded(self, values: np.ndarray, fill: int) -> np.ndarray:
        """Spread packed ``values`` (N,) over a table (R, W); unused places hold ``fill``."""
        if self.queries == len(self.slots) * self.widest:
            return values.reshape(-1, self.widest)
        table = np.full((len(self.slots), self.widest), fill, dtype=np.int64)
        table[self.row_of, self.local] = values
        return table


@dataclass(frozen=True)
class Pass:
    """One forward over R rows with N packed queries, W in the widest row. Tensors lie on the model's device."""

    layout: Layout
    tokens: torch.Tensor
    """(N,) token ids."""
    positions: torch.Tensor
    """(N,) RoPE positions; verifier copies and tree siblings repeat positions."""
    visible: torch.Tensor
    """(R, W, W) bool: ``visible[r, i, j]`` when query i of row r sees query j of the same row."""
    wanted: torch.Tensor
    """(M,) packed indices of the queries whose logits are read, in the order in which they are wanted."""
    keep: np.ndarray
    """(R,) number of leading queries of each row that become prefix after this forward."""
    model: str = TARGET
    """Which model answers: the :data:`TARGET`, or the :data:`DRAFTER` loaded beside it."""
    feeds_drafter: bool = False
    """Whether the drafter is to read what becomes prefix by this pass."""
