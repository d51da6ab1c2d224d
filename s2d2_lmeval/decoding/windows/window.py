"""What the decoders of windows share: the prompt first, then a window of tokens and masks after the text, in every
forward of a row; the host holds a mirror of it.

A row's forward is either a chunk of its prompt, or its window, which subclasses lay out. After one read of the device
every row moves on by itself.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import Decided, Decoder, DecoderSetup
from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.passes import Cells, PassBuilder, Plan, Sent
from s2d2_lmeval.decoding.sampling import laws, random
from s2d2_lmeval.decoding.sampling.filters import filtered
from s2d2_lmeval.decoding.state import DRAFT, KIND_OF_PHASE, PREFILL, SequenceState
from s2d2_lmeval.decoding.steps import pack
from s2d2_lmeval.errors import NumericalError
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, by_reach


class WindowRows(SequenceState):
    """Sequences in flight and the window of each: ``window`` (count, W) tokens, the mask where none is decided."""

    def __init__(self, setup: DecoderSetup, width: int) -> None:
        super().__init__(setup.slots)
        self.prefix_grain = 1
        self.mask_token_id = setup.facts.mask_token_id
        self.device = setup.device
        self.length = setup.longest
        self.limit = np.zeros(self.count, dtype=np.int64)
        """Maximum length of the sequence."""
        self.step = np.zeros(self.count, dtype=np.int64)
        """Forwards of the window so far."""
        self.window = np.full((self.count, width), self.mask_token_id, dtype=np.int64)

    def admit(self, slot: int, request: Request) -> None:
        """Take a request; its window is empty."""
        super().admit(slot, request)
        self.tokens[slot] = list(request.prompt)
        self.limit[slot] = len(request.prompt) + request.max_new_tokens
        self.step[slot] = 0
        self.window[slot] = self.mask_token_id

    def lengths(self) -> np.ndarray:
        """(count,) tokens of every sequence, prompt included."""
        return np.array([len(tokens) for tokens in self.tokens])


class WindowDecoder(Decoder[WindowRows]):
    """A decoder with one window per row."""

    seeds: ClassVar[bool] = True
    """Whether the text's last row gives the token that the window begins with."""

    def __init__(self, setup: DecoderSetup, width: int) -> None:
        self.config = setup.config
        self.rows = WindowRows(setup, width)
        self.prefill_chunk = setup.prefill_chunk
        self.source = random.source_of(self.config.random_source, self.config.seed)
        self.vocab_size = setup.facts.vocab_size
        self.law_size = laws.entry_size(self.config)
        self.gated = setup.facts.draft_adapter is not None
        """Whether draft queries go through an adapter: those with ``gated`` set."""

    @property
    def capacity(self) -> int:
        return self.rows.length + 2 * self.rows.window.shape[1]

    @property
    def most_logits(self) -> tuple[int, int]:
        return (self.rows.window.shape[1],) * 2

    def plan(self) -> Plan:
        rows, slots = self.rows, self.rows.active()
        prefilling = rows.phase[slots] == PREFILL
        cached = rows.cached[slots]
        texts = np.minimum(rows.prompt[slots] - cached, self.prefill_chunk) * prefilling
        builder = PassBuilder(slots)
        pieces = [rows.tokens[slot][start : start + n] for slot, start, n in zip(slots, cached, texts, strict=True)]
        text = builder.span(cached, texts)
        text.set(token=np.concatenate(pieces), rank=text.local, reach=text.local)
        keep = texts + self._lay_out(builder, slots, ~prefilling)
        builder.lay_out()
        due = np.flatnonzero(prefilling & (cached + texts == rows.prompt[slots]) & self.seeds)
        builder.read("first", due, np.zeros_like(due), builder.layout.offsets[due] + texts[due] - 1)
        self._read(builder, slots)
        facts = {"length": rows.lengths(), "key": rows.key, "step": rows.step, "window": rows.window}
        self._plan = builder.plan(
            rows.phase[slots].copy(),
            keep,
            rows.window.shape[1],
            queries={"token": builder.column("token"), **({"gated": builder.column("gated")} if self.gated else {})},
            tables={"rank": (0, NOBODY), "reach": (0, NOTHING)},
            rows={**facts, **self._facts()},
        )
        return self._plan

    @abstractmethod
    def _lay_out(self, builder: PassBuilder, slots: np.ndarray, among: np.ndarray) -> np.ndarray:
        """Add the windows of the active rows ``among`` (R,), with ``position``, ``token``, ``rank`` and ``reach``.
        Returns how many leading queries stay, whatever the logits (R,).
        """

    @abstractmethod
    def _read(self, builder: PassBuilder, slots: np.ndarray) -> None:
        """Request the window's logits."""

    def _facts(self) -> dict[str, np.ndarray]:
        """What else the device needs of every row."""
        return {}

    # ---- device ----

    def assemble(self, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        return sent["token"], by_reach(sent["rank"], sent["reach"])

    def decide(self, sent: Sent, logits: torch.Tensor) -> Decided:
        if not sent.present:  # prefill chunks only
            return Decided(None)
        if self.config.suppress_mask_token:
            logits[:, self.rows.mask_token_id] = -torch.inf
        sound = ~logits.isnan().any().expand(self.rows.count, 1)
        seeds, kept = Cells.like(sent["window"]), Cells.of_entries(sent["window"], self.law_size)
        if sent.has("first"):
            (slots, _), first = sent.at("first"), logits[sent.part("first")]
            tokens = self._choose(sent, first, slots, sent["length"][slots])
            seeds.put(sent.cells("first"), tokens)
            self._keep(kept, sent.cells("first"), first, tokens)
        return Decided(pack([sound, seeds.table[:, :1], laws.as_bits(kept.table[:, :1]), *self._decide(sent, logits)]))

    def _keep(self, kept: Cells, cells: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write the entries of ``tokens`` (M,) under ``logits`` (M, V) to ``cells`` (M,), if they are kept."""
        if self.law_size:
            kept.put(cells, laws.entries(self._law(logits), tokens, self.law_size))

    def _law(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` (M, V) of what tokens are chosen by."""
        return filtered(logits, self.config) if self.config.sampled else logits

    @abstractmethod
    def _decide(self, sent: Sent, logits: torch.Tensor) -> list[torch.Tensor]:
        """Decide about the windows, from the ``logits`` (M, V): columns (count, any) for the host."""

    def _choose(self, sent: Sent, logits: torch.Tensor, slots: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The tokens (M,) that ``ar`` takes at ``position`` (M,) of the rows ``slots`` (M,), given their ``logits``."""
        if not self.config.sampled:
            return logits.argmax(-1)
        key = random.Key(random.DRAFT, sent["key"][slots], position, torch.zeros_like(position))
        return self.source.categorical(self._law(logits).softmax(-1), key)

    # ---- host ----

    def settle(self, table: np.ndarray | None) -> np.ndarray:
        rows, plan = self.rows, self._plan
        slots = plan.layout.slots
        kept = np.zeros(len(slots), dtype=np.int64)
        rows.cached[slots] += plan.keep
        for row, slot in enumerate(slots.tolist()):
            rows.progress[slot].forwards[KIND_OF_PHASE[plan.phases[row]]] += 1
            if table is not None and not table[slot, 0]:
                raise NumericalError
            if plan.phases[row] != PREFILL:
                assert table is not None
                rows.step[slot] += 1
                kept[row] = self._after_window(slot, int(plan.phases[row]), table[slot, 2 + self.law_size :])
                rows.cached[slot] += kept[row]
            elif rows.cached[slot] == rows.prompt[slot]:
                rows.phase[slot] = DRAFT
                if self.seeds:
                    assert table is not None
                    self._accept(slot, [int(table[slot, 1])], table[slot, 2 : 2 + self.law_size])
                self._begin(slot)
        return kept

    def _begin(self, slot: int) -> None:
        """The text of row ``slot`` is in the cache: set up its window."""

    @abstractmethod
    def _after_window(self, slot: int, phase: int, decided: np.ndarray) -> int:
        """A forward of the window of ``slot`` in ``phase`` has come in; ``decided`` are its entries of the columns.
        Returns how many of its queries become prefix by being accepted.
        """

    def _accept(self, slot: int, fresh: list[int], bits: np.ndarray, depths: np.ndarray | None = None) -> None:
        """Append tokens to the answer of row ``slot``; it may be complete. ``bits`` are the entries of their laws and
        maybe of more, ``depths`` those of the drafted ones, from 1.
        """
        rows, kept = self.rows, laws.as_laws(bits[: len(fresh) * self.law_size], self.law_size)
        rows.record(slot, fresh, np.zeros(0) if depths is None else depths, rows.mask_token_id, kept)
        stops = rows.extend(slot, fresh, self.config.stop_token_ids)
        rows.complete[slot] |= stops or len(rows.tokens[slot]) >= rows.limit[slot]
