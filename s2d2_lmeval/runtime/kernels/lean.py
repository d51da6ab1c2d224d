"""A decoder on a CPU in few calls: for a few tokens through a small model, calling takes longer than computing.

Layers are those that :mod:`~s2d2_lmeval.runtime.kernels.fused` recognises, rotary embeddings of part of a head
included, in float32. Modules stay as they are: their weights are read when they are used, and the forward hooks of
layers are called. The whole is compared with the module when a model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, silu

from s2d2_lmeval.errors import first_line
from s2d2_lmeval.runtime.attention import AttentionContext, attention_of_rows
from s2d2_lmeval.runtime.cache import SlotCache, cache_argument
from s2d2_lmeval.runtime.graphs import upload
from s2d2_lmeval.runtime.kernels.fused import ROUNDING, Unlike, recognised
from s2d2_lmeval.runtime.passes import Layout
from s2d2_lmeval.runtime.shapes import Frame, Shape

logger = logging.getLogger("s2d2_lmeval")

STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings that depend on nothing but the position."""


class Norm:
    """A root mean square ``norm`` of (M, n)."""

    def __init__(self, norm: Any) -> None:
        self.parameters, self.eps, self.size = norm._parameters, float(norm.variance_epsilon), list(norm.weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, self.size, self.parameters["weight"], self.eps)

    def unweighted(self, x: torch.Tensor) -> torch.Tensor:
        """Without the weight."""
        return torch.rms_norm(x, self.size, None, self.eps)


def product_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear ``module`` without its hooks, with the weights that it has whenever it is called."""
    own = module._parameters
    return lambda x: linear(x, own["weight"], own["bias"])


class LeanLayer:
    """A ``layer`` of a decoder, on a residual stream (N, H).

    Raises:
        Unlike: if it is built differently.
    """

    def __init__(self, layer: Any) -> None:
        self.dim, (query, key), gated = recognised(layer)
        attention, self.layer = layer.self_attn, layer
        if "position_ids" in signature(type(attention).forward).parameters:
            raise Unlike("its attention depends on positions in ways of its own")
        self.index, self.scaling = attention.layer_idx, attention.scaling
        self.queries = attention.q_proj.out_features // self.dim
        self.heads = self.queries + attention.k_proj.out_features // self.dim
        """Of queries and keys."""
        self.before, self.after = map(Norm, (layer.input_layernorm, layer.post_attention_layernorm))
        self.by_head = None if query is None else (Norm(query), Norm(key))
        if query is not None and query.variance_epsilon != key.variance_epsilon:
            raise Unlike("its queries and keys have different norms")
        self.projections = [product_of(getattr(attention, f"{name}_proj")) for name in "qkv"]
        self.out = product_of(attention.o_proj)
        names = ("gate", "up", "down") if gated else ()
        self.gated = [product_of(getattr(layer.mlp, f"{name}_proj")) for name in names]

    def __call__(
        self, stream: torch.Tensor, rotary: Rotary, cache: SlotCache, context: AttentionContext
    ) -> torch.Tensor:
        normed = self.before(stream)
        query, key, values = (project(normed) for project in self.projections)
        mixed = torch.cat([query, key], dim=1).view(-1, self.heads, self.dim)
        if self.by_head is not None:
            norm, other = self.by_head
            mixed = norm.unweighted(mixed)
            mixed[:, : self.queries].mul_(norm.parameters["weight"])
            mixed[:, self.queries :].mul_(other.parameters["weight"])
        mixed = rotary(mixed)
        rooms = cache.write(self.index, mixed[:, self.queries :], values.view(len(values), -1, self.dim))
        seen = attention_of_rows(context, mixed[:, : self.queries], *rooms, self.scaling)
        stream = stream + self.out(seen.flatten(1))
        normed = self.after(stream)
        if not self.gated:
            more: torch.Tensor = self.layer.mlp(normed.unsqueeze(0))
            return stream + more[0]
        gate, up, down = self.gated
        return stream.add_(down(silu(gate(normed)).mul_(up(normed))))


class Rotary:
    """Rotates heads (N, heads, dim) of the tokens at some positions, by tables (P, dim)."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, swap: torch.Tensor) -> None:
        self.cos, self.sin, self.swap = cos.unsqueeze(1), sin.unsqueeze(1), swap

    def at(self, positions: torch.Tensor) -> Rotary:
        """For tokens at ``positions`` (N,)."""
        found = Rotary.__new__(Rotary)
        found.cos, found.sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        found.swap = self.swap
        return found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.cos).add_(x.index_select(2, self.swap).mul_(self.sin))


