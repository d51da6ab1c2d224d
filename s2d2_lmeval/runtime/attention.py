"""The one attention function, for every family and every decoder.

It is registered with transformers under :data:`NAME`; native models hand it the pass through their keyword arguments.
Back ends:

``sdpa``   PyTorch's scaled dot product attention with a boolean mask over prefix and fellow queries. Runs everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.passes import Pass

NAME = "s2d2"
BACKENDS = ("sdpa",)


def choose_backend(attention: str) -> str:
    """Resolve ``attention`` (``auto`` or a back end) to a back end that this machine has.

    :raises ConfigError: for a name that is not a back end.
    """
    if attention == "auto":
        return "sdpa"
    if attention not in BACKENDS:
        raise ConfigError(f"attention={attention!r} is not a back end here; use one of: auto, {', '.join(BACKENDS)}.")
    return attention


@dataclass
class AttentionContext:
    """What the attention of every layer needs to know of one forward; built once per forward.

    ``spread`` (R * W,) packed index of each padded query, or None where all rows are equally wide; ``gather`` (N,) its
    inverse;
    ``slots`` (R,) or None where the rows are just the first R slots; ``mask`` (R, 1, W, C) bool; ``span`` C, the number
    of cache positions that anybody sees.
    """

    rows: int
    widest: int
    span: int
    slots: torch.Tensor | None
    spread: torch.Tensor | None
    gather: torch.Tensor | None
    mask: torch.Tensor

    @classmethod
    def build(cls, request: Pass, cache: SlotCache) -> AttentionContext:
        """Prepare the attention of ``request`` on ``cache``, before the forward that writes to it."""
        layout, device = request.layout, request.tokens.device
        rows, widest = len(layout.slots), layout.widest
        prefix = cache.lengths[layout.slots]
        span = int((prefix + layout.widths).max())
        ragged = layout.queries != rows * widest
        in_order = np.array_equal(layout.slots, np.arange(rows))

        def upload(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

        # Column c of the mask is position c of the slot: prefix, then the queries just written, then nothing.
        column = torch.arange(span, device=device) - upload(prefix).unsqueeze(1)
        fellow = column.clamp(0, widest - 1).unsqueeze(1).expand(rows, widest, span)
        mask = request.visible.gather(2, fellow)
        mask &= (column < widest).unsqueeze(1)
        mask |= (column < 0).unsqueeze(1)
        return cls(
            rows=rows,
            widest=widest,
            span=span,
            slots=None if in_order else upload(layout.slots),
            spread=upload(layout.padded(np.arange(layout.queries), 0).reshape(-1)) if ragged else None,
            gather=upload(layout.row_of * widest + layout.local) if ragged else None,
            mask=mask.unsqueeze(1),
        )

    def to(self, device: torch.device) -> AttentionContext:
        """The same on another device (models spread over several); itself where it lies there already."""
        if self.mask.device == device:
            return self

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return AttentionContext(
            self.rows,
            self.widest,
            self.span,
            moved(self.slots),
            moved(self.spread),
            moved(self.gather),
            self.mask.to(device),
        )


def pass_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    pass_context: AttentionContext,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over one pass.

    ``query`` (1, heads, N, dim) is packed; ``key`` and ``value`` (slots, capacity, key-value heads, dim) are the
    cache's storage. Returns (1, N, heads, dim), as transformers expects it.
    """
    context = pass_context.to(query.device)
    packed = query[0].transpose(0, 1)
    padded = packed if context.spread is None else packed.index_select(0, context.spread)
    queries = padded.reshape(context.rows, context.widest, *packed.shape[1:]).transpose(1, 2)
    if context.slots is None:
        keys, values = key[: context.rows, : context.span], value[: context.rows, : context.span]
    else:
        keys = key[:, : context.span].index_select(0, context.slots)
        values = value[:, : context.span].index_select(0, context.slots)
    out = scaled_dot_product_attention(
        queries,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=context.mask,
        scale=scaling,
        enable_gqa=queries.shape[1] != keys.shape[2],
    )
    heads, dim = out.shape[1], out.shape[3]
    out = out.transpose(1, 2).reshape(-1, heads, dim)
    if context.gather is not None:
        out = out.index_select(0, context.gather)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, pass_attention)
