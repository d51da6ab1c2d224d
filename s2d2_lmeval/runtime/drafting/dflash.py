"""The DFlash drafter: a small block-diffusion model that reads a target's hidden states (arXiv 2602.06036).

Its layers are Qwen3's, with two differences: it uses the target's embedding and head, and the keys and values of the
text before the block come from the target's features of that text (the outputs of some of its layers, fused into one
vector per position) instead of running it. So text enters the cache as the target decides it, and a draft is an
ordinary pass over one block after that prefix. Features are handed over on the device, at the same positions, so the
caches of target and drafter always hold the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, PreTrainedModel, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.families.facts import DrafterFacts
from s2d2_lmeval.ranks import ranks_of
from s2d2_lmeval.runtime.attention import AttentionContext, heads_of
from s2d2_lmeval.runtime.cache import SlotCache, cache_argument
from s2d2_lmeval.runtime.costs import CostCurve
from s2d2_lmeval.runtime.drafting.convolution import ConvolvedLayer, inside_blocks
from s2d2_lmeval.runtime.drafting.heads import AfterToken, Head, HeadShape
from s2d2_lmeval.runtime.graphs import numbers
from s2d2_lmeval.runtime.kernels.attention import attends, within
from s2d2_lmeval.runtime.memory import RowNeeds, bytes_per_position
from s2d2_lmeval.runtime.passes import DRAFTER, TARGET
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.runtime.shapes import Frame


@dataclass(frozen=True)
class DrafterShape:
    """What a drafter's config.json says beyond Qwen3's fields.

    ``layer_ids`` the target's layers whose outputs are read, counted from 0; ``windows`` and ``causal`` per layer: how
    far back it looks (None: everywhere), and whether it looks ahead inside the block; ``embedding_scale``,
    ``logit_scale`` and ``softcap`` of variants for targets with such scales. ``shifted``: a query says the next token,
    the first one too, in place of its own. ``head``: one that knows the tokens before; ``convolution``: taps and
    channels per group of those around every sublayer (DFlash 2).
    """

    config: Qwen3Config
    block_length: int
    mask_token_id: int
    layer_ids: tuple[int, ...]
    windows: tuple[int | None, ...]
    causal: tuple[bool, ...]
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    shifted: bool = False
    head: HeadShape | None = None
    convolution: tuple[int, int] | None = None

    @property
    def facts(self) -> DrafterFacts:
        """What decoding needs to know of it."""
        return DrafterFacts(self.block_length + self.shifted, self.mask_token_id, self.shifted)


class DFlash(nn.Module):
    """The drafter's own weights, under their published names, beside the target's embedding and head."""

    def __init__(self, shape: DrafterShape) -> None:
        super().__init__()
        config = shape.config
        self.shape, self.config = shape, config
        self.fc = nn.Linear(len(shape.layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        make = Qwen3DecoderLayer if shape.convolution is None else partial(ConvolvedLayer, shape.convolution)
        layers: list[Any] = [make(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self._cache_argument = cache_argument(layers[0].self_attn)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        # Of the target, in a list: they are not part of this model.
        self._shared: list[Any] = []
        self._head: list[Head] = []
        if shape.head is not None:
            self._head = [shape.head.build(config.vocab_size, config.hidden_size, self._shared)]
            for name, part in self._head[0].published().items():
                self.add_module(name, part)

    def attach(self, target: PreTrainedModel) -> DFlash:
        """Use the target's embedding and head."""
        self._shared[:] = target.get_input_embeddings(), target.get_output_embeddings()
        return self

    @property
    def head(self) -> Head | None:
        """What knows the tokens before."""
        return self._head[0] if self._head else None

    def get_input_embeddings(self) -> nn.Module:
        """The target's."""
        return self._shared[0]

    def get_output_embeddings(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The target's head, with this drafter's scale and cap (by a tanh) if it has any."""
        head, scale, cap = self._shared[1], self.shape.logit_scale, self.shape.softcap

        def scaled(hidden: torch.Tensor) -> torch.Tensor:
            logits = head(hidden) * scale
            return torch.tanh(logits / cap) * cap if cap else logits

        return head if scale == 1 and not cap else scaled

    @property
    def plain(self) -> bool:
        """Whether all layers are those of Qwen3 and see everything, from an embedding that is not scaled."""
        shape = self.shape
        whole = not any(shape.causal) and set(shape.windows) == {None}
        return whole and shape.embedding_scale == 1 and shape.convolution is None

    def get_decoder(self) -> DFlash:
        """What answers a pass with hidden states: this."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.fc.weight.dtype

    def absorb(self, features: torch.Tensor, positions: torch.Tensor, cache: SlotCache | Cache) -> None:
        """Write keys and values of text that the target has decided, from its ``features`` (N, number of layers read *
        hidden size) at ``positions`` (1, N), where ``cache`` was told to write.
        """
        context = self.hidden_norm(self.fc(features.to(self.fc.weight.device, self.dtype))).unsqueeze(0)
        cos, sin = self.rotary_emb(context, positions.to(context.device))
        for layer in self.layers:
            attention: Any = layer.self_attn
            heads = (1, context.shape[1], -1, attention.head_dim)
            keys = attention.k_norm(attention.k_proj(context).view(heads)).transpose(1, 2)
            values = attention.v_proj(context).view(heads).transpose(1, 2)
            _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
            cache.update(keys, values, attention.layer_idx)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: SlotCache,
        pass_context: AttentionContext,
        use_cache: bool = True,
    ) -> Any:
        """Hidden states of the packed blocks (1, N) of a pass, as ``last_hidden_state``."""
        positions = position_ids[0].to(self.fc.weight.device)
        contexts: dict[tuple[int | None, bool], AttentionContext] = {(None, False): pass_context}
        for window, causal in zip(self.shape.windows, self.shape.causal, strict=True):
            if (window, causal) not in contexts:
                contexts[window, causal] = narrowed(pass_context, positions, window, causal)
        told: dict[str, Any] = {"use_cache": use_cache}
        if self.shape.convolution is not None:
            told["inside"] = inside_blocks(pass_context.offsets.to(positions.device), len(positions))
        each = [
            {"pass_context": contexts[sight], **told}
            for sight in zip(self.shape.windows, self.shape.causal, strict=True)
        ]
        return SimpleNamespace(last_hidden_state=self.fill(input_ids, position_ids, past_key_values, each))

    def fill(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: SlotCache | Cache,
        each: Sequence[Mapping[str, Any]],
    ) -> torch.Tensor:
        """Hidden states (1, N, H) of blocks after what ``cache`` has absorbed; ``each`` has what every layer's
        attention is told.
        """
        embedded = nn.functional.embedding(input_ids, self._shared[0].weight) * self.shape.embedding_scale
        hidden = embedded.to(self.fc.weight.device, self.dtype)
        rotary = self.rotary_emb(hidden, position_ids.to(hidden.device))
        for layer, told in zip(self.layers, each, strict=True):
            hidden = layer(hidden, position_embeddings=rotary, **{self._cache_argument: cache}, **told)
        return self.norm(hidden)


