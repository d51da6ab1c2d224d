"""The kernel behind :mod:`.row_statistics`: one program per row, every logit read once.

The running maximum m rescales the sums as it rises (the online softmax of Milakov and Gimelshein, 2018). With weights
w = exp(x - m): ``mass`` is the sum of w, ``surprise`` of w (x - m), ``squares`` of w².
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Logits that a program loads at a time: 16 KB, with several loads in flight per warp."""


@triton.jit
def _row_kernel(logits, stride, vocabulary, tokens, numbers, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * stride
    place = tl.arange(0, BLOCK)
    highest = tl.full((), float("-inf"), tl.float32)
    second = tl.full((), float("-inf"), tl.float32)
    token = tl.zeros((), tl.int64)
    mass = tl.zeros((), tl.float32)
    surprise = tl.zeros((), tl.float32)
    squares = tl.zeros((), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + place < vocabulary
        x = tl.load(begin + start + place, mask=inside, other=float("-inf")).to(tl.float32)
        here = tl.max(x, axis=0)
        index = tl.argmax(x, axis=0, tie_break_left=True)
        runner_up = tl.max(tl.where(place == index, float("-inf"), x), axis=0)
        # The lower of the two largest may be second, and so may each one's own second.
        second = tl.maximum(tl.minimum(highest, here), tl.maximum(second, runner_up))
        token = tl.where(here > highest, start + index, token)
        new = tl.maximum(highest, here)
        base = tl.where(new == float("-inf"), 0.0, new)
        risen = tl.where(highest == float("-inf"), 0.0, highest - base)
        scale = tl.where(highest == float("-inf"), 0.0, tl.exp(risen))
        below = x - base
        weight = tl.exp(below)
        # A token that is ruled out weighs nothing; 0 times infinity would be no number.
        spread = tl.where(x == float("-inf"), 0.0, weight * below)
        surprise = scale * (surprise + risen * mass) + tl.sum(spread, axis=0)
        mass = scale * mass + tl.sum(weight, axis=0)
        squares = scale * scale * squares + tl.sum(weight * weight, axis=0)
        highest = new
    tl.store(tokens + row, token)
    tl.store(numbers + row, 1 / mass)
    tl.store(numbers + rows + row, tl.exp(second - highest) / mass)
    tl.store(numbers + 2 * rows + row, highest + tl.log(mass))
    tl.store(numbers + 3 * rows + row, tl.log(mass) - surprise / mass)
    tl.store(numbers + 4 * rows + row, squares / (mass * mass))


def in_triton(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Argmax (M,), then first and second probability, normaliser, entropy and collision (M,), of ``logits`` (M, V)."""
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.long, device=logits.device)
    numbers = torch.empty(5, rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(vocabulary))
        _row_kernel[(rows,)](logits, logits.stride(0), vocabulary, tokens, numbers, rows, BLOCK=block, num_warps=8)
    return tokens, *numbers
