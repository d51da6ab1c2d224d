"""I-DLM: Qwen3 that stays token-causal; masks after the text, too, predict the next token (arXiv 2604.11035).

Published under SDAR's type and class, and told apart by ``use_regular_causal`` or its name; bundles of UNO, whose base
is an autoregressive model, likewise. Source: yifanyu/I-DLM-{8B,32B} and the IDLMPipeline of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3Config

from s2d2_lmeval.families.facts import Family
from s2d2_lmeval.families.known.sdar import causal_relative, qwen3


def defaults(block_length: int) -> dict[str, Any]:
    """The setting of the pipeline, with the stride of the paper."""
    return {
        "block_length": block_length,
        "window": max(block_length, 2),
        "temperature": 1.0,
        "do_sample": True,
        "top_k": 50,
        "top_p": 0.95,
    }


def _claims(config: Mapping[str, Any], source: str) -> bool:
    return config.get("model_type") == "sdar" and causal_relative(config, source) is not None


IDLM = Family(
    name="idlm",
    model_types=("idlm",),  # published as sdar
    claims=_claims,
    native_class="Qwen3ForCausalLM",
    config_class=Qwen3Config,
    config_map=qwen3,
    token_shift=True,
    window_causal=True,
    prefix_causal=True,
    scheme="strided",
    default_decoder="sliding",
    defaults=defaults,
    presets={"idlm": defaults(4), "idlm-strided": {**defaults(4), "decoder": "strided"}},
    published_mask_ids={151936: 151669},
    taken_for_granted=False,
    published_block_length=4,
    fixed_block_length=True,
    block_fields=(),  # block_size is that of a step of its training
)
