"""Models for benchmarks: the shapes of published checkpoints with random weights, and scripts that replace the logits.

Timings of speculative decoders are meaningless on random weights, which accept nothing. Here the full model runs, and
its logits are then replaced: every position has one correct token. A query that sees other masks is a draft: it gives
that token confidently with the requested probability, or else a wrong one with low confidence. All other queries always
give the correct token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from s2d2_lmeval.decoding.sampling.random import Key, KeyedSource
from s2d2_lmeval.families import adopt
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.runtime.attention import AttentionContext
from s2d2_lmeval.runtime.drafting.dflash import DFlash, DrafterShape, DraftingRunner
from s2d2_lmeval.runtime.runner import Runner

SHAPES: dict[str, dict[str, Any]] = {
    "sdar-100m": {
        "hidden_size": 640,
        "intermediate_size": 1920,
        "num_hidden_layers": 12,
        "vocab_size": 32000,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "sdar-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "vocab_size": 151936,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "sdar-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
"""Name -> Qwen3 configuration. ``sdar-8b`` and ``sdar-1.7b`` are those of JetLM's SDAR checkpoints; ``sdar-100m`` keeps
their proportions for a CPU.
"""

DRAFTER_LAYERS, DRAFTER_BLOCK, FEATURES = 5, 16, 5
"""Layers and block of the published DFlash drafters, and how many layers of their target they read."""

SURE, UNSURE = 0.97, 0.5
"""Probability of a drafted token that is right, and of one that is wrong."""


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A plain transformers model of the shape ``name`` with random weights and its last id as the mask token."""
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    config = Qwen3Config(
        **SHAPES[name],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rope_parameters=rope,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_drafter(target: PreTrainedModel) -> DFlash:
    """A drafter with random weights for ``target``: almost nothing that it drafts is accepted."""
    config, layers = target.config, min(DRAFTER_LAYERS, target.config.num_hidden_layers)
    own = Qwen3Config(**{**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    read = torch.linspace(0, config.num_hidden_layers - 1, min(FEATURES, config.num_hidden_layers)).long().tolist()
    sees = {"windows": (None,) * layers, "causal": (False,) * layers}
    shape = DrafterShape(own, DRAFTER_BLOCK, config.vocab_size - 1, tuple(read), **sees)
    with torch.device(target.device):
        drafter = DFlash(shape).to(target.dtype)
    for weight in drafter.parameters():
        weight.data.fill_(1) if weight.dim() == 1 else weight.data.normal_(std=0.02)
    return drafter.eval().requires_grad_(False).attach(target)


def with_random_drafter(plain: PreTrainedModel) -> BlockDiffusionModel:
    """``plain`` as an autoregressive target, beside a random drafter."""
    target, facts = adopt(plain, autoregressive=True)
    drafter = random_drafter(target)
    facts = facts.with_drafter(drafter.shape.facts)
    return BlockDiffusionModel(target, facts, runner=DraftingRunner(target, drafter))


class Script:
    """What each position says. ``rate`` is the share of drafted tokens that are right."""

    def __init__(self, rate: float, vocabulary: int, seed: int = 0) -> None:
        self.rate = rate
        # The upper half of a vocabulary holds its special tokens; a script never ends an answer.
        self.words = vocabulary // 2
        self.heights = tuple(math.log(p / (1 - p) * (vocabulary - 1)) for p in (SURE, UNSURE))
        self.source = KeyedSource(seed)

    def logits(
        self, like: torch.Tensor, position: torch.Tensor, draft: torch.Tensor, draw: torch.Tensor
    ) -> torch.Tensor:
        """Scripted logits, shaped as ``like`` (M, V).

        ``position`` (M,); ``draft`` (M,) bool; ``draw`` (M,) tells repeated drafts of a position apart.
        """
        right = (self._uniform(1, position, torch.zeros_like(position)) * self.words).long()
        misses = draft & (self._uniform(2, position, draw) >= self.rate)
        token = torch.where(misses, (right + 1) % self.words, right)
        sure, unsure = self.heights
        height = torch.where(misses, unsure, sure).to(like.dtype)
        return torch.zeros_like(like).scatter_(1, token.unsqueeze(1), height.unsqueeze(1))

    def _uniform(self, purpose: int, position: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        return self.source.uniform(Key(purpose, torch.zeros_like(position), position, draw), position >= 0)


class ScriptedRunner(Runner):
    """Runs every pass in full, then answers by a script."""

    script: Script
    mask_token_id: int

    def _answer(
        self, tokens: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        masks = context.padded(tokens == self.mask_token_id)
        seen = (context.visible & masks.unsqueeze(1)).sum(-1).flatten()
        start = context.lengths.repeat_interleave(context.widest, output_size=seen.numel())
        if context.gather is not None:
            seen, start = seen[context.gather], start[context.gather]
        logits = super()._answer(tokens, positions, wanted, context)
        return self.script.logits(logits, positions[wanted], seen[wanted] > 1, start[wanted])


def follow_script(model: BlockDiffusionModel, script: Script) -> BlockDiffusionModel:
    """A model on the same weights that answers by ``script``."""
    runner = ScriptedRunner(model.hf_model, model.attention, fused=model.fused)
    runner.script, runner.mask_token_id = script, model.facts.mask_token_id
    return BlockDiffusionModel(
        model.hf_model, model.facts, max_batch=model.max_batch, max_context=model.max_context, runner=runner
    )
