"""The Triton side of :mod:`.attention`: split over the keys (Flash-Decoding, Dao et al., 2023), softmax on the run.

A tile holds some queries of one row with all query heads of one key head side by side, so every key is read once for
all of them. Splits lie at fixed positions and are merged in order, whether programs of their own computed them or one
after the other; the tile's height follows from the widest row. So what a query gets depends neither on what it is
batched with nor on how long other rows are.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SHORTEST_SPLIT, MOST_SPLITS = 256, 32
"""Keys of a split, unless the cache is so long that there would be more splits."""

ENOUGH = 256
"""Programs that fill a GPU: with so many tiles, one program goes through all splits of its tile."""

ROWS_AT_ONCE = tl.constexpr(32)
HEADS_AT_ONCE = 8
NOTHING = tl.constexpr(-1e30)
"""Score of what is not seen: finite, as a difference of infinities is no number."""


@triton.jit
def _tile_of(tile, widths, rows, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of a tile, if every row has as many as it needs, and its place among that row's."""
    row, begin, sofar = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, rows, ROWS_AT_ONCE):
        r = start + tl.arange(0, ROWS_AT_ONCE)
        tiles = tl.cdiv(tl.load(widths + r, mask=r < rows, other=0).to(tl.int32), QUERIES)
        ends = sofar + tl.cumsum(tiles, axis=0)
        before = (r < rows) & (ends <= tile)
        row += tl.sum(before.to(tl.int32), axis=0)
        begin = tl.maximum(begin, tl.max(tl.where(before, ends, 0), axis=0))
        sofar += tl.sum(tiles, axis=0)
    return row, tile - begin


@triton.jit
def _row_of(query, offsets, widths, rows):  # type: ignore[no-untyped-def]
    """The row of a packed query; as many as there are, if none has it."""
    row = tl.full((), 0, tl.int32) + rows
    for start in range(0, rows, ROWS_AT_ONCE):
        r = start + tl.arange(0, ROWS_AT_ONCE)
        begin = tl.load(offsets + r, mask=r < rows, other=0)
        width = tl.load(widths + r, mask=r < rows, other=0)
        row = tl.minimum(row, tl.min(tl.where((begin <= query) & (query < begin + width), r, rows), axis=0))
    return row


@triton.jit
def _dot(a, b, UP: tl.constexpr):  # type: ignore[no-untyped-def]
    if UP:  # Triton's interpreter has no product of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _one_split(  # type: ignore[no-untyped-def]
    x, keys, values, sight, sees_any, place, begin, last, length, scale, window,
    STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr,
    WINDOWED: tl.constexpr, CAUSAL: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Attention over the keys from ``begin`` to ``last``: weighted values, the highest score, the sum of weights."""
    d = tl.arange(0, DIM)
    high, weight = tl.full([M], NOTHING, tl.float32), tl.zeros([M], tl.float32)
    part = tl.zeros([M, DIM], tl.float32)
    for block in range(begin, last, N):
        column = block + tl.arange(0, N)
        inside = column < last
        here = column[:, None] * STEP + d[None, :]
        k = tl.load(keys + here, mask=inside[:, None], other=0.0)
        score = _dot(x, tl.trans(k), UP) * scale
        fellow = inside & (column >= length)
        friend = tl.load(sight[:, None] + (column - length)[None, :], mask=sees_any[:, None] & fellow[None, :], other=0)
        sees = (inside & (column < length))[None, :] | (friend != 0)
        if CAUSAL:
            sees = sees & (column[None, :] <= place[:, None])
        if WINDOWED:
            sees = sees & (tl.abs(column[None, :] - place[:, None]) < window)
        score = tl.where(sees, score, NOTHING)
        new = tl.maximum(high, tl.max(score, axis=1))
        p = tl.where(sees, tl.exp2(score - new[:, None]), 0.0)
        decay = tl.exp2(high - new)
        weight = weight * decay + tl.sum(p, axis=1)
        v = tl.load(values + here, mask=inside[:, None], other=0.0)
        part = part * decay[:, None] + _dot(p.to(v.dtype), v, UP)
        high = new
    return part, high, weight


@triton.jit
def _joined(total, top, mass, part, high, weight):  # type: ignore[no-untyped-def]
    """What the splits so far and the next one come to together."""
    new = tl.maximum(top, high)
    ours, theirs = tl.exp2(top - new), tl.exp2(high - new)
    return total * ours[:, None] + part * theirs[:, None], new, mass * ours + weight * theirs


@triton.jit(do_not_specialize=["rows", "window", "visible_row", "visible_query"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    queries, keys, values, slots, lengths, offsets, widths, visible, positions, out, parts, stats,
    scale, rows, capacity, window, visible_row, visible_query,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, APART: tl.constexpr, WINDOWED: tl.constexpr, CAUSAL: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // KEY_HEADS
    QUERIES: tl.constexpr = M // GROUPS
    tile, head = tl.program_id(0), tl.program_id(1)
    row, place_of_tile = _tile_of(tile, widths, rows, QUERIES)
    if row >= rows:
        return
    first = place_of_tile * QUERIES
    offset, width = tl.load(offsets + row), tl.load(widths + row).to(tl.int32)
    length = tl.load(lengths + row).to(tl.int32)
    end = length + width
    split, until = 0, tl.cdiv(end, SPLIT)
    if APART:
        split = tl.program_id(2)
        until = tl.minimum(until, split + 1)
    if split >= until:
        return
    m, d = tl.arange(0, M), tl.arange(0, DIM)
    query = first + m // GROUPS
    live = (query < width) & (m < QUERIES * GROUPS)
    # Large distances go into the pointers, one number each; those inside a tile fit in 32 bits.
    start = (offset + first).to(tl.int64) * HEADS + head * GROUPS
    at = m // GROUPS * HEADS + m % GROUPS
    inner = at[:, None] * DIM + d[None, :]
    x = tl.load(queries + start * DIM + inner, mask=live[:, None], other=0.0)
    base = (tl.load(slots + row).to(tl.int64) * capacity * KEY_HEADS + head) * DIM
    sight = visible + row.to(tl.int64) * visible_row + query * visible_query
    place = query * 0
    if WINDOWED | CAUSAL:
        place = tl.load(positions + offset + query, mask=live, other=0).to(tl.int32)
    top, mass = tl.full([M], NOTHING, tl.float32), tl.zeros([M], tl.float32)
    total = tl.zeros([M, DIM], tl.float32)
    for s in range(split, until):
        part, high, weight = _one_split(
            x, keys + base, values + base, sight, live, place, SPLIT * s, tl.minimum(end, SPLIT * (s + 1)), length,
            scale, window, KEY_HEADS * DIM, M, N, DIM, WINDOWED, CAUSAL, UP,
        )  # fmt: skip
        if APART:
            to = start * SPLITS + s
            tl.store(parts + to * DIM + at[:, None] * (SPLITS * DIM) + d[None, :], part, mask=live[:, None])
            tl.store(stats + to * 2 + at * (SPLITS * 2), high, mask=live)
            tl.store(stats + to * 2 + at * (SPLITS * 2) + 1, weight, mask=live)
        else:
            total, top, mass = _joined(total, top, mass, part, high, weight)
    if not APART:
        share = 1 / tl.where(mass > 0, mass, 1.0)  # nothing, where nothing was seen
        tl.store(out + start * DIM + inner, (total * share[:, None]).to(out.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    parts, stats, lengths, offsets, widths, out, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Splits one after the other, in order; those after the row's end hold nothing and are not read."""
    query, head, d = tl.program_id(0), tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE), tl.arange(0, DIM)
    live = head < HEADS
    row = _row_of(query, offsets, widths, rows)
    until = 0
    if row < rows:
        until = tl.cdiv((tl.load(lengths + row) + tl.load(widths + row)).to(tl.int32), SPLIT)
    at = query.to(tl.int64) * HEADS + head
    top, mass = tl.full([AT_ONCE], NOTHING, tl.float32), tl.zeros([AT_ONCE], tl.float32)
    total = tl.zeros([AT_ONCE, DIM], tl.float32)
    for s in range(until):
        high = tl.load(stats + (at * SPLITS + s) * 2, mask=live, other=NOTHING)
        weight = tl.load(stats + (at * SPLITS + s) * 2 + 1, mask=live, other=0.0)
        part = tl.load(parts + (at * SPLITS + s)[:, None] * DIM + d[None, :], mask=live[:, None], other=0.0)
        total, top, mass = _joined(total, top, mass, part, high, weight)
    share = 1 / tl.where(mass > 0, mass, 1.0)  # nothing, where nothing was seen
    tl.store(out + at[:, None] * DIM + d[None, :], (total * share[:, None]).to(out.dtype.element_ty), live[:, None])


