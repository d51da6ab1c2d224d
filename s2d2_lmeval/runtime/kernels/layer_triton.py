"""The Triton side of :mod:`.layer`. Sums are taken in float32; what modules round in between is rounded here too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 1024
"""Of a row of activations, for one program."""


@triton.jit
def _times(a, b):  # type: ignore[no-untyped-def]
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)


@triton.jit
def _plus(a, b, sign):  # type: ignore[no-untyped-def]
    return (a.to(tl.float32) + sign * b.to(tl.float32)).to(a.dtype)


@triton.jit
def _add_norm_kernel(stream, added, weight, total, normed, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(stream + row * SIZE + column, mask=inside, other=0.0)
    if ADDS:
        x = _plus(x, tl.load(added + row * SIZE + column, mask=inside, other=0.0), 1)
    tl.store(total + row * SIZE + column, x, mask=inside)
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(normed + row * SIZE + column, _times(scale, wide.to(scale.dtype)), mask=inside)


def add_norm(
    stream: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`.layer.add_norm`."""
    stream = stream.contiguous()
    total, normed = torch.empty_like(stream), torch.empty_like(stream)
    count, size = stream.shape
    _add_norm_kernel[(count,)](
        stream, stream if added is None else added.contiguous(), weight, total, normed, eps,
        SIZE=size, BLOCK=triton.next_power_of_2(size), ADDS=added is not None, num_warps=8 if size > 2048 else 4,
    )  # fmt: skip
    return total, normed


@triton.jit
def _rope_write_kernel(  # type: ignore[no-untyped-def]
    projected, query_norm, key_norm, eps, cos, sin, destinations, keys, values, queries,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """One head of one token: first the queries' heads, then the keys', then the values'."""
    DIM: tl.constexpr = 2 * HALF
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, BLOCK)
    inside = half < HALF
    begin = projected + (token * (HEADS + 2 * KEY_HEADS) + head) * DIM
    a = tl.load(begin + half, mask=inside, other=0.0)
    b = tl.load(begin + HALF + half, mask=inside, other=0.0)
    to = tl.load(destinations + token) * KEY_HEADS
    if head >= HEADS + KEY_HEADS:
        place = values + (to + head - HEADS - KEY_HEADS) * DIM
    else:
        if NORMS:
            weight = query_norm
            if head >= HEADS:
                weight = key_norm
            wide, wider = a.to(tl.float32), b.to(tl.float32)
            scale = tl.rsqrt((tl.sum(wide * wide, axis=0) + tl.sum(wider * wider, axis=0)) / DIM + eps)
            a = _times(tl.load(weight + half, mask=inside, other=0.0), (wide * scale).to(a.dtype))
            b = _times(tl.load(weight + HALF + half, mask=inside, other=0.0), (wider * scale).to(b.dtype))
        # Both halves of the tables are the same.
        c = tl.load(cos + token * DIM + half, mask=inside, other=0.0)
        s = tl.load(sin + token * DIM + half, mask=inside, other=0.0)
        rotated = _plus(_times(a, c), _times(b, s), -1)
        b = _plus(_times(b, c), _times(a, s), 1)
        a = rotated
        place = queries + (token * HEADS + head) * DIM
        if head >= HEADS:
            place = keys + (to + head - HEADS) * DIM
    tl.store(place + half, a, mask=inside)
    tl.store(place + HALF + half, b, mask=inside)


def rope_write(
    projected: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destinations: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """As :func:`.layer.rope_write`."""
    (count, width), (key_heads, dim) = projected.shape, keys.shape[2:]
    heads = width // dim - 2 * key_heads
    queries = projected.new_empty(count, heads, dim)
    none = projected
    _rope_write_kernel[(count, heads + 2 * key_heads)](
        projected.contiguous(), none if query_norm is None else query_norm, none if key_norm is None else key_norm, eps,
        cos.contiguous(), sin.contiguous(), destinations, keys, values, queries,
        HEADS=heads, KEY_HEADS=key_heads, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2),
        NORMS=query_norm is not None, num_warps=1,
    )  # fmt: skip
    return queries


@triton.jit
def _silu_mul_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + column, mask=inside, other=0.0)
    tl.store(out + row * SIZE + column, _times((gate * tl.sigmoid(gate)).to(up.dtype), up), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As :func:`.layer.silu_mul`."""
    count, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(count, size)
    _silu_mul_kernel[(count, triton.cdiv(size, COLUMNS))](gate_up.contiguous(), out, SIZE=size, BLOCK=COLUMNS)
    return out
