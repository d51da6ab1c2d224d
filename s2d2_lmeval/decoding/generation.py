"""What goes into the batch loop and what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NOTHING, ACCEPTED, RESAMPLED, RATIO, HIGH_CONFIDENCE, DENOISED, KEPT, AUTOREGRESSIVE, EDITED = range(9)
"""How a place was decided in a step: the marks of :class:`Step`."""

MARK_NAMES = ("", "accepted", "resampled", "ratio", "high confidence", "denoised", "kept", "autoregressive", "edited")

PublishedStep = list[int | float | str] | dict[str, list[Any]]
"""An entry of the published decoding order: positions; where tokens are edited, ``edit`` and ``unmask`` of a step."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    ``key`` names the request's randomness. ``stop`` is asked after each finished block with every new token so far, and
    answers how many of them to keep (decoding stops there) or None.
    """

    prompt: list[int]
    max_new_tokens: int
    key: int = 0
    stop: Callable[[list[int]], int | None] | None = None


@dataclass(frozen=True)
class Step:
    """One draft or verification of one request.

    ``start`` is the block's first position; ``before``, ``draft`` and ``tokens`` are the block's ids before the step,
    with every mask drafted, and after the step; ``marks`` says how each place was decided in it (:data:`MARK_NAMES`; 0
    where it was not).
    """

    kind: str
    start: int
    before: list[int]
    draft: list[int]
    tokens: list[int]
    marks: list[int]


@dataclass(frozen=True)
class Generation:
    """The answer to a request.

    ``token_ids`` are the new tokens up to the stop or the limit; ``finish_reason`` is ``stop`` (a stop token),
    ``stop_string`` (the request's own rule) or ``length``; ``canvas`` holds the prompt and every decided block
    untrimmed.
    """

    token_ids: list[int]
    finish_reason: str
    stats: dict[str, float]
    decoding_order: list[PublishedStep]
    steps: list[Step]
    canvas: list[int]


FORWARDS = ("prefill", "draft", "verify", "commit", "drafter")
"""What a forward does for a request; ``drafter`` is a forward of a drafter beside the model."""


@dataclass
class Progress:
    """A request on its way: counters, steps and the published decoding order, filled in as forwards come back."""

    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORWARDS, 0))
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    blocks: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """What only some decoders count."""
    begun: float = field(default_factory=time.perf_counter)
    steps: list[Step] = field(default_factory=list)
    decoding_order: list[PublishedStep] = field(default_factory=list)

    def count(self, name: str, more: int) -> None:
        """Add ``more`` to a count of the decoder's own."""
        self.counts[name] = self.counts.get(name, 0) + more

    def stats(self, new_tokens: int) -> dict[str, float]:
        """The request's statistics. ``nfe`` counts every forward that it took part in."""
        nfe = sum(self.forwards.values())
        return {
            "nfe": nfe,
            "new_tokens": new_tokens,
            "tokens_per_forward": new_tokens / nfe if nfe else 0.0,
            **{f"{kind}_forwards": count for kind, count in self.forwards.items()},
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else 0.0,
            "routed": self.forwards["verify"] / self.drafts if self.drafts else 0.0,
            "blocks": self.blocks,
            **self.counts,
            "seconds": time.perf_counter() - self.begun,
        }
