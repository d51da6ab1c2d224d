"""The Triton side of :mod:`.random`: hash, noise and arg-max in one pass over a row by several programs.

Integers wrap as in torch and numpy, so uniform numbers are the same bit for bit; noise differs by rounding of its
logarithm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from s2d2_lmeval.decoding.sampling.hashing import GOLDEN, MULTIPLIERS, of_purpose, of_seed

CHUNK = 2048
"""Tokens of a program."""

_GOLDEN = tl.constexpr(GOLDEN)
_FIRST = tl.constexpr(MULTIPLIERS[0])
_SECOND = tl.constexpr(MULTIPLIERS[1])


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _hash(words, count, at, seed, purpose):  # type: ignore[no-untyped-def]
    """The bits of the draws ``at`` of ``count``."""
    state = _mix((tl.load(words + at) + 1) * _GOLDEN + seed)
    state = _mix((tl.load(words + count + at) + 1) * _GOLDEN + state)
    state = _mix((tl.load(words + 2 * count + at) + 1) * _GOLDEN + state)
    return _mix(state ^ purpose)


@triton.jit
def _arrival(bits):  # type: ignore[no-untyped-def]
    """-log(1 - u) for u in (0, 1) from the upper 32 ``bits``: by a series where u is small, as it is of the first."""
    u = (((bits >> 32) & 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    s = u / (2 - u)
    q = s * s
    near = 2 * s * (1 + q * (0.3333333333333333 + q * (0.2 + q * (0.14285714285714285 + q * 0.1111111111111111))))
    return tl.where(u < 0.25, near, -tl.log(1 - u))


@triton.jit
def _uniform_kernel(words, out, count, seed, purpose, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    bits = _hash(words, count, tl.where(inside, at, 0), seed, purpose)
    tl.store(out + at, ((bits >> 40) & 0xFFFFFF).to(tl.float32) * 5.960464477539063e-08, mask=inside)


@triton.jit
def _gumbel_kernel(words, out, vocabulary, seed, purpose, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    bits = _hash(words, tl.num_programs(0), row, seed, purpose)
    noise = -tl.log(_arrival(_mix(bits + (column + 1).to(tl.int64) * _GOLDEN)))
    tl.store(out + row.to(tl.int64) * vocabulary + column, noise.to(out.dtype.element_ty), mask=column < vocabulary)


@triton.jit
def _race_kernel(  # type: ignore[no-untyped-def]
    values, stride, vocabulary, temperature, words, parts, tokens, seed, purpose,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """Of a chunk of a row: who wins, by how much, and, from logits, the maximum and the mass relative to it."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, CHUNK)
    column = chunk * CHUNK + place
    inside = column < vocabulary
    at, step = row * CHUNKS + chunk, tl.num_programs(0).to(tl.int64) * CHUNKS
    weight = tl.load(values + row * stride + column, mask=inside, other=float("-inf") if LOGITS else 0.0).to(tl.float32)
    if LOGITS:
        weight = weight / temperature
        highest = tl.max(weight, axis=0)
        weight = tl.exp(weight - tl.where(highest == float("-inf"), 0.0, highest))
        tl.store(parts + step + at, highest)
        tl.store(parts + 2 * step + at, tl.sum(weight, axis=0))
    bits = _hash(words, tl.num_programs(0), row, seed, purpose)
    speed = weight / _arrival(_mix(bits + (column + 1).to(tl.int64) * _GOLDEN))
    speed = tl.where(inside, speed, -1.0)
    tl.store(parts + at, tl.max(speed, axis=0))
    tl.store(tokens + at, chunk * CHUNK + tl.argmax(speed, axis=0, tie_break_left=True))


