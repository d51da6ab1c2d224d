"""Decoder layers in few GPU kernels: ten launches instead of about sixty, with the numbers of the module.

A layer is recognised by its structure (Qwen2, Qwen3, Llama, Ministral3 and what is built like them): RMS norms,
projections without quantisation or adapters, rotary embeddings over whole heads, a gated SiLU. Of a layer whose
feed-forward part is something else, such as experts, only the attention is fused. Its ``forward`` is replaced; the
module, its parameters and its hooks stay: what goes in and what comes out is the same. Projections that read the same
input become one product, of which the module's own weights are views. ::

    add_norm, query-key-value product, rope_write, attention (2), output product,
    add_norm, gate-up product, silu_mul, down product (adds to the residual stream)

Every layer is compared with its module on random rows when the model is loaded.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from s2d2_lmeval.errors import ConfigError, first_line, shown
from s2d2_lmeval.runtime.attention import AttentionContext, attention_of_rows
from s2d2_lmeval.runtime.cache import SlotCache, cache_argument
from s2d2_lmeval.runtime.graphs import upload
from s2d2_lmeval.runtime.kernels.dispatch import runs_triton
from s2d2_lmeval.runtime.kernels.layer import add_norm, rope_write, silu_mul
from s2d2_lmeval.runtime.passes import Layout
from s2d2_lmeval.runtime.shapes import Frame, Shape

logger = logging.getLogger("s2d2_lmeval")

CHOICES = ("auto", "on", "off")

_ATTENTION = tuple(f"{name}_proj" for name in "qkvo")
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference between layer and module, relative to the largest number, that is still rounding."""


class Unlike(Exception):
    """Why a layer cannot be fused."""


