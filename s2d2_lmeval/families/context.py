"""How many positions a checkpoint takes, and up to where its attention is what is computed here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families.config_map import is_number, is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LONGEST = 1 << 40
_BY_LENGTH = ("dynamic", "longrope")
_FULL = {"full_attention", "sliding_attention"}


def positions(native: PreTrainedConfig) -> tuple[int, int]:
    """The context that a checkpoint names, and the most that may be asked for.

    The latter is longer under yarn, whose frequencies were stretched to hold ``factor`` times the original context, and
    shorter where layers see a sliding window: they are run with full attention, which is the same inside the window.

    Raises:
        CheckpointError: rotary frequencies that depend on the longest text of a forward, or layers that neither see
            everything nor a window.
    """
    rope = native.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind in _BY_LENGTH:
        raise CheckpointError(
            f"config.json says rope_type={kind!r}, whose frequencies follow the longest text in a forward: an answer "
            "would depend on its neighbours. Evaluate it with `lm_eval --model hf`, one document at a time."
        )
    named = int(native.max_position_embeddings)
    stretched = _stretched(rope, named) if kind == "yarn" else named
    return named, int(min(max(named, stretched), _window(native)))


def _stretched(rope: Mapping[str, Any], named: int) -> int:
    length = 1.0
    given = {"factor": 1.0, "original_max_position_embeddings": named, **rope}
    for name in ("factor", "original_max_position_embeddings"):
        value = given[name]
        if not is_number(value) or not 0 < value < _LONGEST:
            raise CheckpointError(f"config.json says {name}={value!r} for yarn; a positive number is needed.")
        length *= value
    return int(length)


def _window(native: PreTrainedConfig) -> int | float:
    """Positions up to which every layer sees everything before it."""
    kinds = {str(kind) for kind in getattr(native, "layer_types", None) or ()}
    if kinds - _FULL:
        raise CheckpointError(
            f"config.json has layers of type {', '.join(sorted(kinds - _FULL))}, and decoding here takes "
            "layers that see everything before them."
        )
    slides = not kinds or "sliding_attention" in kinds
    names = [*(["sliding_window"] if slides else []), "attention_chunk_size"]
    windows = {name: getattr(native, name, None) for name in names}
    for name, window in windows.items():
        if window is not None and not is_whole(window, 1):
            raise CheckpointError(f"config.json says {name}={window!r}; a positive integer is needed.")
    return min((window for window in windows.values() if window is not None), default=math.inf)
