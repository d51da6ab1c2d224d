"""The decoding options of pipelined blocks (D2F), under their published names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.decoding.options.blocks import divides
from s2d2_lmeval.decoding.options.option import option

_SCHEME = ("pipelined",)


@dataclass(frozen=True)
class PipelinedOptions:
    """Several open blocks at once."""

    block_add_threshold: float = option(
        0.1,
        "open the next block once this share of the last is decided",
        schemes=_SCHEME,
        low=0,
        high=1,
    )
    decoded_token_threshold: float = option(
        0.5,
        "fully activate a block once this share of the previous block is decided",
        schemes=_SCHEME,
        low=0,
        high=1,
    )
    margin_confidence: bool = option(
        False, "rank drafts by the margin of the best token over the second", schemes=_SCHEME
    )
    neg_entropy: bool = option(False, "rank drafts by the negative entropy of their distribution", schemes=_SCHEME)
    nucleus_first: bool = option(
        False,
        "filter by top_p before top_k, also for the argmax's probability, as published",
        schemes=_SCHEME,
    )


@dataclass(frozen=True)
class PipelinedVerifierOptions:
    """S2D2 on several open blocks."""

    target_block_size: int = option(1, "tokens per block of the verifier; 1: autoregressive", schemes=_SCHEME, low=1)
    min_tokens_per_step: int = option(
        1, "minimum tokens decided per step in a fully activated block", schemes=_SCHEME, low=0
    )
    ssd_partial_ar_span: int = option(
        0,
        "also accept runs of at least this many tokens after a rejection; 0: off",
        schemes=_SCHEME,
        low=0,
    )
    ssd_threshold_draft_confidence: bool = option(
        False,
        "accept only drafts more confident than draft_confidence_threshold",
        schemes=_SCHEME,
    )
    draft_confidence_threshold: float | None = option(
        None, "of ssd_threshold_draft_confidence; none: confidence_threshold", schemes=_SCHEME
    )
    verify_confidence_threshold: float | None = option(
        None,
        "replace a rejected token only if the verifier gives it this probability; none: always",
        schemes=_SCHEME,
    )

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        yield from divides("target_block_size", config.target_block_size, config)
