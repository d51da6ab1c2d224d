"""Hypothesis strategies for sub-blocks, and a tiny model of a shifted family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from s2d2_lmeval import BlockDiffusionModel, Generation, load

from .drawn import POLICIES, SCORE
from .oracle_inputs import Result
from .oracle_loop import draws_of
from .subblocks_oracle import SubblockOptions, SubblockOracle
from .tiny import KeyedDraws, engine_options

VOCABULARY = 23
MASK = VOCABULARY - 1


@cache
def shifted_model(seed: int = 0, layers: int = 2, vocabulary: int = VOCABULARY, context: int = 256) -> Qwen2ForCausalLM:
    """A plain transformers model on its stock attention, its confidences spread over 0.1 to 0.99."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            weight.data = 1 + 0.1 * noise
        else:
            weight.data = noise * (1.0 if "embed" in name else 0.64 if "lm_head" in name else 0.17)
    return model.eval().requires_grad_(False)


def engine(seed: int = 0, layers: int = 2, max_batch: int = 8, vocabulary: int = VOCABULARY) -> BlockDiffusionModel:
    """The package's engine around :func:`shifted_model`, weights shared."""
    plain = shifted_model(seed, layers, vocabulary)
    return load(plain, family="fast_dllm_v2", max_batch=max_batch, mask_token_id=vocabulary - 1, block_length=8)


@dataclass(frozen=True)
class Case:
    """A request and how to decode it."""

    options: SubblockOptions
    prompt: list[int]
    model_seed: int
    random_source: str
    seed: int
    request: int

    def engine_options(self, **others: Any) -> dict[str, Any]:
        """The options as the engine's, without those of other decoders."""
        options = engine_options(self.options, "subblock")
        source = {"random_source": self.random_source, "seed": self.seed}
        return {**options, **source, "trim_stop_tokens": False, **others}

    def by_oracle(self) -> tuple[Result, list[int]]:
        """What the definition says: the run, and the answer."""
        draws = draws_of(self.random_source, KeyedDraws(self.seed, self.request))
        model = shifted_model(self.model_seed)  # its random initialisation draws
        torch.manual_seed(self.seed)
        oracle = SubblockOracle(model, self.options, draws, MASK)
        return oracle.run(self.prompt), oracle.new_tokens()

    def by_engine(self, **others: Any) -> Generation:
        """What the engine answers; ``others`` are further options."""
        model = engine(self.model_seed)
        torch.manual_seed(self.seed)
        return model.generate([self.prompt], self.engine_options(**others), seeds=[self.request])[0]


@st.composite
def options(draw: st.DrawFn, decoder: str, policy: str | None = None) -> SubblockOptions:
    """Options of ``decoder``; for s2d2 of one routing ``policy``."""
    part = draw(st.integers(1, 4))
    draft_ver = draw(st.booleans())
    fixed: dict[str, Any] = {
        "decoder": decoder,
        "small_block_size": part,
        "block_length": part * draw(st.integers(1, 3)),
        "use_block_cache": not draft_ver and draw(st.booleans()),
        "max_new_tokens": draw(st.integers(0, 16)),
        "temperature": (temperature := draw(st.sampled_from([0.0, 0.6, 1.0, 1.7]))),
        "top_k": draw(st.sampled_from([0, 0, 4])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.8])),
        "do_sample": draw(st.booleans()) and temperature > 0,
        "confidence_threshold": draw(st.sampled_from([0.3, 0.5, 0.85])),
        "stop_token_ids": tuple(draw(st.lists(st.integers(0, MASK - 1), max_size=2))),
        "cache_ver": draw(st.booleans()),
        "draft_ver": draft_ver,
        "suppress_mask_token": draw(st.booleans()),
        "sample_first_token": draw(st.booleans()),
    }
    if decoder == "s2d2":
        assert policy is not None
        fixed["do_verify_policy"] = policy
        fixed["acceptance"] = draw(st.sampled_from(["stochastic", "stochastic", "greedy"]))
        fixed["allow_resample"] = draw(st.booleans())
        fixed["ssd_ratio_tempering_factor"] = draw(st.sampled_from([0.5, 1.0, 2.0]))
        for name, values in {**POLICIES[policy], **SCORE}.items():
            fixed[name] = draw(values)
    return SubblockOptions(**fixed)


@st.composite
def cases(draw: st.DrawFn, decoder: str, policy: str | None = None, longest_prompt: int = 26) -> Case:
    """A request with options, model and randomness."""
    return Case(
        options=draw(options(decoder, policy)),
        prompt=draw(st.lists(st.integers(0, MASK - 1), min_size=1, max_size=longest_prompt)),
        model_seed=draw(st.integers(0, 3)),
        random_source=draw(st.sampled_from(["keyed", "keyed", "fixed", "torch"])),
        seed=draw(st.integers(0, 2**31)),
        request=draw(st.integers(-3, 1000)),
    )
