"""Tiny random models whose confidences spread over 0.1 to 0.99, so that every threshold is met from both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from s2d2_lmeval import BlockDiffusionModel, DecodingConfig, load
from s2d2_lmeval.decoding.options.reading import names_of
from s2d2_lmeval.decoding.sampling import random as keyed

from .oracle import Draws, Options

DATA = Path(__file__).parent / "data"
VOCABULARY = 23


@cache
def tiny_model(
    vocabulary: int = VOCABULARY,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    hidden: int = 32,
    layers: int = 2,
    context: int = 256,
) -> Qwen3ForCausalLM:
    """A plain transformers model on its stock attention; the last id of its vocabulary is the mask token."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    scale = {"embed_tokens": 1.0, "lm_head": 0.45 * (64 / hidden) ** 0.5}
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=dtype)
        spread = next((value for key, value in scale.items() if key in name), 0.12 * (64 / hidden) ** 0.5)
        weight.data = 1 + 0.1 * noise if weight.dim() == 1 else spread * noise
    if seed % 2:  # every other model likes its mask token, which published code may predict
        model.lm_head.weight.data[vocabulary - 1] *= 2
    return model.eval().requires_grad_(False)


def engine(max_batch: int = 8, **model: object) -> BlockDiffusionModel:
    """The package's engine around :func:`tiny_model`, weights shared; a new one each time, for tests change them."""
    plain = tiny_model(**model)
    return load(plain, max_batch=max_batch, mask_token_id=plain.config.vocab_size - 1, block_length=4)


class KeyedDraws(Draws):
    """The package's keyed randomness: every number named by request, position, purpose and step, whatever the order."""

    def __init__(self, seed: int, request: int) -> None:
        self.keyed = keyed.KeyedSource(seed)
        self.request = request
        self.step = 0

    def _key(self, purpose: int, positions: Sequence[int]) -> keyed.Key:
        where = torch.tensor(list(positions))
        return keyed.Key(purpose, torch.full_like(where, self.request), where, torch.full_like(where, self.step))

    def draft(self, positions: Sequence[int], probabilities: torch.Tensor) -> torch.Tensor:
        return self.keyed.categorical(probabilities, self._key(keyed.DRAFT, positions))

    def accept(self, positions: Sequence[int]) -> torch.Tensor:
        needed = torch.ones(len(positions), dtype=torch.bool)
        return self.keyed.uniform(self._key(keyed.ACCEPT, positions), needed)

    def resample(self, position: int, probabilities: torch.Tensor) -> int:
        return int(self.keyed.categorical(probabilities[None], self._key(keyed.RESAMPLE, [position]))[0])


def engine_config(options: Options, **more: Any) -> DecodingConfig:
    """The oracle's options as a complete configuration of the engine."""
    values = {name: value for name, value in vars(options).items() if name != "stale_rows"}
    if options.decoder == "ar":
        values["block_length"] = values["denoising_steps"] = 1
    return DecodingConfig(**{**values, **more})


def engine_options(options: Options, scheme: str) -> dict[str, Any]:
    """The oracle's options as the engine's, without those of other decoders and schemes."""
    own = {field.name for field in DecodingConfig.fields() if scheme in field.metadata["schemes"]}
    own &= {*names_of(options.decoder)}
    return {name: value for name, value in vars(options).items() if name in own}


def oracle_options(config: DecodingConfig) -> Options:
    """A configuration of the engine as the oracle's options."""
    names = [field.name for field in fields(Options) if field.name != "stale_rows"]
    return Options(**{name: getattr(config, name) for name in names})
