"""The one attention function, for every family and every decoder.

It is registered with transformers under :data:`NAME`; native models hand it the pass through their keyword arguments.
Back ends:

``sdpa``   PyTorch's scaled dot product attention with a mask over prefix and fellow queries. Runs everywhere.
``flash``  in two parts, so that no mask over the prefix is needed: the long prefix, which every query of a row sees
           whole, by flash-attn with a length per row; and the few fellow queries, with their mask, in torch. Each part
           comes with the log of its sum of exponentials, by which the two are merged exactly.
``triton`` in one kernel of our own (:mod:`~s2d2_lmeval.runtime.kernels.attention`): no mask over the prefix, no
           padding, nothing that depends on how long a prefix is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from s2d2_lmeval.errors import ConfigError, first_line, shown
from s2d2_lmeval.runtime.kernels.attention import DIMS, Heads, attend, attends, prefix_mask
from s2d2_lmeval.runtime.shapes import Frame

logger = logging.getLogger("s2d2_lmeval")

NAME = "s2d2"
BACKENDS = ("sdpa", "flash", "triton")

OLDEST, HOPPER = (8, 0), 9
"""Compute capability that flash-attn 2 asks for, and the generation that flash-attn 3 is written for."""

Part = tuple[torch.Tensor, torch.Tensor]
"""Attention (R, W, heads, dim) over some of the keys, and its log-sum-exp (R, heads, W), in float32."""

GROUPED = 64
"""Queries per row up to which those that share a key head are laid side by side: then every key is read once for all
of them, where torch would repeat it. A wide pass computes more than it reads, and its mask would grow.
"""


def grain_of(device: torch.device, dtype: torch.dtype) -> int:
    """Attention reads a multiple of so many cache positions.

    Kernels add up a ragged rest in another order, which in half precision is another number: with whole vectors a row's
    attention does not depend on what it is batched with. On CUDA every new shape costs a plan besides.
    """
    if device.type == "cuda":
        return 128
    return 16 if dtype in (torch.bfloat16, torch.float16) else 1


def heads_of(config: Any) -> Heads:
    """The heads of a transformers ``config``."""
    config = config.get_text_config()
    heads = int(config.num_attention_heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(dim)


def choose_backend(
    attention: str,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    heads: Heads = (32, 8, 128),
) -> str:
    """Resolve ``attention`` (``auto`` or a back end) to a back end for weights of ``dtype`` on ``device`` (a GPU if
    there is one) with such ``heads``.

    On CUDA, ``auto`` is ``triton`` where that works, else ``flash``, else ``sdpa``; elsewhere it is ``sdpa``. On a CPU
    ``triton`` runs its kernel's torch reference.

    Raises:
        ConfigError: a name that is not a back end, or one that these weights or this machine cannot have.
    """
    if not isinstance(attention, str) or attention not in ("auto", *BACKENDS):
        raise ConfigError(
            f"attention={shown(attention)} is not a back end here; use one of: auto, {', '.join(BACKENDS)}."
        )
    if attention == "sdpa":
        return "sdpa"
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if attention == "triton" or (attention == "auto" and on_gpu):
        if attends(heads, device, dtype):
            return "triton"
        if attention == "triton":
            raise ConfigError(
                f"attention=triton needs Triton with a C compiler, weights in bfloat16, float16 or float32 and a head "
                f"dimension of {', '.join(map(str, DIMS))}; this is {dtype} and {heads[2]}. Use attention=sdpa."
            )
    half = dtype in (torch.bfloat16, torch.float16)
    if attention == "auto":
        return "flash" if on_gpu and half and prefix_kernel(dtype) is not None else "sdpa"
    if not (on_gpu and half):
        raise ConfigError("attention=flash runs on CUDA in bfloat16 or float16 only; use attention=sdpa.")
    if prefix_kernel(dtype) is None:
        raise ConfigError(
            "attention=flash needs flash-attn 2 and a GPU of compute capability 8.0 or more, or flash-attn 3 and a "
            "Hopper GPU (fa3-fwd: in bfloat16); use attention=sdpa."
        )
    return "flash"


@dataclass
class AttentionContext:
    """What the attention of every layer needs to know of one forward of R rows, W queries in the widest; built once.

    ``spread`` (R * W,) packed index of each padded query, or None where all rows are equally wide; ``gather`` (N,) its
    inverse; ``slots`` (R,) or None where the rows are just the first R slots; ``visible`` (R, W, W) who sees whom;
    ``lengths`` (R,) prefix lengths; ``destinations`` (N,) where the queries' keys lie in the flattened storage;
    ``span`` C, the number of cache positions that anybody sees; ``mask`` (R, 1, W, C) bool, for ``sdpa`` only.

    ``offsets`` and ``widths`` (R,) say where each row's queries lie. Under ``triton`` only, ``window`` and ``causal``
    narrow the sight of a layer by ``positions`` (N,), see :func:`~s2d2_lmeval.runtime.kernels.attention.attend`.
    """

    rows: int
    widest: int
    span: int
    visible: torch.Tensor
    lengths: torch.Tensor
    destinations: torch.Tensor
    offsets: torch.Tensor
    widths: torch.Tensor
    slots: torch.Tensor | None = None
    spread: torch.Tensor | None = None
    gather: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    backend: str = "sdpa"
    positions: torch.Tensor | None = None
    window: int | None = None
    causal: bool = False
    _biases: dict[tuple[torch.dtype, int], torch.Tensor] = field(default_factory=dict, init=False)
    _elsewhere: dict[torch.device, AttentionContext] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls, told: Mapping[str, torch.Tensor], visible: torch.Tensor, frame: Frame, backend: str = "sdpa"
    ) -> AttentionContext:
        """The attention of a forward laid out in ``frame``, from its arrays on the device (:meth:`Frame.attention`)
        and from who sees whom, (R, W, W).
        """
        shape = frame.shape
        return cls(
            rows=shape.rows,
            widest=shape.widest,
            span=shape.span,
            slots=None if frame.in_order and backend != "triton" else told["slots"],
            spread=told["spread"] if frame.ragged else None,
            gather=told["packed"] if frame.ragged else None,
            offsets=told["offsets"],
            widths=told["widths"],
            visible=visible,
            lengths=told["lengths"],
            destinations=told["destinations"],
            mask=prefix_mask(visible, told["lengths"], shape.span, frame.prefix) if backend == "sdpa" else None,
            backend=backend,
        )

    def to(self, device: torch.device) -> AttentionContext:
        """The same on another device, for all layers there (models spread over several); itself where it lies there
        already.
        """
        device = torch.device(device)
        if self.lengths.device == device:
            return self
        if device not in self._elsewhere:
            values = {one.name: getattr(self, one.name) for one in fields(self)}
            moved: dict[str, Any] = {
                name: value.to(device, non_blocking=True)
                for name, value in values.items()
                if isinstance(value, torch.Tensor)
            }
            self._elsewhere[device] = replace(self, **moved)
        return self._elsewhere[device]

    def seen(self, storage: torch.Tensor) -> torch.Tensor:
        """What anybody sees of a layer's ``storage`` (slots, capacity, heads, dim): (R, C, heads, dim)."""
        if self.slots is None:
            return storage[: self.rows, : self.span]
        return storage[:, : self.span].index_select(0, self.slots)

    def padded(self, packed: torch.Tensor) -> torch.Tensor:
        """``packed`` (N, heads, dim) as (R, W, heads, dim); unused places hold anything."""
        spread = packed if self.spread is None else packed.index_select(0, self.spread)
        return spread.reshape(self.rows, self.widest, *packed.shape[1:])

    def bias(self, dtype: torch.dtype, groups: int) -> torch.Tensor:
        """The mask as numbers to add, (R, 1, groups * W, C), the same for every layer."""
        if (dtype, groups) not in self._biases:
            assert self.mask is not None
            bias = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            bias = bias.masked_fill_(~self.mask, -torch.inf)
            self._biases[dtype, groups] = bias if groups == 1 else torch.cat([bias] * groups, dim=2)
        return self._biases[dtype, groups]


