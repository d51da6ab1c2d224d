"""The decoding options of windows after token-causal text, under their published names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.decoding.options.option import option


@dataclass(frozen=True)
class LinearOptions:
    """Drafts and verifications in turns (Nemotron-Labs-Diffusion)."""

    draft_threshold: float = option(
        0.0,
        "probability from which a draft's mask is filled, in as many forwards as it takes; 0: all of them in one",
        schemes=("seeded",),
        low=0.0,
        high=1.0,
    )


@dataclass(frozen=True)
class ThinkingOptions:
    """A budget for thoughts (Nemotron-Labs-Diffusion)."""

    max_thinking_tokens: int | None = option(
        None,
        "tokens of the answer after which end_think_token_id is put into the block, if it has not come before",
        schemes=("seeded",),
        low=0,
    )
    end_think_token_id: int | None = option(None, "the token that ends thoughts", schemes=("seeded",), low=0)

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        if (config.max_thinking_tokens is None) != (config.end_think_token_id is None):
            yield "max_thinking_tokens and end_think_token_id go together: give both, or neither."


@dataclass(frozen=True)
class StridedOptions:
    """Strided decoding (I-DLM)."""

    draft_tolerance: float = option(
        1.0,
        "factor on the draft's probability in the acceptance test; below 1 accepts more, and is not the model's law",
        schemes=("strided",),
        low=0.0,
    )


@dataclass(frozen=True)
class ReorderedOptions:
    """Windows whose decided tokens move to the front (WeDLM)."""

    entropy_threshold: float = option(
        0.4, "fill every mask of less entropy (nats), and at least the least", schemes=("reordered",), low=0.0
    )
    position_penalty: float = option(
        0.02, "entropy added per place after the window's first mask", schemes=("reordered",), low=0.0
    )
    whole_windows: bool = option(
        False,
        "decide a window whole before the next begins, and by confidence_threshold (0: one token a step), not entropy",
        schemes=("reordered",),
    )