def narrowed(context: AttentionContext, positions: torch.Tensor, window: int | None, causal: bool) -> AttentionContext:
    """``context`` for a layer that sees less: no further than ``window`` positions on either side, and if ``causal``
    nothing ahead. A key's position is its place in the slot; ``positions`` (N,) are those of the queries.
    """
    if context.backend == "triton":
        return replace(context, positions=positions, window=window, causal=causal)
    packed = positions if context.spread is None else positions.index_select(0, context.spread)
    assert context.mask is not None
    sight = within(packed.view(context.rows, context.widest), context.span, window, causal)
    return replace(context, mask=context.mask.to(positions.device) & sight)


class FeatureTap:
    """Outputs of some layers of a target in its last forward."""

    def __init__(self, backbone: Any, layer_ids: Sequence[int]) -> None:
        layers = backbone.layers
        # After the last layer comes the norm: transformers' hidden states end with its output.
        modules = [backbone.norm if index == len(layers) - 1 else layers[index] for index in layer_ids]
        self._seen: dict[int, torch.Tensor] = {}
        self._hooks = [module.register_forward_hook(partial(self._see, at)) for at, module in enumerate(modules)]

    def _see(self, place: int, _: nn.Module, __: Any, output: Any) -> None:
        self._seen[place] = output[0] if isinstance(output, tuple) else output

    def features(self) -> torch.Tensor:
        """Features (N, number of layers * hidden size) of the packed queries."""
        seen = [self._seen[place][0] for place in range(len(self._hooks))]
        return torch.cat([hidden.to(seen[0].device) for hidden in seen], dim=-1)

    def clear(self) -> None:
        """Release the last forward's tensors."""
        self._seen.clear()