class LeanDecoder:
    """A ``backbone``: embedding, layers, norm.

    Raises:
        Unlike: if it is built differently.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone, self.norm = backbone, Norm(backbone.norm)
        self.layers = [LeanLayer(layer) for layer in backbone.layers]
        kind = getattr(backbone.rotary_emb, "rope_type", None)
        if kind not in STATIC:
            raise Unlike(f"its rotary embedding is {kind}")
        self._rotary = self._tables(1)

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: SlotCache, context: AttentionContext
    ) -> torch.Tensor:
        """Hidden states (N, H) of ``tokens`` (N,) at ``positions`` (N,), which lie in ``cache`` where it was told."""
        if self._rotary.cos.shape[0] < cache.capacity:
            self._rotary = self._tables(cache.capacity)
        rotary = self._rotary.at(positions)
        stream: torch.Tensor = self.backbone.get_input_embeddings()(tokens)
        for layer in self.layers:
            stream = layer(stream, rotary, cache, context)
            stream = _hooked(layer.layer, stream)
        return _hooked(self.backbone.norm, self.norm(stream))

    def _tables(self, length: int) -> Rotary:
        """The rotation at each of the first ``length`` positions; what is not rotated is multiplied by one."""
        like, dim = torch.empty(1, 1, 1), self.layers[0].dim
        cos, sin = (table[0] for table in self.backbone.rotary_emb(like, torch.arange(length)[None]))
        half, rest = cos.shape[1] // 2, dim - cos.shape[1]
        sin = torch.cat([-sin[:, :half], sin[:, half:], sin.new_zeros(length, rest)], dim=1)
        swap = torch.cat([torch.arange(half, 2 * half), torch.arange(half), torch.arange(2 * half, dim)])
        return Rotary(torch.cat([cos, cos.new_ones(length, rest)], dim=1), sin, swap)


def _hooked(module: Any, output: torch.Tensor) -> torch.Tensor:
    """``output`` of a module, after its forward hooks."""
    for hook in module._forward_hooks.values():
        hook(module, (), output.unsqueeze(0))
    return output


def lean_decoder(model: Any, backend: str) -> LeanDecoder | None:
    """A :class:`LeanDecoder` for ``model``, whose attention is ``backend``; None where there is none, and another
    reason than its structure is logged.
    """
    backbone = model.get_decoder()
    known = {"embed_tokens", "layers", "norm", "rotary_emb"}
    parts = {name for name, _ in backbone.named_children()}
    if model.dtype != torch.float32 or backend != "sdpa" or not (parts == known or getattr(backbone, "plain", False)):
        return None
    try:
        with torch.no_grad():
            found = LeanDecoder(backbone)
            _compare(backbone, found)
    except Exception as error:
        level = logging.DEBUG if isinstance(error, Unlike) else logging.WARNING
        logger.log(level, "this model runs as transformers' modules: %s.", first_line(error))
        return None
    return found


def _compare(backbone: Any, lean: LeanDecoder) -> None:
    """Raises an error if ``lean`` gives something else than the ``backbone`` in two passes, one after the other."""
    layout = Layout(np.array([1, 0]), np.array([3, 2]))
    tokens, visible = torch.arange(layout.queries), torch.ones(2, 3, 3, dtype=torch.bool).tril()
    caches, name = [SlotCache(2, 64, len(lean.layers)) for _ in range(2)], cache_argument(backbone)
    for _ in range(2):
        found = []
        for cache in caches:
            frame = Frame(layout, Shape.tight(layout, 1, cache))
            context = AttentionContext.of(upload(tokens.device, frame.attention(cache)), visible, frame)
            positions = context.destinations % cache.capacity
            cache.write_to(context.destinations)
            cache.lengths[layout.slots] += layout.widths
            if cache is caches[0]:
                given = {name: cache, "use_cache": True, "pass_context": context}
                found += backbone(input_ids=tokens[None], position_ids=positions[None], **given).last_hidden_state
            else:
                found.append(lean(tokens, positions, cache, context))
        difference = ((found[0] - found[1]).abs().max() / found[0].abs().max()).item()
        if not difference <= ROUNDING[torch.float32]:
            raise ArithmeticError(f"fewer calls give something else (by {difference:.1e} of the largest number)")
