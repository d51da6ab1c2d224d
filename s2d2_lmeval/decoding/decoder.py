"""The interface of a decoder: its declared properties, and the methods that the batch loop calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.options.blocks import ScheduleOption
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.passes import Plan
from s2d2_lmeval.decoding.state import SequenceState
from s2d2_lmeval.decoding.steps import Outcome
from s2d2_lmeval.runtime.costs import MeasureCosts

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts


AUTOREGRESSIVE: dict[str, Any] = {
    "promise": "the model's own autoregressive law: one token at a time at block size one",
    "options": (ScheduleOption,),
    "strategy": "sequential",
    # At block size one all attention is token-causal.
    "imposes": {"block_length": 1, "denoising_steps": 1, "cache_ver": True, "draft_ver": True},
}
"""The properties of ``ar``, for all of its implementations."""

EXACT = " (tested in float32 and float64; in bfloat16 and float16 near-ties can fall either way)"
"""The caveat on guarantees that one decoder's output equals another's."""


@dataclass(frozen=True)
class DecoderSetup:
    """What a run needs of its decoder: ``slots`` rows, each with room for any of ``requests``, which bring at most
    ``prefill_chunk`` tokens of a prompt to a forward.
    """

    config: DecodingConfig
    facts: Facts
    requests: Sequence[Request]
    slots: int
    device: torch.device
    prefill_chunk: int

    @property
    def longest(self) -> int:
        """Positions that the longest request takes, prompt and answer together."""
        return max(len(request.prompt) + request.max_new_tokens for request in self.requests)


RowsT = TypeVar("RowsT", bound=SequenceState)


class Decoder(ABC, Generic[RowsT]):
    """Decodes all rows in flight: plans the next forward, takes its logits, and advances every row.

    A class declares what users, docs and the engine need to know about it when it registers:
    ``@DECODERS.register("name", "scheme", promise=…, options=…)`` (:class:`~s2d2_lmeval.registry.DecoderEntry`).
    """

    rows: RowsT
    """The requests in flight."""

    @abstractmethod
    def __init__(self, setup: DecoderSetup) -> None:
        """A decoder with its rows for a run."""

    @staticmethod
    def layout(config: DecodingConfig) -> str:
        """How much is decoded at once, and in which schedule, in a few words."""
        return f"schedule {config.schedule}, blocks of {config.block_length}"

    @staticmethod
    def caution(config: DecodingConfig) -> str | None:
        """A caveat on the counts of a run, in one sentence, or None."""
        return None

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Positions that a row may write to in the cache."""

    @property
    def most_logits(self) -> tuple[int, int]:
        """Logits that each of the rows in flight reads of one forward, at most, and from how many of them tokens are
        drawn at once. ``max_batch=auto`` plans memory by it.
        """
        return 64, 64

    def calibrate_costs(self, measure_costs: MeasureCosts) -> None:
        """Called before the first request: a decoder with an option set to ``auto`` measures forward costs here."""

    def admitted(self, slot: int) -> None:
        """A request has been admitted to ``slot``."""

    @abstractmethod
    def plan(self) -> Plan:
        """Plan the next forward of all active rows, on the host, without reading from the device."""

    @abstractmethod
    def advance(self, logits: torch.Tensor) -> Outcome:
        """Take the wanted logits (M, V) of the planned forward, in its order; may write to them. Reads the device once.

        Raises:
            NumericalError: the logits are not numbers.
        """
