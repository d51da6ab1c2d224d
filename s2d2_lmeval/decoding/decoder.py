"""The interface of a decoder: what the batch loop needs to know of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.readback import Outcome
from s2d2_lmeval.decoding.state import Seats
from s2d2_lmeval.runtime.costs import MeasureCosts
from s2d2_lmeval.runtime.passes import Pass

if TYPE_CHECKING:
    from typing_extensions import Self

    from s2d2_lmeval.families import Facts


@dataclass(frozen=True)
class Seating:
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


class Plan(Protocol):
    """The next forward of all active rows (R,)."""

    @property
    def request(self) -> Pass:
        """What to forward."""

    @property
    def phases(self) -> np.ndarray:
        """(R,) what each row does in it (:data:`~s2d2_lmeval.decoding.state.KIND_OF_PHASE`)."""

    @property
    def wanted_counts(self) -> np.ndarray:
        """(R,) logits that each row reads."""


class Decoder(Protocol):
    """Decodes all rows in flight: says what to forward, takes the logits, and moves every row on."""

    @property
    def rows(self) -> Seats:
        """The requests in flight."""

    @property
    def capacity(self) -> int:
        """Positions that a row may write to in the cache."""

    @classmethod
    def seat(cls, seating: Seating) -> Self:
        """A decoder with seats for a run."""

    def weigh(self, measure_costs: MeasureCosts) -> None:
        """Before the first request: a decoder with an option that is ``auto`` measures here what forwards cost."""

    def admitted(self, slot: int) -> None:
        """A request has been seated in ``slot``."""

    def plan(self) -> Plan:
        """Lay out the next forward of all active rows. Known on the host; nothing is read from the device."""

    def advance(self, logits: torch.Tensor) -> Outcome:
        """Take the wanted logits (M, V) of the planned forward, in its order; may write to them. Reads the device once.

        :raises NumericalError: when the logits are not numbers.
        """
