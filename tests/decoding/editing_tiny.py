"""Tiny random LLaDA2 models, and the requests and options that the editing decoders are tested with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from s2d2_lmeval import BlockDiffusionModel, DecodingConfig, load

from .drawn import MASK, POLICIES, SCORE, prompts
from .editing_oracle import EditingOptions
from .tiny import VOCABULARY

TARGETS = [("editing", None), *(("s2d2", policy) for policy in POLICIES)]


@cache
def tiny_model(seed: int = 0) -> Glm4MoeForCausalLM:
    """A plain transformers model on its stock attention, without experts (the recorded runs have them).

    The last id of its vocabulary is the mask token, which it predicts like any other.
    """
    config = Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_qk_norm=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        attn_implementation="sdpa",
    )
    model = Glm4MoeForCausalLM._from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        spread = 1.0 if "embed_tokens" in name else 0.64 if "lm_head" in name else 0.17
        weight.copy_(1 + 0.1 * noise if "norm" in name else spread * noise)
    return model.eval().requires_grad_(False)


def engine(seed: int = 0, max_batch: int = 8) -> BlockDiffusionModel:
    """The package's engine around :func:`tiny_model`, weights shared."""
    return load(tiny_model(seed), max_batch=max_batch, mask_token_id=MASK, block_length=4)


def engine_config(options: EditingOptions, **more: Any) -> DecodingConfig:
    """The oracle's options as a complete configuration of the engine."""
    values = {name: value for name, value in vars(options).items() if name != "stale_rows"}
    return DecodingConfig(**{**values, **more})


def oracle_options(config: DecodingConfig) -> EditingOptions:
    """A configuration of the engine as the oracle's options."""
    names = [field.name for field in fields(EditingOptions) if field.name != "stale_rows"]
    return EditingOptions(**{name: getattr(config, name) for name in names})


@dataclass(frozen=True)
class Case:
    """A request and how to decode it."""

    options: EditingOptions
    prompt: list[int]
    model_seed: int
    random_source: str
    seed: int
    request: int


@st.composite
def options(draw: st.DrawFn, decoder: str, policy: str | None = None) -> EditingOptions:
    """Options of ``decoder``; for s2d2 of one routing ``policy``."""
    block = draw(st.integers(1, 8))
    drawn: dict[str, Any] = {
        "decoder": decoder,
        "block_length": block,
        "denoising_steps": block,
        "max_new_tokens": draw(st.integers(0, 14)),
        "temperature": (temperature := draw(st.sampled_from([0.0, 0.6, 1.0, 1.7]))),
        "top_k": draw(st.sampled_from([0, 0, 4])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.8])),
        "do_sample": draw(st.booleans()) and temperature > 0,
        "confidence_threshold": draw(st.sampled_from([0.3, 0.5, 0.85])),
        "editing_threshold": draw(st.sampled_from([0.0, 0.2, 0.4, 0.9])),
        "max_post_steps": draw(st.integers(0, 4)),
        "num_to_transfer": draw(st.integers(1, 3)),
        "eos_early_stop": draw(st.booleans()),
        "stop_token_ids": tuple(draw(st.lists(st.integers(0, MASK - 1), max_size=2))),
        "suppress_mask_token": draw(st.sampled_from([True, True, False])),
    }
    if policy is not None:
        drawn["do_verify_policy"] = policy
        drawn["acceptance"] = draw(st.sampled_from(["stochastic", "stochastic", "greedy"]))
        drawn["ssd_ratio_tempering_factor"] = draw(st.sampled_from([0.5, 1.0, 2.0]))
        for name, values in {**POLICIES[policy], **SCORE}.items():
            drawn[name] = draw(values)
    return EditingOptions(**drawn)


@st.composite
def cases(draw: st.DrawFn, decoder: str, policy: str | None = None) -> Case:
    """A request with options, model and randomness."""
    return Case(
        options=draw(options(decoder, policy)),
        prompt=draw(prompts()),
        model_seed=draw(st.integers(0, 3)),
        random_source=draw(st.sampled_from(["keyed", "keyed", "fixed", "torch"])),
        seed=draw(st.integers(0, 2**31)),
        request=draw(st.integers(-3, 1000)),
    )
