"""The smallest kernel: tells whether Triton can compile and run at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _count_kernel(out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, BLOCK)
    tl.store(out + place, place)


def counted(device: torch.device) -> torch.Tensor:
    """0 to 15, written by a kernel on ``device``."""
    out = torch.empty(16, dtype=torch.int32, device=device)
    _count_kernel[(1,)](out, BLOCK=16)
    return out
