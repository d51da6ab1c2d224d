"""Arguments of kernels, of odd shapes."""

from __future__ import annotations

from typing import Any

import torch

Case = dict[str, Any]

ATTENTION: dict[str, Case] = {
    "rows of no, one and many queries": {"heads": (4, 2, 16), "widths": [3, 0, 8, 1], "capacity": 700},
    "one query, eight heads to a key": {"heads": (8, 1, 64), "widths": [1], "capacity": 90},
    "seven heads to a key": {"heads": (7, 1, 16), "widths": [5, 9], "capacity": 300},
    "wide, every head its own key": {"heads": (4, 4, 32), "widths": [70, 2], "capacity": 400},
    "more rows than are searched at once": {"heads": (2, 1, 16), "widths": [1] * 33, "capacity": 60},
    "a window": {"heads": (4, 2, 16), "widths": [3, 8], "capacity": 700, "window": 5},
    "a window and causal": {"heads": (4, 2, 16), "widths": [3, 8], "capacity": 700, "window": 100, "causal": True},
    "splits of more than 256 keys": {"heads": (2, 1, 16), "widths": [2], "capacity": 9000},
}
"""``widths`` of the rows of a pass; two packed queries after them belong to none."""

ALSO_HALF = ("seven heads to a key", "wide, every head its own key", "a window and causal")
"""Those that the interpreter, which is slow, runs in bfloat16 too."""


def attention(
    heads: tuple[int, int, int],
    widths: list[int],
    capacity: int,
    dtype: torch.dtype,
    window: int | None = None,
    causal: bool = False,
) -> Case:
    """Keyword arguments of ``attend``: any slots and order, the first without a prefix, half the fellows seen."""
    generator = torch.Generator().manual_seed(0)
    (queries, keys, dim), rows, wide = heads, len(widths), torch.tensor(widths)
    order = torch.randperm(rows, generator=generator)
    offsets = torch.empty_like(wide).index_copy(0, order, wide[order].cumsum(0) - wide[order])
    lengths = torch.randint(0, capacity - max(widths), (rows,), generator=generator)
    lengths[0] = 0 if rows > 1 else lengths[0]
    visible = torch.rand(rows, max(widths) + 1, max(widths) + 1, generator=generator) < 0.5
    visible.diagonal(dim1=1, dim2=2).fill_(True)
    places = [lengths[row] + torch.arange(widths[row]) for row in order.tolist()]
    storage = torch.randn(2, rows + 2, capacity, keys, dim, generator=generator).to(dtype)
    return {
        "queries": torch.randn(sum(widths) + 2, queries, dim, generator=generator).to(dtype),
        "keys": storage[0],
        "values": storage[1],
        "slots": torch.randperm(rows + 1, generator=generator)[:rows],
        "lengths": lengths,
        "offsets": offsets,
        "widths": wide,
        "visible": visible,
        "scale": dim**-0.5,
        "positions": torch.cat([*places, torch.zeros(2, dtype=torch.long)]) if causal or window else None,
        "window": window,
        "causal": causal,
    }


LAYERS: dict[str, Case] = {
    "two heads to a key": {"heads": (4, 2, 16), "hidden": 64, "count": 9},
    "without norms, nine heads": {"heads": (9, 3, 8), "hidden": 72, "count": 5, "norms": False},
    "odd half dimension": {"heads": (2, 1, 22), "hidden": 44, "count": 1},
}


def layer(heads: tuple[int, int, int], hidden: int, count: int, dtype: torch.dtype, norms: bool = True) -> Case:
    """Arguments, by position, of each kernel of a layer."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, dim = heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    angle = torch.rand(count, dim // 2, generator=generator).mul(6).repeat(1, 2)
    weights = [1 + normal(dim) / 5 if norms else None for _ in range(2)]
    places = torch.randperm(3 * 40, generator=generator)[:count]
    storage = [normal(3, 40, keys, dim) for _ in range(2)]
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    return {
        "add_norm": (normal(count, hidden), normal(count, hidden), 1 + normal(hidden) / 5, 1e-6),
        "add_norm of nothing": (normal(count, hidden), None, 1 + normal(hidden) / 5, 1e-6),
        "rope_write": (normal(count, (queries + 2 * keys) * dim), *weights, 1e-6, *tables, places, *storage),
        "silu_mul": (normal(count, 2 * 3 * hidden),),
    }


def logits(rows: int, vocabulary: int) -> torch.Tensor:
    """Logits (rows, vocabulary) with ties, tokens that are ruled out, a first part without any weight, far outliers."""
    x = 4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    if vocabulary > 4:
        x[:, vocabulary // 2] = -torch.inf
        x[1:2] = 2.0
        x[2:3, [0, -1]] = 30.0
    if vocabulary > 70:
        x[3:4, :64] = -torch.inf
    return x