class FusedLayer:
    """The forward of a decoder ``layer``, which it changes in its weights' addresses only.

    Raises:
        Unlike: if it is built differently.
    """

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        # Where accelerate brings inputs to a layer's device, it calls what was the forward before.
        self.layer, self.place = layer, "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
        self.plain = getattr(layer, self.place)
        self.dim, self.norms, gated = recognised(layer)
        self.cache_argument = cache_argument(layer)
        rope = getattr(getattr(attention, "config", None), "rope_parameters", None) or {}
        self.beta: float | None = rope.get("llama_4_scaling_beta")
        self.original: float = rope.get("original_max_position_embeddings") or 1
        self.attends = _Joined([getattr(attention, name) for name in _ATTENTION[:3]])
        self.gates = _Joined([layer.mlp.gate_proj, layer.mlp.up_proj]) if gated else None
        self.down: Any = layer.mlp.down_proj.weight.detach().t() if gated else None
        self.held: list[tuple[Any, Any]] = [(attention.q_proj, self.attends.weight)]
        """Modules, and the memory that their weights are expected in."""
        if self.gates is not None:
            self.held += [(layer.mlp.gate_proj, self.gates.weight), (layer.mlp.down_proj, self.down)]

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the module's, to which goes what is not a pass of ours, and all if weights were moved or exchanged."""
        cache, context = kwargs.get(self.cache_argument), kwargs.get("pass_context")
        if context is None or not isinstance(cache, SlotCache) or not self.stands():
            out: torch.Tensor = self.plain(hidden_states, *args, **kwargs)
            return out
        positions = kwargs["position_ids"][0] if self.beta else None
        return self._forward(hidden_states[0], kwargs["position_embeddings"], positions, cache, context).unsqueeze(0)

    def stands(self) -> bool:
        """Whether the modules still have these weights, and did not move or get others."""
        return all(
            module.weight.device == held.device and module.weight.data_ptr() == held.data_ptr()
            for module, held in self.held
        )

    def _forward(
        self,
        stream: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor | None,
        cache: SlotCache,
        context: AttentionContext,
    ) -> torch.Tensor:
        """The residual stream (N, H) after the layer."""
        layer, attention = self.layer, self.layer.self_attn
        stream, normed = add_norm(stream, None, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
        projected = self.attends(normed)
        sample = self.heads_of(projected)
        keys, values = cache.storage(attention.layer_idx, sample, sample)
        by_head = [None if norm is None else norm.weight for norm in self.norms]
        queries = rope_write(
            projected,
            by_head[0],
            by_head[1],
            0.0 if self.norms[0] is None else self.norms[0].variance_epsilon,
            rotary[0][0],
            rotary[1][0],
            cache.places(projected.device),
            keys,
            values,
        )
        if positions is not None:  # Ministral3: queries beyond the original context are larger
            scale = 1 + (self.beta or 0) * torch.floor(positions / self.original).log1p()
            queries = queries * scale.to(queries.dtype).view(-1, 1, 1)
        seen = attention_of_rows(context.to(queries.device), queries, keys, values, attention.scaling)
        out = linear(seen.flatten(1), attention.o_proj.weight, attention.o_proj.bias)
        norm = layer.post_attention_layernorm
        stream, normed = add_norm(stream, out, norm.weight, norm.variance_epsilon)
        if self.gates is None:
            more: torch.Tensor = layer.mlp(normed.unsqueeze(0))
            return stream + more[0]
        return stream.addmm_(silu_mul(self.gates(normed)), self.down)

    def heads_of(self, like: torch.Tensor) -> torch.Tensor:
        """The shape of this layer's keys, and of its values, (1, heads, dim); without contents."""
        return like.new_empty(1, self.layer.self_attn.k_proj.out_features // self.dim, self.dim)


def recognised(layer: Any) -> tuple[int, tuple[Any, Any], bool]:
    """The head dimension of a decoder ``layer``, the norms of its queries and keys (or twice None), and whether its
    feed-forward part is a gated SiLU.

    Raises:
        Unlike: it is built differently.
    """
    attention = layer.self_attn
    norms, gated = _norms(layer, attention, attention.head_dim), _is_gated(getattr(layer, "mlp", None))
    _expect_known_parts(layer, attention, gated)
    return attention.head_dim, norms, gated


class _Joined:
    """Linear modules with one input as one product; their parameters become views of its."""

    def __init__(self, modules: list[nn.Linear]) -> None:
        self.weight = _joined(modules, "weight")
        self.bias = _joined(modules, "bias") if modules[0].bias is not None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def _joined(modules: list[nn.Linear], name: str) -> torch.Tensor:
    """The parameters of this name in one tensor, of which they become views."""
    parts = [getattr(module, name).detach() for module in modules]
    whole = torch.cat(parts)
    for module, part in zip(modules, whole.split([len(part) for part in parts]), strict=True):
        setattr(module, name, nn.Parameter(part, requires_grad=False))
    return whole


def _norms(layer: Any, attention: Any, dim: int) -> tuple[Any, Any]:
    """The norms of queries and keys, or twice None."""
    found = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    own = [norm for norm in found if norm is not None]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, *own):
        if not hasattr(norm, "variance_epsilon") or norm.weight.dim() != 1:
            raise Unlike(f"its norm is a {type(norm).__name__}")
    if len(own) == 1 or any(len(norm.weight) != dim for norm in own):
        raise Unlike("its queries and keys are not normalised by head")
    return found


def _is_gated(mlp: Any) -> bool:
    """Whether it is down(SiLU(gate(x)) * up(x)), without biases."""
    parts = [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
    silu = "silu" in type(getattr(mlp, "act_fn", None)).__name__.lower()
    return silu and all(type(part) is nn.Linear and part.bias is None for part in parts)


def _expect_known_parts(layer: Any, attention: Any, gated: bool) -> None:
    """Raises Unlike if there is anything in ``layer`` that would be left out."""
    linears = [getattr(attention, name, None) for name in _ATTENTION]
    if any(type(one) is not nn.Linear for one in linears):
        raise Unlike("its projections are not plain")
    if len({one.bias is None for one in linears[:3]}) != 1:  # type: ignore[union-attr]
        raise Unlike("only some of its projections have biases")
    parts = {name for name, _ in layer.named_parameters() if gated or not name.startswith("mlp.")}
    known = {f"self_attn.{name}.{kind}" for name in _ATTENTION for kind in ("weight", "bias")}
    known |= {f"self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
    known |= {f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
    known |= {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    if parts - known:
        raise Unlike(f"it has {sorted(parts - known)[0]}")
    if any(getattr(module._hf_hook, "offload", True) for module in layer.modules() if hasattr(module, "_hf_hook")):
        raise Unlike("accelerate keeps its weights elsewhere")
    if len({parameter.device for parameter in layer.parameters()}) > 1:
        raise Unlike("its weights lie on several devices")
    if any(hasattr(parameter, "device_mesh") for parameter in layer.parameters()):
        raise Unlike("its weights are spread over processes")


def fuse(model: Any, wanted: Any, backend: str) -> bool:
    """Fuse the layers of ``model``, whose attention is ``backend``; whether they are fused now.

    Args:
        wanted: ``on``; ``off``; or ``auto``: on CUDA, where Triton works. ``on`` also takes torch's reference of the
            kernels, which is slow and for tests.

    Raises:
        ConfigError: for another value, or if the layers cannot be fused though ``on``.
    """
    wanted = {True: "on", False: "off"}.get(wanted, wanted) if isinstance(wanted, bool) else wanted
    if wanted not in CHOICES:
        raise ConfigError(f"fused={shown(wanted)} is none of: {', '.join(CHOICES)}.")
    backbone = model.get_decoder()
    layers = list(getattr(backbone, "layers", []))
    for before in filter(None, map(_fused_before, layers)):
        setattr(before.layer, before.place, before.plain)
    device, dtype = next(model.parameters()).device, model.dtype
    if wanted == "off" or (wanted == "auto" and not (dtype != torch.float64 and runs_triton(device))):
        return False
    try:
        with torch.no_grad():
            fused = [FusedLayer(layer) for layer in layers]
        _compare(backbone, fused, backend)
    except Exception as error:
        said = f"the layers of this model are not fused: {first_line(error)}"
        if wanted == "on":
            raise ConfigError(f"{said}. Use fused=auto.") from error
        logger.log(logging.INFO if isinstance(error, Unlike) else logging.WARNING, "%s.", said)
        return False
    for forward in fused:
        setattr(forward.layer, forward.place, forward)
    return True


def _fused_before(layer: Any) -> FusedLayer | None:
    found = getattr(layer, "_old_forward", layer.forward)
    return found if isinstance(found, FusedLayer) else None


@torch.inference_mode()
def _compare(backbone: Any, fused: list[FusedLayer], backend: str) -> None:
    """Raises an error if a fused layer gives, or writes to the cache, something else than its module."""
    layout = Layout(np.array([1, 0]), np.array([3, 2]))
    differences = []
    for forward in fused:
        cache = SlotCache(2, 64)
        cache.lengths[:] = 0, 9
        weight = forward.attends.weight
        frame = Frame(layout, Shape.tight(layout, 1, cache))
        visible = torch.ones(2, 3, 3, dtype=torch.bool, device=weight.device).tril()
        context = AttentionContext.of(upload(weight.device, frame.attention(cache)), visible, frame, backend)
        cache.write_to(context.destinations)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, layout.queries, weight.shape[1], generator=generator).to(weight)
        # Over the whole context: what depends on the position may do so in few places.
        apart = max(1, getattr(backbone.config, "max_position_embeddings", 1) // cache.capacity)
        positions = (context.destinations % cache.capacity * apart).unsqueeze(0)
        rotary = backbone.rotary_emb(x, positions)
        if not isinstance(rotary, tuple) or rotary[0].shape[-1] != forward.dim:
            raise Unlike("their rotary embedding covers part of a head")
        rotary = tuple(table.to(weight.device) for table in rotary)
        rooms = cache.storage(forward.layer.self_attn.layer_idx, *[forward.heads_of(weight.new_empty(1, 1))] * 2)
        for room in rooms:
            room.copy_(torch.randn(room.shape, generator=generator))
        given = {
            "position_embeddings": rotary,
            forward.cache_argument: cache,
            "use_cache": True,
            "position_ids": positions,
            "pass_context": context,
        }
        wanted = forward.plain(x, attention_mask=None, **given), *map(torch.clone, rooms)
        for one, other in zip(wanted, (forward(x, **given), *rooms), strict=True):
            differences.append((one - other).abs().max() / one.abs().max())
    worst = torch.stack([one.to(differences[0].device) for one in differences]).max().item()
    if not worst <= ROUNDING.get(weight.dtype, 0):
        raise ArithmeticError(f"they give something else than their modules (by {worst:.1e} of the largest number)")
