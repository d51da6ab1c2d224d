"""Attention of packed queries over their row's prefix and over each other, a length per row, without a dense mask."""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch.nn.functional import pad

from s2d2_lmeval.errors import first_line
from s2d2_lmeval.runtime.graphs import numbers
from s2d2_lmeval.runtime.kernels.dispatch import kernel, runs_triton

logger = logging.getLogger("s2d2_lmeval")

Heads = tuple[int, int, int]
"""Query heads, key-value heads, and their dimension."""

DIMS = (16, 32, 64, 128, 256)
"""Head dimensions that the Triton implementation takes."""

MOST_GROUPS = 64
"""Query heads per key head that it takes: they share a tile."""


def _triton() -> ModuleType:
    from s2d2_lmeval.runtime.kernels import attention_triton

    return attention_triton


@kernel(_triton, launches=2)
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
    """Attention of R rows, (N, heads, dim) as the packed ``queries``; zeros for queries of no row.

    Args:
        keys: the cache's storage (slots, capacity, key-value heads, dim), as ``values``; fellow queries' are in it.
        slots: (R,) cache slot of each row.
        lengths: (R,) prefix length of each row: what all its queries see, but for ``window`` and ``causal``.
        offsets: (R,) first query of each row, in any order.
        widths: (R,) queries of each row, which may be none; at most W.
        visible: (R, W, W) bool, which fellow each query sees.
        positions: (N,) place of each query in its slot; for the two arguments below.
        window: queries see less than so many positions to either side.
        causal: queries see no position after their own.
    """
    row, local, inside = _owners(offsets, widths, len(queries))
    widest = visible.shape[1]
    spread = (offsets.unsqueeze(1) + numbers(widest, offsets.device)).clamp_max(len(queries) - 1)
    padded = queries[spread].unflatten(2, (keys.shape[2], -1))
    fellow = numbers(widest, widths.device) < widths.unsqueeze(1)
    mask = prefix_mask(visible & fellow.unsqueeze(1), lengths, keys.shape[1])
    if positions is not None:
        mask = mask & within(positions[spread], keys.shape[1], window, causal)
    exact = torch.promote_types(queries.dtype, torch.float32)
    scores = torch.einsum("rwhgd,rchd->rhgwc", padded.to(exact), keys[slots].to(exact)) * scale
    weights = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num(0.0)
    out = torch.einsum("rhgwc,rchd->rwhgd", weights, values[slots].to(exact)).flatten(2, 3)
    return out[row, local.clamp(0, widest - 1)].mul(inside.view(-1, 1, 1)).to(queries.dtype)


def _owners(offsets: torch.Tensor, widths: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each of ``count`` packed queries its row, its index inside that, and whether it belongs to it."""
    query = numbers(count, offsets.device).unsqueeze(1)
    has = (offsets <= query) & (query < offsets + widths)
    row = has.long().argmax(1)
    return row, query.squeeze(1) - offsets[row], has.any(1)


def prefix_mask(visible: torch.Tensor, lengths: torch.Tensor, span: int, prefix: int | None = None) -> torch.Tensor:
    """Who sees which of the first ``span`` positions of its slot, (R, 1, W, span): the prefix, then the queries just
    written as ``visible`` (R, W, W) says, then nothing. ``prefix`` is the length of all rows, if it is known.
    """
    rows, widest = visible.shape[:2]
    if prefix is not None:
        mask = pad(visible, (prefix, 0), value=True)
        beyond = span - mask.shape[2]
        return (mask if not beyond else pad(mask, (0, beyond)) if beyond > 0 else mask[:, :, :span]).unsqueeze(1)
    # One column before the fellows stands for the prefix, one after them for what nobody sees.
    table = pad(pad(visible, (1, 0), value=True), (0, 1))
    column = (numbers(span + 1, visible.device)[1:] - lengths.unsqueeze(1)).clamp(0, widest + 1)
    return table.gather(2, column.unsqueeze(1).expand(rows, widest, span)).unsqueeze(1)


def within(positions: torch.Tensor, span: int, window: int | None, causal: bool) -> torch.Tensor:
    """Which of the first ``span`` positions of its slot each query may see, (R, 1, W, span): those less than ``window``
    away from its own in ``positions`` (R, W), and if ``causal`` none ahead.
    """
    query = positions.view(len(positions), 1, -1, 1)
    key = numbers(span, positions.device)
    seen = key <= query if causal else torch.ones_like(key <= query)
    return seen if window is None else seen & ((query - key).abs() < window)


def attends(heads: Heads, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`attend` is fit for use: on CUDA, whether Triton computes what torch does with such heads."""
    if device.type != "cuda":
        return True
    queries, keys, dim = heads
    fits = dim in DIMS and queries % keys == 0 and queries // keys <= MOST_GROUPS
    return (
        fits
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and runs_triton(device)
        and _agrees(heads, device, dtype)
    )


def _agrees(heads: Heads, device: torch.device, dtype: torch.dtype) -> bool:
    """Compares both sides on a narrow and a wide pass over a row of 300 positions; a GPU may be too small, or too old
    for a type.
    """
    queries, keys, dim = heads
    generator = torch.Generator().manual_seed(0)
    try:
        for width in (1, 64):
            numbers = [
                torch.randn(shape, generator=generator) for shape in ((width, queries, dim), (2, 384, keys, dim))
            ]
            x, storage = (one.to(device, dtype) for one in numbers)
            row = [torch.tensor([value], device=device) for value in (1, 300, 0, width)]
            visible = torch.ones(1, width, width, dtype=torch.bool, device=device).tril()
            parts = (x, storage, storage, *row, visible, dim**-0.5)
            got, wanted = attend(*parts).float().cpu(), attend.reference(*parts).float().cpu()
            if not torch.allclose(got, wanted, rtol=0.02, atol=0.02):
                raise ArithmeticError("it computes something else than torch")
    except Exception as error:
        logger.warning("attention in Triton is not used for %d-dimensional heads (%s).", dim, first_line(error))
        return False
    return True