class DraftingRunner(Runner):
    """Runs passes on a target or on its drafter: they name the model that answers them."""

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: DFlash,
        attention: str = "auto",
        static_shapes: bool | None = None,
        fused: str | bool = "auto",
        part: int = 0,
    ) -> None:
        if not ranks_of(model).alone:
            raise ConfigError("a drafter runs beside a whole target: leave out draft or tp_plan.")
        super().__init__(model, attention, static_shapes, fused, part)
        # The drafter narrows its sight by layer, which flash cannot.
        own = self.attention == "triton" and attends(heads_of(drafter.config), self.device, drafter.dtype)
        self.drafter = Runner(drafter, "triton" if own else "sdpa", static_shapes=False, fused=fused)
        self.drafter.graphs = self.graphs  # what it costs is measured as it runs
        self.tap = FeatureTap(self.backbone, drafter.shape.layer_ids)
        if drafter.head is not None:
            self.after_token = AfterToken(drafter.head)

    def reserve(self, slots: int, capacity: int) -> None:
        super().reserve(slots, capacity)
        self.drafter.reserve(slots, capacity)

    def release(self) -> None:
        self.tap.clear()
        self.drafter.release()
        super().release()

    def rows_that_fit(self, needs: RowNeeds) -> int:
        ours, drafters = (bytes_per_position(model) for model in (self.model, self.drafter.model))
        return super().rows_that_fit(replace(needs, capacity=round(needs.capacity * (1 + drafters / ours))))

    def begin(self, slot: int, source: int, length: int) -> None:
        super().begin(slot, source, length)
        self.drafter.begin(slot, source, length)

    def measure_costs(self, rows: int, most: int, *, model: str = TARGET) -> CostCurve:
        """As of a single model; ``model`` says which."""
        return self.drafter.measure_costs(rows, most) if model == DRAFTER else super().measure_costs(rows, most)

    def attention_of(self, model: str) -> str:
        return self.drafter.attention if model == DRAFTER else self.attention

    def cache_of(self, model: str) -> SlotCache:
        return self.drafter.cache if model == DRAFTER else self.cache

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        wanted: torch.Tensor,
        visible: torch.Tensor,
        told: Mapping[str, torch.Tensor],
        frame: Frame,
        model: str = TARGET,
    ) -> torch.Tensor:
        if model == TARGET:
            return super().run(tokens, positions, wanted, visible, told, frame)
        with self.timed():
            context = AttentionContext.of(told, visible, frame, self.drafter.attention)
            if self.after_token is None:
                return self.drafter._answer(tokens, positions, wanted, context)
            hidden = self.drafter._hidden(tokens, positions, context)
            self.after_token.drafted = hidden.index_select(0, wanted.to(hidden.device))
            return self.drafter._logits(hidden, wanted)

    def ends(self, frame: Frame, keep: np.ndarray, slots: int, feeds_drafter: bool = False) -> dict[str, np.ndarray]:
        """For the drafter also: by query, where in its cache a leading one goes that is kept (``feed``); by slot, the
        place after those (``feed_end``), and the first query that is not kept (``query_end``).
        """
        ends = super().ends(frame, keep, slots)
        if not feeds_drafter:
            return ends
        cache, layout = self.drafter.cache, frame.layout
        stays = layout.local < keep[layout.row_of]
        by_slot = np.zeros((2, slots), dtype=np.int64)
        by_slot[0, layout.slots] = layout.slots * cache.capacity + cache.lengths[layout.slots] + keep
        by_slot[1, layout.slots] = layout.offsets + keep
        feed = frame.queries(np.where(stays, cache.destinations(layout), cache.scratch), cache.scratch)
        return {**ends, "feed": feed, "feed_end": by_slot[0], "query_end": by_slot[1]}

    def keep(self, told: Mapping[str, torch.Tensor], path: torch.Tensor | None) -> None:
        super().keep(told, path)
        if "feed" in told:
            with self.timed():
                self._hand_over(told, path)

    def _hand_over(self, told: Mapping[str, torch.Tensor], path: torch.Tensor | None) -> None:
        """Let the drafter absorb what has been added to the prefix: leading queries, then those of ``path``."""
        cache, places = self.drafter.cache, told["feed"]
        if path is not None and path.shape[1]:
            # One query more takes what stands for nothing.
            nobody, depth = len(places), numbers(path.shape[1], path.device)
            query = torch.where(path >= 0, told["query_end"].unsqueeze(1) + path, nobody)
            places = torch.nn.functional.pad(places, (0, 1))
            places = places.index_copy(0, query.flatten(), (told["feed_end"].unsqueeze(1) + depth).flatten())[:nobody]
        cache.write_to(places)
        model = self.drafter.model
        assert isinstance(model, DFlash)
        model.absorb(self.tap.features(), (places % cache.capacity).unsqueeze(0), cache)

    def commit(self, slots: np.ndarray, keep: np.ndarray, model: str = TARGET) -> None:
        """Target and drafter hold the same text; a draft keeps nothing."""
        self.cache.lengths[slots] += keep
        self.drafter.cache.lengths[slots] += keep

    def synchronize(self) -> None:
        super().synchronize()
        self.drafter.synchronize()
        self.model_seconds += self.drafter.model_seconds
        self.drafter.model_seconds = 0.0
