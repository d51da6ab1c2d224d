"""The shape of a forward: what its buffers depend on, and so does a graph that is captured of it.

Eager forwards have the exact shape of what they run. Captured ones are padded to a *bucket*, one of a few shapes, so
that a graph is used again: queries are packed, and padding is counted in queries, not in rows times the widest. In a
bucket row i is slot i. Padding writes to the cache's scratch slot; nobody sees it.

With ``exact`` every forward has one shape. Products of other shapes add up in another order, which in half precision is
another number; in one shape a query's arithmetic depends on nothing but what it sees. A pass is cut between rows into
forwards of equally many queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.passes import Layout

MOST_QUERIES = 8192
"""Queries of the widest bucket; a wider forward computes long enough to hide its launches."""

MOST_PADDED = 65536
"""Rows times queries of the widest row, up to which attention is padded in a bucket."""

FEW_QUERIES = 256
"""Queries up to which a bucket has only two numbers of wanted logits: what else is read of the head is padding."""

SHORTEST_SPAN = 256
"""A bucket reads at least so many cache positions; beyond, powers of two."""


@dataclass(frozen=True)
class Shape:
    """``queries`` packed, ``rows`` of up to ``widest`` queries, ``span`` cache positions, ``wanted`` logits. ``padded``
    says that it is a bucket; with ``part`` it is run in forwards of so many queries, and products with the head of so
    many logits.
    """

    queries: int
    rows: int
    widest: int
    span: int
    wanted: int
    padded: bool = False
    part: int = 0

    @classmethod
    def tight(cls, layout: Layout, wanted: int, cache: SlotCache, grain: int = 1) -> Shape:
        """The shape of what runs; the span is a multiple of ``grain``."""
        reached = int((cache.lengths[layout.slots] + layout.widths).max())
        span = min(-(-reached // grain) * grain, cache.capacity)
        return cls(layout.queries, len(layout.slots), layout.widest, span, wanted)

    @classmethod
    def bucket(cls, layout: Layout, wanted: int, cache: SlotCache, slots: int, reads_span: bool = True) -> Shape | None:
        """The smallest bucket of at most ``slots`` rows that holds it; None where it would be too wide. Attention that
        goes as far as each row does, and does not read the same span of all (``reads_span``), has one for any length.
        """
        queries, rows = rung(layout.queries), min(power(int(layout.slots.max()) + 1), slots)
        widest = queries if rows == 1 else power(layout.widest)
        if queries > MOST_QUERIES or rows * widest > MOST_PADDED:
            return None
        reached = int((cache.lengths[layout.slots] + layout.widths).max()) if reads_span else cache.capacity
        span = max(power(reached), SHORTEST_SPAN)
        return cls(queries, rows, widest, min(span, cache.capacity), _wanted_of(queries, wanted), padded=True)

    @classmethod
    def in_parts(cls, layout: Layout, wanted: int, cache: SlotCache, slots: int, part: int) -> Shape:
        """The shape of forwards of exactly ``part`` queries.

        Raises:
            ConfigError: a row brings more than that.
        """
        if layout.widest > part:
            raise ConfigError(
                f"exact runs forwards of {part} queries, and a row brings {layout.widest}: give exact={layout.widest} "
                "or more (the same to every run that is compared), or lower block_length, row_budget or tree_budget."
            )
        forwards = int(_part_of(layout.widths, part)[-1]) + 1
        heads = -(-wanted // part)
        return cls(forwards * part, slots, part, cache.capacity, heads * part, padded=True, part=part)


def _part_of(widths: np.ndarray, part: int) -> np.ndarray:
    """(R,) the forward of ``part`` queries in which each row runs: as many rows as fit, in order."""
    found, number, used = np.zeros_like(widths), 0, 0
    for row, width in enumerate(widths.tolist()):
        if used + width > part:
            number, used = number + 1, 0
        found[row], used = number, used + width
    return found


def power(least: int) -> int:
    """The smallest power of two that is at least ``least``."""
    return 1 << max(least - 1, 0).bit_length()


def rung(least: int) -> int:
    """The smallest power of two, or three quarters of one, that is at least ``least``; 0 of 0."""
    whole = power(least) if least else 0
    return whole * 3 // 4 if whole >= 8 and least <= whole * 3 // 4 else whole


def _wanted_of(queries: int, wanted: int) -> int:
    """Logits of a bucket of ``queries``: all of them or the first half, so that their number makes few buckets more. Of
    a wide pass, mostly prompts, fewer.
    """
    if not wanted or queries > FEW_QUERIES or wanted > queries:
        return power(wanted) if wanted else 0
    return queries // 2 if wanted <= queries // 2 else queries


class Frame:
    """Where the parts of a pass over ``layout`` lie in buffers of ``shape``."""

    def __init__(self, layout: Layout, shape: Shape) -> None:
        self.layout, self.shape = layout, shape
        self.row_at = layout.slots if shape.padded else np.arange(len(layout.slots))
        """(rows in flight,) row of each in the buffers."""
        self.at = np.arange(layout.queries)
        """(N,) place of each query in the buffers."""
        self.part_of = np.zeros_like(layout.widths)
        """(rows in flight,) the forward in which each row runs."""
        self.prefix: int | None = None
        """Length of the prefix of the only row, where that is no part of a bucket."""
        if shape.part:
            self.part_of = _part_of(layout.widths, shape.part)
            first = np.flatnonzero(np.diff(self.part_of, prepend=-1))
            self.at += (self.part_of * shape.part - layout.offsets[first][self.part_of])[layout.row_of]

    def queries(self, values: np.ndarray, fill: int = 0) -> np.ndarray:
        """``values`` (N,) of the packed queries, with padding."""
        if not self.shape.part:
            return _extended(values, self.shape.queries, fill)
        places = np.full(self.shape.queries, fill, dtype=np.int64)
        places[self.at] = values
        return places

    def table(self, values: np.ndarray, fill: int) -> np.ndarray:
        """A table (R, W) from ``values`` (rows in flight, W or less)."""
        if not self.shape.padded:
            return values
        table = np.full((self.shape.rows, self.shape.widest), fill, dtype=np.int64)
        table[self.row_at, : values.shape[1]] = values
        return table

    def wanted(self, values: np.ndarray, fill: int = 0) -> np.ndarray:
        """``values`` (..., M) of the wanted logits, with padding."""
        return _extended(values, self.shape.wanted, fill)

    def attention(self, cache: SlotCache) -> dict[str, np.ndarray]:
        """What attention and cache need to know (:class:`~s2d2_lmeval.runtime.attention.AttentionContext`): prefix
        ``lengths``, ``slots``, ``offsets`` and ``widths`` (R,); ``destinations`` (N,); ``packed`` (N,), the place of
        every query in a table (R, W); and ``spread`` (R * W,), the query at every place, where rows are ragged.
        """
        layout, shape = self.layout, self.shape
        of_rows = np.zeros((4, shape.rows), dtype=np.int64)
        if shape.padded:
            of_rows[1] = np.arange(shape.rows)
        lengths = cache.lengths[layout.slots]
        of_rows[:, self.row_at] = lengths, layout.slots, layout.offsets, layout.widths
        if len(lengths) == 1 and not shape.padded:
            self.prefix = int(lengths[0])
        table = self.row_at[layout.row_of] * shape.widest + layout.local
        arrays = dict(zip(("lengths", "slots", "offsets", "widths"), of_rows, strict=True))
        arrays["destinations"] = self.queries(cache.destinations(layout), cache.scratch)
        arrays["packed"] = self.queries(table)
        if shape.part:
            arrays |= self._of_parts(table)
        elif self.ragged:
            arrays["spread"] = np.zeros(shape.rows * shape.widest, dtype=np.int64)
            arrays["spread"][table] = np.arange(layout.queries)
        elif shape.padded:
            arrays["packed"] = np.arange(shape.queries)
        return arrays

    def _of_parts(self, table: np.ndarray) -> dict[str, np.ndarray]:
        """``offsets``, ``widths`` and ``spread`` of each forward, counted within it; ``table`` (N,) is every query's
        place in a table (R, W).
        """
        layout, shape = self.layout, self.shape
        parts = shape.queries // shape.part
        spread = np.zeros((parts, shape.rows * shape.widest), dtype=np.int64)
        spread[self.at // shape.part, table] = self.at % shape.part
        offsets, widths = np.zeros((2, parts, shape.rows), dtype=np.int64)
        offsets[self.part_of, self.row_at] = self.at[layout.offsets] % shape.part
        widths[self.part_of, self.row_at] = layout.widths
        return {"offsets": offsets, "widths": widths, "spread": spread}

    def parts(self, told: Mapping[str, torch.Tensor]) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        """The queries of every forward, and what attention is to be told of them."""
        size = self.shape.part
        for number in range(self.shape.queries // size):
            queries = slice(number * size, (number + 1) * size)
            one = {name: told[name][number] for name in ("offsets", "widths", "spread")}
            of_queries = [name for name in ("destinations", "packed", "gated") if name in told]
            yield queries, {**told, **one, **{name: told[name][queries] for name in of_queries}}

    @property
    def ragged(self) -> bool:
        """Whether packed queries are not simply a table (R, W) row by row."""
        shape = self.shape
        return bool(shape.part) or shape.queries != shape.rows * shape.widest or (shape.padded and shape.rows > 1)

    @property
    def in_order(self) -> bool:
        """Whether row i is slot i."""
        return self.shape.padded or bool((self.layout.slots == self.row_at).all())


def _extended(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """``values`` (..., n) extended to ``length`` by ``fill``."""
    short = length - values.shape[-1]
    if not short:
        return values
    return np.concatenate([values, np.full((*values.shape[:-1], short), fill, dtype=np.int64)], axis=-1)