@triton.jit
def _finish_kernel(  # type: ignore[no-untyped-def]
    values, stride, temperature, parts, tokens, token_out, p_out, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
    LOGITS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at, step = chunk < CHUNKS, row * CHUNKS + chunk, tl.num_programs(0).to(tl.int64) * CHUNKS
    speed = tl.load(parts + at, mask=inside, other=-1.0)
    token = tl.load(tokens + at, mask=inside, other=0)
    highest, mass = 0.0, 1.0
    if LOGITS:
        high = tl.load(parts + step + at, mask=inside, other=float("-inf"))
        highest = tl.max(high, axis=0)
        scale = tl.where(high == float("-inf"), 0.0, tl.exp(high - highest))
        speed = speed * scale
        mass = tl.sum(scale * tl.load(parts + 2 * step + at, mask=inside, other=0.0), axis=0)
    speed = tl.where(inside, speed, -2.0)
    winner = tl.argmax(speed, axis=0, tie_break_left=True)
    token = tl.sum(tl.where(chunk == winner, token, 0), axis=0).to(tl.int64)
    tl.store(token_out + row, token)
    if LOGITS:
        x = tl.load(values + row * stride + token).to(tl.float32) / temperature
        tl.store(p_out + row, tl.exp(x - highest) / mass)


def _words(words: tuple[torch.Tensor, ...], rows: int | None = None) -> torch.Tensor:
    """The words of all draws side by side, (3, ...)."""
    shape = torch.broadcast_shapes(*(word.shape for word in words)) if rows is None else (rows,)
    return torch.stack([word.expand(shape) for word in words])


def keyed_uniform(
    request: torch.Tensor, position: torch.Tensor, draw: torch.Tensor, seed: int, purpose: int
) -> torch.Tensor:
    """As :func:`.random.keyed_uniform`."""
    words = _words((request, position, draw))
    out = torch.empty(words.shape[1:], dtype=torch.float32, device=words.device)
    if out.numel():
        keys = {"seed": of_seed(seed), "purpose": of_purpose(purpose)}
        _uniform_kernel[(triton.cdiv(out.numel(), 128),)](words, out, out.numel(), **keys, BLOCK=128)
    return out


def keyed_gumbel(
    like: torch.Tensor, request: torch.Tensor, position: torch.Tensor, draw: torch.Tensor, seed: int, purpose: int
) -> torch.Tensor:
    """As :func:`.random.keyed_gumbel`."""
    rows, vocabulary = like.shape
    words = _words((request, position, draw), rows)
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if rows:
        keys = {"seed": of_seed(seed), "purpose": of_purpose(purpose)}
        size = min(CHUNK, triton.next_power_of_2(vocabulary))
        _gumbel_kernel[(rows, triton.cdiv(vocabulary, size))](words, out, vocabulary, **keys, CHUNK=size)
    return out


def keyed_categorical(
    probabilities: torch.Tensor,
    request: torch.Tensor,
    position: torch.Tensor,
    draw: torch.Tensor,
    seed: int,
    purpose: int,
) -> torch.Tensor:
    """As :func:`.random.keyed_categorical`."""
    return _raced(probabilities, None, (request, position, draw), seed, purpose)[0]


def keyed_draw(
    logits: torch.Tensor,
    temperature: float,
    request: torch.Tensor,
    position: torch.Tensor,
    draw: torch.Tensor,
    seed: int,
    purpose: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`.random.keyed_draw`."""
    return _raced(logits, temperature, (request, position, draw), seed, purpose)


def _raced(
    values: torch.Tensor, temperature: float | None, words: tuple[torch.Tensor, ...], seed: int, purpose: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The winning tokens (M,) of ``values`` (M, V): probabilities, or logits if there is a ``temperature``; then also
    their probabilities (M,).
    """
    rows, vocabulary = values.shape
    values = values if values.stride(1) == 1 else values.contiguous()
    table = _words(words, rows)
    of_logits, heat = temperature is not None, 1.0 if temperature is None else float(temperature)
    size = min(CHUNK, triton.next_power_of_2(vocabulary))
    chunks = triton.cdiv(vocabulary, size)
    parts = torch.empty(3 if of_logits else 1, rows, chunks, dtype=torch.float32, device=values.device)
    tokens = torch.empty(rows, chunks, dtype=torch.int32, device=values.device)
    token = torch.empty(rows, dtype=torch.long, device=values.device)
    p = torch.empty(rows, dtype=torch.float32, device=values.device)
    if rows:
        keys = {"seed": of_seed(seed), "purpose": of_purpose(purpose), "CHUNKS": chunks, "LOGITS": of_logits}
        _race_kernel[(rows, chunks)](
            values, values.stride(0), vocabulary, heat, table, parts, tokens, **keys, CHUNK=size
        )
        _finish_kernel[(rows,)](
            values, values.stride(0), heat, parts, tokens, token, p,
            CHUNKS=chunks, BLOCK=triton.next_power_of_2(chunks), LOGITS=of_logits, num_warps=1,
        )  # fmt: skip
    return token, p
