"""Dream: Qwen2 whose logits are shifted by one token, the second base of D2F.

Source: Dream-org/Dream-v0-*; settings from the S2D2 README.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2Config

from s2d2_lmeval.families import d2f
from s2d2_lmeval.families.config_map import qwen2
from s2d2_lmeval.families.facts import Family


def defaults(block_length: int) -> dict[str, Any]:
    """D2F's setting with the stricter acceptance that was published for Dream."""
    return {
        **d2f.defaults(block_length),
        "ssd_threshold_draft_confidence": True,
        "draft_confidence_threshold": 0.5,
        "allow_resample": False,
    }


def _doubt(config: Mapping[str, Any], source: str) -> str | None:
    if config.get("block_size") is None:
        return None
    return f"says block_size={config['block_size']!r}, as DreamReasoner does; Dream knows no blocks"


DREAM = Family(
    name="dream",
    model_types=("Dream",),
    classes=("DreamModel", "DreamBaseModel"),
    doubt=_doubt,
    native_class="Qwen2ForCausalLM",
    config_class=Qwen2Config,
    config_map=qwen2,
    token_shift=True,
    block_alignment="prompt",
    scheme="pipelined",
    defaults=defaults,
    presets={"d2f-dream": defaults(d2f.BLOCK_LENGTH)},
    published_mask_ids={152064: 151666},
    published_block_length=d2f.BLOCK_LENGTH,
    caveat_without_adapter=d2f.CAVEAT,
    fixed_block_length=True,
)
