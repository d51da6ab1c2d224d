"""What the tests of pipelined decoding have in common: recorded runs, tiny models, and options drawn by Hypothesis."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from s2d2_lmeval import BlockDiffusionModel, load

from .drawn import SCORE, prompts
from .pipelined_oracle import PipelinedOptions
from .tiny import engine_options

FAMILIES = ("llada", "dream")
VOCABULARY = 23
MASK = VOCABULARY - 1
DATA = Path(__file__).parent / "data"
# The loading tests keep the checkpoints that the recorded runs were made with.
CHECKPOINTS = {name: Path(__file__).parents[1] / "families" / "data" / name / "checkpoint" for name in FAMILIES}
RECORDED_MASK = 96
POLICIES = ("mask_span_length", "score_threshold", "score_hysteresis")


def recorded_runs(family: str) -> list[dict[str, Any]]:
    """Runs of the published functions: arguments and what came back."""
    return [json.loads(line) for line in (DATA / f"d2f_{family}_goldens.jsonl").read_text().splitlines()]


@cache
def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A plain transformers model in float64 whose confidences spread over 0.1 to 0.99; the last id is its mask."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_implementation": "sdpa",
    }
    native, config = {"llada": (LlamaForCausalLM, LlamaConfig), "dream": (Qwen2ForCausalLM, Qwen2Config)}[family]
    model = native._from_config(config(**sizes), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    spread = {"embed_tokens": 1.0, "lm_head": 0.65}
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        scale = next((value for key, value in spread.items() if key in name), 0.17)
        weight.data = 1 + 0.1 * noise if "norm" in name else scale * noise
    return model.eval().requires_grad_(False)


def engine(family: str, max_batch: int = 8, seed: int = 0) -> BlockDiffusionModel:
    """The package's engine around :func:`tiny_model`, weights shared."""
    plain = tiny_model(family, seed)
    mask = plain.config.vocab_size - 1
    return load(plain, family=family, max_batch=max_batch, mask_token_id=mask, block_length=4)


@dataclass(frozen=True)
class Case:
    """A request and how to decode it."""

    options: PipelinedOptions
    prompt: list[int]
    model_seed: int
    random_source: str
    seed: int
    request: int

    @property
    def config(self) -> dict[str, Any]:
        """For the engine."""
        return {**engine_options(self.options, "pipelined"), "random_source": self.random_source, "seed": self.seed}


VERIFICATION = {
    "acceptance": st.sampled_from(["stochastic", "stochastic", "greedy"]),
    "allow_resample": st.booleans(),
    "ssd_ratio_tempering_factor": st.sampled_from([0.5, 1.0, 2.0]),
    "min_ssd_span_length": st.integers(0, 5),
    "legacy_ssd_span_strategy": st.booleans(),
    "do_verify_score_threshold": st.sampled_from([-5.0, 0.0, 0.5, 1.5]),
    "hysteresis_threshold_on": st.sampled_from([0.5, 1.0, 2.0]),
    "hysteresis_threshold_off": st.sampled_from([-5.0, -1.0, 0.3]),
    "min_tokens_per_step": st.integers(0, 4),
    "ssd_partial_ar_span": st.integers(0, 3),
    "ssd_threshold_draft_confidence": st.booleans(),
    "draft_confidence_threshold": st.sampled_from([None, 0.2, 0.5]),
    "verify_confidence_threshold": st.sampled_from([None, 0.05, 0.3]),
    **SCORE,
}


@st.composite
def options(draw: st.DrawFn, decoder: str, policy: str = "mask_span_length") -> PipelinedOptions:
    """Options of ``decoder``; for s2d2 of one routing ``policy``."""
    block = draw(st.integers(1, 8))
    chosen: dict[str, Any] = {
        "decoder": decoder,
        "block_length": block,
        "max_new_tokens": draw(st.integers(0, 24)),
        "block_add_threshold": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "decoded_token_threshold": draw(st.sampled_from([0.0, 0.5, 0.8, 1.0])),
        "confidence_threshold": draw(st.sampled_from([0.3, 0.5, 0.9])),
        "margin_confidence": draw(st.sampled_from([False, False, True])),
        "neg_entropy": draw(st.sampled_from([False, False, True])),
        "temperature": (temperature := draw(st.sampled_from([0.0, 0.6, 1.0, 1.7]))),
        "top_k": draw(st.sampled_from([0, 0, 4])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.8])),
        "do_sample": draw(st.booleans()) and temperature > 0,
        "nucleus_first": draw(st.booleans()),
        "stop_token_ids": tuple(draw(st.lists(st.integers(0, MASK - 1), max_size=2))),
        "suppress_mask_token": draw(st.booleans()),
    }
    if decoder == "s2d2":
        chosen["do_verify_policy"] = policy
        chosen["target_block_size"] = draw(st.sampled_from([n for n in range(1, block + 1) if block % n == 0]))
        for name, values in VERIFICATION.items():
            chosen[name] = draw(values)
    return PipelinedOptions(**chosen)


@st.composite
def cases(draw: st.DrawFn, decoder: str, policy: str = "mask_span_length") -> Case:
    """A request with options, model and randomness."""
    return Case(
        options=draw(options(decoder, policy)),
        prompt=draw(prompts()),
        model_seed=draw(st.integers(0, 3)),
        random_source=draw(st.sampled_from(["keyed", "keyed", "fixed", "torch"])),
        seed=draw(st.integers(0, 2**31)),
        request=draw(st.integers(-3, 1000)),
    )
