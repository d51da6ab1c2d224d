"""The Triton side of :mod:`.row_statistics`: every logit read once, a row by several programs at the same time.

Each program takes a chunk of a row relative to the chunk's own maximum; a second kernel puts the chunks of a row
together (the online softmax of Milakov and Gimelshein, 2018). With weights w = exp(x - maximum): ``mass`` is the sum of
w, ``surprise`` of w (x - maximum), ``squares`` of w².
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 4096
"""Logits of a program: 16 KB, with several loads in flight per warp."""


@triton.jit
def _chunk_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, parts, tokens, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, CHUNK)
    column = chunk * CHUNK + place
    x = tl.load(logits + row * stride + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    highest = tl.max(x, axis=0)
    index = tl.argmax(x, axis=0, tie_break_left=True)
    below = x - tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp(below)
    at = row * CHUNKS + chunk
    step = tl.num_programs(0).to(tl.int64) * CHUNKS
    tl.store(tokens + at, chunk * CHUNK + index)
    tl.store(parts + at, highest)
    tl.store(parts + step + at, tl.sum(weight, axis=0))
    if FULL:
        # A token that is ruled out weighs nothing; 0 times infinity would be no number.
        spread = tl.where(x == float("-inf"), 0.0, weight * below)
        tl.store(parts + 2 * step + at, tl.max(tl.where(place == index, float("-inf"), x), axis=0))
        tl.store(parts + 3 * step + at, tl.sum(spread, axis=0))
        tl.store(parts + 4 * step + at, tl.sum(weight * weight, axis=0))


@triton.jit
def _together(parts, tokens, at, step, inside):  # type: ignore[no-untyped-def]
    """Of a row's chunks: their maxima, tokens and how much each one's weights count; the row's maximum and mass."""
    high = tl.load(parts + at, mask=inside, other=float("-inf"))
    token = tl.load(tokens + at, mask=inside, other=0)
    highest = tl.max(high, axis=0)
    scale = tl.where(high == float("-inf"), 0.0, tl.exp(high - tl.where(highest == float("-inf"), 0.0, highest)))
    return high, token, scale, highest, tl.sum(scale * tl.load(parts + step + at, mask=inside, other=0.0), axis=0)


@triton.jit
def _statistics_kernel(parts, tokens, token_out, numbers, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    inside, at, step = chunk < CHUNKS, row * CHUNKS + chunk, rows * CHUNKS
    high, token, scale, highest, mass = _together(parts, tokens, at, step, inside)
    winner = tl.argmax(high, axis=0, tie_break_left=True)
    second = tl.load(parts + 2 * step + at, mask=inside, other=float("-inf"))
    second = tl.max(tl.where(chunk == winner, second, high), axis=0)
    own = tl.load(parts + step + at, mask=inside, other=0.0)
    surprise = tl.load(parts + 3 * step + at, mask=inside, other=0.0)
    squares = tl.load(parts + 4 * step + at, mask=inside, other=0.0)
    risen = tl.where(scale > 0, high - highest, 0.0)
    surprise = tl.sum(scale * (surprise + risen * own), axis=0)
    squares = tl.sum(scale * scale * squares, axis=0)
    tl.store(token_out + row, tl.sum(tl.where(chunk == winner, token, 0), axis=0).to(tl.int64))
    tl.store(numbers + row, 1 / mass)
    tl.store(numbers + rows + row, tl.exp(second - highest) / mass)
    tl.store(numbers + 2 * rows + row, highest + tl.log(mass))
    tl.store(numbers + 3 * rows + row, tl.log(mass) - surprise / mass)
    tl.store(numbers + 4 * rows + row, squares / (mass * mass))


@triton.jit
def _likeliest_kernel(parts, tokens, token_out, numbers, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    high, token, _, _, mass = _together(parts, tokens, row * CHUNKS + chunk, rows * CHUNKS, chunk < CHUNKS)
    winner = tl.argmax(high, axis=0, tie_break_left=True)
    tl.store(token_out + row, tl.sum(tl.where(chunk == winner, token, 0), axis=0).to(tl.int64))
    tl.store(numbers + row, 1 / mass)


@triton.jit
def _probability_kernel(parts, tokens, logits, stride, wanted, numbers, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    _, _, _, highest, mass = _together(parts, tokens, row * CHUNKS + chunk, rows * CHUNKS, chunk < CHUNKS)
    x = tl.load(logits + row * stride + tl.load(wanted + row)).to(tl.float32)
    tl.store(numbers + row, tl.exp(x - highest) / mass)


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, int]]
"""Logits that lie in rows; numbers and tokens of their chunks; and how many these are."""


def _chunks(logits: torch.Tensor, full: bool) -> Parts:
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    size = min(CHUNK, triton.next_power_of_2(vocabulary))
    chunks = triton.cdiv(vocabulary, size)
    parts = torch.empty(5 if full else 2, rows, chunks, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    _chunk_kernel[(rows, chunks)](
        logits, logits.stride(0), vocabulary, parts, tokens, CHUNK=size, CHUNKS=chunks, FULL=full, num_warps=8
    )
    return logits, parts, tokens, {"CHUNKS": chunks, "BLOCK": triton.next_power_of_2(chunks)}


def statistics_of(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As :func:`.row_statistics.statistics_of`."""
    rows = len(logits)
    token = torch.empty(rows, dtype=torch.long, device=logits.device)
    numbers = torch.empty(5, rows, dtype=torch.float32, device=logits.device)
    if rows:
        _, parts, tokens, sizes = _chunks(logits, full=True)
        _statistics_kernel[(rows,)](parts, tokens, token, numbers, **sizes, num_warps=1)
    return token, *numbers


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`.row_statistics.likeliest`."""
    rows = len(logits)
    token = torch.empty(rows, dtype=torch.long, device=logits.device)
    first = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _, parts, tokens, sizes = _chunks(logits, full=False)
        _likeliest_kernel[(rows,)](parts, tokens, token, first, **sizes, num_warps=1)
    return token, first


def probability_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """As :func:`.row_statistics.probability_of`."""
    rows = len(logits)
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        logits, parts, own, sizes = _chunks(logits, full=False)
        _probability_kernel[(rows,)](
            parts, own, logits, logits.stride(0), tokens.contiguous(), found, **sizes, num_warps=1
        )
    return found
