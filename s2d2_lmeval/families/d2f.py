"""The published D2F setting, which its LLaDA and Dream bases share.

Source: S2D2 README and command line defaults of its D2F scripts.
"""

from __future__ import annotations

from typing import Any

# D2F was trained with, and is published for, one block length; the base checkpoints know nothing of blocks.
BLOCK_LENGTH = 32

CAVEAT = (
    "decoded block by block, as D2F makes LLaDA and Dream by a LoRA adapter: give it as adapter=… (in --model_args: "
    "peft=…) unless it is in these weights already. Without it the model was trained to see the whole text at once, "
    "and answers worse than by its own method, which is not decoded here"
)


def defaults(block_length: int) -> dict[str, Any]:
    """Pipelined blocks with a token-causal verifier."""
    return {
        "block_length": block_length,
        "temperature": 0.0,
        "block_add_threshold": 0.5,
        "decoded_token_threshold": 0.8,
        "confidence_threshold": 0.9,
        "target_block_size": 1,
        "min_tokens_per_step": 1,
        "min_ssd_span_length": 1,
        "ssd_partial_ar_span": 0,
        "ssd_threshold_draft_confidence": False,
        "allow_resample": True,
    }
