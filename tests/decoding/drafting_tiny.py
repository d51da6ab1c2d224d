"""Tiny random targets with drafters of every kind that matters: random, and one that always knows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config

from s2d2_lmeval import BlockDiffusionModel
from s2d2_lmeval.families import adopt
from s2d2_lmeval.runtime.drafting.dflash import DFlash, DrafterShape, DraftingRunner

from .tiny import tiny_model

BLOCK = 6


def drafter_for(model: PreTrainedModel, seed: int = 0, layer_ids: tuple[int, ...] = (0, 1), **shape: Any) -> DFlash:
    """A random drafter in the target's type."""
    layers = len(shape.get("windows", (None, None)))
    config = Qwen3Config(**{**model.config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    sees = {"windows": (None,) * layers, "causal": (False,) * layers, **shape}
    drafter = DFlash(DrafterShape(config, BLOCK, model.config.vocab_size - 1, layer_ids, **sees)).to(model.dtype)
    generator = torch.Generator().manual_seed(seed)
    for weight in drafter.parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=model.dtype)
        weight.data = 1 + 0.1 * noise if weight.dim() == 1 else 0.25 * noise
    return drafter.eval().requires_grad_(False).attach(model)


@cache
def pair(shifted: bool = True, seed: int = 0, max_batch: int = 8, **model: Any) -> BlockDiffusionModel:
    """A random target, autoregressive (shifted) or SDAR in its autoregressive mode, with a random drafter."""
    plain = tiny_model(**model)
    names = {"family": "qwen3"} if shifted else {"mask_token_id": plain.config.vocab_size - 1, "block_length": 4}
    native, facts = adopt(plain, **names)
    return with_drafter(native, facts, drafter_for(native, seed), max_batch)


def with_drafter(native: PreTrainedModel, facts: Any, drafter: DFlash, max_batch: int = 8) -> BlockDiffusionModel:
    facts = facts.with_drafter(drafter.shape.facts)
    return BlockDiffusionModel(native, facts, max_batch=max_batch, runner=DraftingRunner(native, drafter))
