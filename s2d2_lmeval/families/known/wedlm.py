"""WeDLM: Qwen3 (8B) or Qwen2 (7B) whose masks predict their own token under token-causal attention.

Source: tencent/WeDLM-{7B,8B}-{Base,Instruct} and its engine (Tencent/WeDLM).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families.config_map import is_whole, qwen2
from s2d2_lmeval.families.facts import Family
from s2d2_lmeval.families.known.sdar import qwen3


def defaults(block_length: int) -> dict[str, Any]:
    """The setting of its evaluations."""
    return {
        "block_length": block_length,
        "window": max(block_length, 2),
        "temperature": 0.0,
        "entropy_threshold": 0.4,
        "position_penalty": 0.02,
    }


def _has_norms(config: Mapping[str, Any]) -> bool:
    return bool(config.get("qk_norm", True))


def _qwen3(config: Mapping[str, Any]) -> Qwen3Config:
    _check(config, True)
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if config.get("head_dim") is None and is_whole(width, 1) and is_whole(heads, 1):
        config = {**config, "head_dim": width // heads}
    return qwen3(config)


def _qwen2(config: Mapping[str, Any]) -> Qwen2Config:
    _check(config, False)
    return qwen2(config)


def _check(config: Mapping[str, Any], norms: bool) -> None:
    """Norms of queries and keys go without biases, and the other way round."""
    if _has_norms(config) != norms or bool(config.get("attention_bias", not norms)) == norms:
        raise CheckpointError(
            f"config.json says qk_norm={config.get('qk_norm')!r} and attention_bias={config.get('attention_bias')!r}; "
            "WeDLM is published with the one or the other."
        )


def _family(name: str, norms: bool, config_class: type[PreTrainedConfig], config_map: Any) -> Family:
    return Family(
        name=name,
        model_types=("wedlm",) if norms else (),
        claims=lambda config, source: config.get("model_type") == "wedlm" and _has_norms(config) == norms,
        classes=("WeDLMForCausalLM", "WeDLMModel"),
        native_class=f"Qwen{3 if norms else 2}ForCausalLM",
        config_class=config_class,
        config_map=config_map,
        token_shift=True,
        draft_shift=False,
        window_causal=True,
        prefix_causal=True,
        scheme="reordered",
        default_decoder="sliding",
        defaults=defaults,
        presets={"wedlm": defaults(16), "wedlm-reordered": {**defaults(16), "decoder": "reordered"}},
        published_mask_ids={151936: 151665, 152064: 151665},
        taken_for_granted=False,
        published_block_length=16,
        fixed_block_length=True,
    )


WEDLM = (_family("wedlm", True, Qwen3Config, _qwen3), _family("wedlm_qwen2", False, Qwen2Config, _qwen2))