def tile_of(groups: int, widest: int, dim: int, itemsize: int) -> dict[str, int]:
    """M, the height of a tile: a row of ``widest`` queries, ``groups`` heads each, where it fits; N, keys at a time, so
    few that registers hold them and small GPUs have room for them; and warps to match.
    """
    height = min(max(16, triton.next_power_of_2(groups * widest)), 64)
    at_once = (64 if height < 64 else 32) // (2 if dim * itemsize > 256 else 1)
    return {"M": height, "N": at_once, "num_warps": 4 if height < 64 else 8, "num_stages": 2}


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    offsets: torch.Tensor,
    widths: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """As :func:`.attention.attend`."""
    (count, heads, dim), (_, capacity, key_heads, _) = queries.shape, keys.shape
    rows, _, widest = visible.shape
    queries, visible = queries.contiguous(), visible if visible.stride(2) == 1 else visible.contiguous()
    tile = tile_of(heads // key_heads, widest, dim, queries.element_size())
    tiles = count // (tile["M"] // (heads // key_heads)) + rows
    split = max(SHORTEST_SPLIT, triton.next_power_of_2(capacity) // MOST_SPLITS)
    splits = triton.cdiv(capacity, split)
    apart = splits > 1 and tiles * key_heads < ENOUGH
    out = torch.empty_like(queries) if apart else torch.zeros_like(queries)
    parts = queries.new_empty((count, heads, splits, dim) if apart else 1, dtype=torch.float32)
    stats = queries.new_empty((count, heads, splits, 2) if apart else 1, dtype=torch.float32)
    _attend_kernel[(tiles, key_heads, splits if apart else 1)](
        queries, keys, values, slots, lengths, offsets, widths, visible.view(torch.uint8),
        lengths if positions is None else positions, out, parts, stats,
        scale * 1.4426950408889634, rows, capacity, window or 0, visible.stride(0), visible.stride(1),
        HEADS=heads, KEY_HEADS=key_heads, DIM=dim, SPLIT=split, SPLITS=splits, APART=apart,
        WINDOWED=window is not None, CAUSAL=causal, UP=INTERPRETED, **tile,
    )  # fmt: skip
    if apart:
        at_once = min(HEADS_AT_ONCE, triton.next_power_of_2(heads))
        _merge_kernel[(count, triton.cdiv(heads, at_once))](
            parts, stats, lengths, offsets, widths, out, rows,
            HEADS=heads, DIM=dim, AT_ONCE=at_once, SPLIT=split, SPLITS=splits,
        )  # fmt: skip
    return out