def pass_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    pass_context: AttentionContext | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over one pass.

    ``query`` (1, heads, N, dim) is packed; ``key`` and ``value`` (slots, capacity, key-value heads, dim) are the
    cache's storage. Returns (1, N, heads, dim), as transformers expects it.

    Raises:
        ConfigError: the model was called outside of a pass.
    """
    if pass_context is None:
        raise ConfigError(
            "this model was loaded by s2d2_lmeval, which runs its forwards: call generate() of what load() returned, "
            "not of its hf_model. To call the model itself, load the checkpoint by transformers."
        )
    context = pass_context.to(query.device)
    return attention_of_rows(context, query[0].transpose(0, 1), key, value, scaling).unsqueeze(0), None


def attention_of_rows(
    context: AttentionContext, packed: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention of the queries ``packed`` (N, heads, dim), and its shape, over the cache's storage ``key`` and
    ``value``.
    """
    if context.backend == "triton":
        return attended(context, packed, key, value, scaling)
    queries = context.padded(packed)
    out = (_flash if context.backend == "flash" else _sdpa)(context, queries, key, value, scaling)
    out = out.reshape(-1, *out.shape[2:])
    return out if context.gather is None else out.index_select(0, context.gather)


def attended(
    context: AttentionContext, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """``queries`` and the answer are packed, (N, heads, dim); under ``triton``."""
    assert context.slots is not None
    return attend(
        queries,
        key,
        value,
        context.slots,
        context.lengths,
        context.offsets,
        context.widths,
        context.visible,
        queries.shape[-1] ** -0.5 if scaling is None else scaling,
        positions=context.positions,
        window=context.window,
        causal=context.causal,
    )


def _sdpa(
    context: AttentionContext, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """``queries`` and the answer are (R, W, heads, dim)."""
    rows, widest, heads, dim = queries.shape
    keys, values = context.seen(key).transpose(1, 2), context.seen(value).transpose(1, 2)
    groups = heads // keys.shape[1]
    grouped = queries.view(rows, widest, -1, groups, dim)
    if groups == 1 or widest > GROUPED:
        # One call for each head of a group: with a mask, `enable_gqa` leaves older GPUs only the kernel that
        # materialises the scores, and repeated keys would be a copy of all that the rows see.
        attend = partial(scaled_dot_product_attention, attn_mask=context.bias(queries.dtype, 1), scale=scaling)
        found = [attend(head.transpose(1, 2), keys, values).transpose(1, 2) for head in grouped.unbind(3)]
        return torch.stack(found, dim=3).flatten(2, 3)
    side_by_side = grouped.permute(0, 2, 3, 1, 4)
    out = scaled_dot_product_attention(
        side_by_side.reshape(rows, -1, groups * widest, dim),
        keys,
        values,
        attn_mask=context.bias(queries.dtype, groups),
        scale=scaling,
    )
    return out.view(rows, -1, groups, widest, dim).permute(0, 3, 1, 2, 4).reshape(rows, widest, heads, dim)


def _flash(
    context: AttentionContext, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """``queries`` and the answer are (R, W, heads, dim)."""
    kernel = prefix_kernel(queries.dtype)
    assert kernel is not None
    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    prefix = kernel(queries, key, value, context.lengths, context.slots, scale)
    fresh = (storage.flatten(0, 1).index_select(0, context.destinations) for storage in (key, value))
    keys, values = (context.padded(one) for one in fresh)
    return merge(prefix, among_fellows(queries, keys, values, context.visible, scale), context.lengths)


@cache
def prefix_kernel(dtype: torch.dtype) -> Callable[..., Part] | None:
    """flash-attn 3 if it is there and works on this GPU in ``dtype``, else flash-attn 2, else None.

    A kernel takes queries (R, W, heads, dim), the storage of keys and of values (slots, capacity, key-value heads,
    dim), lengths (R,), slots (R,) or None (the first R) and a scale; it gives the attention over the first ``lengths``
    positions of each row's slot.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < OLDEST:
        return None
    hopper = torch.cuda.get_device_capability()[0] == HOPPER
    libraries = {
        "flash_attn_interface": hopper,
        "fa3_fwd_interface": hopper and dtype == torch.bfloat16,  # flash-attn 3 as a wheel, built without float16
        "flash_attn": True,
    }
    found = (_attend_of(library) for library, usable in libraries.items() if usable)
    return next((partial(_by_library, attend) for attend in found if attend is not None), None)


def _attend_of(library: str) -> Callable[..., Any] | None:
    """The function of a flash-attn release; None where it is not installed, or not usable here."""
    try:
        attend: Callable[..., Any] = import_module(library).flash_attn_with_kvcache
    except ModuleNotFoundError:
        return None
    except (ImportError, AttributeError, OSError) as error:
        # Built for another torch, or a release without this function (flash-attn 4).
        logger.warning("%s is installed but cannot be used here (%s).", library, first_line(error))
        return None
    return attend


def _by_library(
    attend: Callable[..., Any],
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor | None,
    scale: float,
) -> Part:
    """Both releases name their arguments alike."""
    rows = len(queries)
    found = attend(
        queries,
        keys if slots is not None else keys[:rows],
        values if slots is not None else values[:rows],
        cache_seqlens=lengths.to(torch.int32),
        cache_batch_idx=None if slots is None else slots.to(torch.int32),
        softmax_scale=scale,
        causal=False,
        return_softmax_lse=True,
    )
    return found[0], found[1]


def among_fellows(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float
) -> Part:
    """Attention of ``queries`` (R, W, heads, dim) over ``keys`` and ``values`` (R, K, key-value heads, dim) where
    ``visible`` (R, W, K); scores and sums at least in float32.
    """
    rows, widest, heads, dim = queries.shape
    grouped = queries.view(rows, widest, keys.shape[2], -1, dim)
    scores = torch.einsum("rwhgd,rkhd->rhgwk", grouped, keys) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    log_mass = scores.logsumexp(-1)
    weights = (scores - log_mass.unsqueeze(-1)).exp().nan_to_num(0.0)  # of nothing: a row without a prefix
    out = torch.einsum("rhgwk,rkhd->rwhgd", weights.to(values.dtype), values)
    return out.reshape(rows, widest, heads, dim), log_mass.reshape(rows, heads, widest)


def merge(prefix: Part, fellows: Part, lengths: torch.Tensor) -> torch.Tensor:
    """Attention over both parts (R, W, heads, dim). Where ``lengths`` (R,) are zero there is no prefix, whatever its
    kernel made of it.
    """
    (before, log_before), (here, log_here) = prefix, fellows
    nothing = lengths == 0
    share = torch.sigmoid(log_before.masked_fill(nothing.view(-1, 1, 1), -torch.inf) - log_here)
    share = share.transpose(1, 2).unsqueeze(-1)
    before = before.masked_fill(nothing.view(-1, 1, 1, 1), 0)
    return (share * before + (1 - share) * here).to(here.dtype)


AttentionInterface.register(NAME, pass_attention)
