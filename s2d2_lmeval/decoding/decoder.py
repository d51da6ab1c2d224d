"""The interface of a decoder: its declared properties, and the methods that the batch loop calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.options.blocks import ScheduleOption
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.general import LogprobsOption
from s2d2_lmeval.decoding.passes import Plan, Sent
from s2d2_lmeval.decoding.state import SequenceState
from s2d2_lmeval.runtime.costs import MeasureCosts
from s2d2_lmeval.runtime.drafting.heads import AfterToken
from s2d2_lmeval.runtime.graphs import Tables
from s2d2_lmeval.runtime.shapes import power

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts


AUTOREGRESSIVE: dict[str, Any] = {
    "promise": "the model's own autoregressive law: one token at a time at block size one",
    "options": (ScheduleOption, LogprobsOption),
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
    ``prefill_chunk`` tokens of a prompt to a forward. Logits are of ``dtype``; what outlives a step lies in ``tables``.
    ``after_token`` is the runner's, for drafts whose head knows the tokens before.
    """

    config: DecodingConfig
    facts: Facts
    requests: Sequence[Request]
    slots: int
    tables: Tables
    prefill_chunk: int
    dtype: torch.dtype = torch.float32
    after_token: AfterToken | None = None

    @property
    def device(self) -> torch.device:
        """Where decisions are made."""
        return self.tables.device

    @property
    def longest(self) -> int:
        """Positions that the longest request takes, prompt and answer together."""
        return max(len(request.prompt) + request.max_new_tokens for request in self.requests)


class Kept:
    """The latest ``values`` (K, V) that a later step reads, if there is any ``use`` for them; in graphs at an address
    that changes only when more room is needed.
    """

    def __init__(self, setup: DecoderSetup, name: str, use: bool) -> None:
        self.setup, self.name, self.use = setup, name, use
        # A run may begin with graphs of the one before, which write without asking for room.
        self.values = setup.tables.found(name, torch.empty(0, device=setup.device))

    def put(self, values: torch.Tensor) -> None:
        """Keep ``values`` (K, V)."""
        if not self.use:
            return
        if not self.setup.tables.keep:
            self.values = values
            return
        if len(self.values) < len(values):
            self.values = self.setup.tables.room(self.name, (power(len(values)), values.shape[1]), values.dtype)
        self.values[: len(values)].copy_(values)


@dataclass
class Decided:
    """What the device part of a step ends with: the ``table`` (rows, C) of whole numbers that the host reads, if it is
    to read any, and the ``path`` (rows, D) of queries that become prefix if they are not just leading ones: how far
    each comes after the prefix that the plan keeps, -1 for none.
    """

    table: torch.Tensor | None
    path: torch.Tensor | None = None


RowsT = TypeVar("RowsT", bound=SequenceState)


class Decoder(ABC, Generic[RowsT]):
    """Decodes all rows in flight. A step is four calls: :meth:`plan` the next forward on the host, :meth:`assemble` its
    queries on the device, :meth:`decide` from its logits there, :meth:`settle` what was decided on the host. The two in
    the middle may be captured as a graph: they have fixed shapes, read nothing back, and what they leave for the next
    step is written in place, into the tables of the setup.

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
    def assemble(self, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens (N,) of the planned forward, and who sees whom (R, W, W)."""

    @abstractmethod
    def decide(self, sent: Sent, logits: torch.Tensor) -> Decided:
        """Take the wanted logits (M, V) of the planned forward, in its order; may write to them."""

    @abstractmethod
    def settle(self, table: np.ndarray | None) -> np.ndarray:
        """Bring the host's mirror up to date, from the table of :meth:`decide`. Returns how many positions of each
        active row (R,) became prefix by being accepted.

        Raises:
            NumericalError: the logits are not numbers.
        """
