"""What the oracle takes and gives: randomness as an argument, options under their published names, the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """What a caller may inject: draws in the order in which the decoder asks for them."""

    def uniform(self, n: int) -> Tensor: ...

    def categorical(self, probabilities: Tensor) -> Tensor: ...


class TorchSource:
    """The global CPU generator, one call per draw."""

    def uniform(self, n: int) -> Tensor:
        return torch.rand(n)

    def categorical(self, probabilities: Tensor) -> Tensor:
        return torch.multinomial(probabilities, 1).view(-1)


class FixedSource:
    """Every uniform is one half, every categorical draw the most likely token."""

    def uniform(self, n: int) -> Tensor:
        return torch.full((n,), 0.5)

    def categorical(self, probabilities: Tensor) -> Tensor:
        return probabilities.argmax(-1)


class Draws:
    """What the decoder asks: draws by purpose, absolute position and step of the block. Here only the order counts."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.step = 0

    def draft(self, positions: Sequence[int], probabilities: Tensor) -> Tensor:
        return self.source.categorical(probabilities)

    def accept(self, positions: Sequence[int]) -> Tensor:
        return self.source.uniform(len(positions))

    def resample(self, position: int, probabilities: Tensor) -> int:
        return int(self.source.categorical(probabilities[None])[0])


@dataclass(frozen=True)
class Options:
    """The published option names, plus those that the published code does not have."""

    decoder: str = "s2d2"  # s2d2, static, dynamic, sequential, entropy_bounded, ar
    max_new_tokens: int = 32
    block_length: int = 4
    denoising_steps: int = 4
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = False
    remasking_strategy: str = "low_confidence_dynamic"
    confidence_threshold: float = 0.85
    eb_threshold: float | None = None
    collapse_entropy: bool = False
    stop_token_ids: tuple[int, ...] = ()
    cache_ver: bool = False
    draft_ver: bool = False
    min_ssd_span_length: int = 1
    legacy_ssd_span_strategy: bool = False
    ssd_ratio_tempering_factor: float = 1.0
    ssd_ratio_threshold: float = -1.0
    ssd_threshold_all_spans: bool = False
    always_check_high_confidence: bool = False
    allow_resample: bool = True
    acceptance: str = "stochastic"
    do_verify_policy: str = "mask_span_length"
    do_verify_score_threshold: float = -1.0
    hysteresis_threshold_on: float = 0.0
    hysteresis_threshold_off: float = -1.0
    do_verify_score_type: str = "difference_dynamic"
    score_penalty_coef: float = 2.0
    token_acceptance_estimator: str = "hard_margin_threshold"
    ssd_confidence_margin_threshold: float = 0.05
    ssd_entropy_temperature: float = 1.0
    ssd_entropy_threshold: float = 0.5
    ssd_confidence_power: float = 1.0
    ssd_confidence_margin_coef: float = 1.0
    ucb_beta: float = 1.0
    ucb_span_length_bins: int = 2
    ucb_block_progress_bins: int = 2
    ucb_entropy_bins: int = 2
    ucb_entropy_source: str = "span"
    suppress_mask_token: bool = True
    nucleus_first: bool = False  # D2F: nucleus before top-k, and both at temperature zero too
    stale_rows: bool = False  # as published: with draft_ver alone, a block is committed under its last draft's rows

    @property
    def strategy(self) -> str:
        """How a step without verification chooses positions."""
        named = {"static": "low_confidence_static", "dynamic": "low_confidence_dynamic", "ar": "low_confidence_static"}
        return self.remasking_strategy if self.decoder == "s2d2" else named.get(self.decoder, self.decoder)


@dataclass
class Result:
    """What a run produced; ``canvas`` is the prompt and every block that was begun, masks included."""

    canvas: list[int]
    prompt_length: int
    decoding_order: list[list[Any]] = field(default_factory=list)
    forwards: Counter[str] = field(default_factory=Counter)
    stopped: bool = False

    @property
    def nfe(self) -> int:
        return self.forwards.total()

    def new_tokens(self, stop_token_ids: Sequence[int], limit: int | None = None) -> list[int]:
        """The new tokens before the first stop id, at most ``limit`` of them."""
        new = self.canvas[self.prompt_length :][:limit]
        cut = next((i for i, token in enumerate(new) if token in stop_token_ids), len(new))
        return new[:cut]
