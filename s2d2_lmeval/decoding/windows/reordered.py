"""Reordered windows (WeDLM): decided tokens move to the front of the window, so that all attention is token-causal.

A step of a row, whose window of ``block_length`` places follows the text:

1. slide    the decided places at the window's front leave: they join the answer, and as many masks enter at the end
            (with ``whole_windows`` only once the window is decided)
2. forward  the decided tokens (those that leave first), then the masks, each at its own position, every one seeing
            those before it in this order; the keys of those that leave stay
3. fill     every mask whose entropy, plus a penalty for its distance from the first mask, is below the threshold, and
            at least the lowest one; with ``whole_windows`` those of enough confidence, and at least the best one
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.generation import DENOISED, NOTHING, Step
from s2d2_lmeval.decoding.options.blocks import BlockOption, ConfidenceOption
from s2d2_lmeval.decoding.options.general import LogprobsOption
from s2d2_lmeval.decoding.options.windows import ReorderedOptions
from s2d2_lmeval.decoding.passes import Cells, PassBuilder, Sent
from s2d2_lmeval.decoding.sampling import laws, random
from s2d2_lmeval.decoding.windows.window import WindowDecoder
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.graphs import numbers


@DECODERS.register(
    "reordered",
    "reordered",
    promise="the definition of WeDLM's streaming decoding; not the autoregressive law",
    options=(BlockOption, ConfidenceOption, ReorderedOptions, LogprobsOption),
)
class Reordered(WindowDecoder):
    """The decoder ``reordered``. A row's window begins after its tokens; those leaving are its first ones."""

    seeds = False

    def __init__(self, setup: DecoderSetup) -> None:
        self.width = setup.config.block_length
        super().__init__(setup, 2 * self.width)
        self.leaving = np.zeros(self.rows.count, dtype=np.int64)
        """Decided places at the front of each row's window, which join the answer."""
        self.staying = np.zeros(self.rows.count, dtype=np.int64)
        """Places after these."""

    @staticmethod
    def layout(config: object) -> str:
        return f"windows of {config.block_length}"  # type: ignore[attr-defined]

    @property
    def capacity(self) -> int:
        return self.rows.length + 3 * self.width

    def _lay_out(self, builder: PassBuilder, slots: np.ndarray, among: np.ndarray) -> np.ndarray:
        rows = self.rows
        window, leaving = rows.window[slots], self.leaving[slots] * among
        width = self.staying[slots] + leaving
        place = np.arange(window.shape[1])
        # Decided places first, then masks, both from left to right; what lies beyond the window comes last.
        rank = (window == rows.mask_token_id) + 2 * (place >= width[:, None])
        order = np.argsort(rank, axis=1, kind="stable")
        self._window = segment = builder.add(among * width)
        at = order[segment.row, segment.local]
        segment.set(position=rows.cached[slots][segment.row] + at, token=window[segment.row, at])
        masked = window[segment.row, at] == rows.mask_token_id
        segment.set(rank=segment.local, reach=segment.local, place=at, gated=masked.astype(np.int64))
        return leaving

    def _read(self, builder: PassBuilder, slots: np.ndarray) -> None:
        window = self._window
        masks = np.flatnonzero(np.asarray(window.columns["token"]) == self.rows.mask_token_id)
        place = np.asarray(window.columns["place"])
        builder.read("window", window.row[masks], place[masks], window.query[masks])

    # ---- device ----

    def _decide(self, sent: Sent, logits: torch.Tensor) -> list[torch.Tensor]:
        window, config, cells = sent["window"], self.config, sent.cells("window")
        kept = Cells.of_entries(window, self.law_size)
        if not sent.has("window"):
            return [window, laws.as_bits(kept.table)]
        logits = logits[sent.part("window")]
        law = self._law(logits).softmax(-1)
        tokens = logits.argmax(-1)
        if config.sampled:
            slots, places = sent.at("window")
            key = random.Key(random.DRAFT, sent["key"][slots], sent["length"][slots] + places, sent["step"][slots])
            tokens = self.source.categorical(law, key)
        rated = Cells.like(torch.zeros(window.shape, dtype=law.dtype, device=window.device), torch.inf)
        place = numbers(window.shape[1], window.device)
        if config.whole_windows:
            doubt = rated.put(cells, 1 - law.gather(1, tokens.unsqueeze(1)).squeeze(1))
            masks, sure = doubt.isfinite(), doubt <= 1 - (config.confidence_threshold or 2)
        else:
            log_p = logits.log_softmax(-1)
            doubt = rated.put(cells, -(log_p.exp() * log_p).nansum(-1))
            masks = doubt.isfinite()
            doubt = doubt + config.position_penalty * (place - masks.long().argmax(1, keepdim=True))
            sure = doubt < config.entropy_threshold
        chosen = masks & (sure | (place == doubt.argmin(1, keepdim=True)))
        self._keep(kept, cells, logits, tokens)
        return [torch.where(chosen, Cells.like(window).put(cells, tokens), window), laws.as_bits(kept.table)]

    # ---- host ----

    def _begin(self, slot: int) -> None:
        self.rows.window[slot] = self.rows.mask_token_id
        self.leaving[slot], self.staying[slot] = 0, self._fresh(slot, 0)

    def _fresh(self, slot: int, leaving: int) -> int:
        """Places of a fresh window after ``leaving`` decided ones."""
        room = int(self.rows.limit[slot]) - len(self.rows.tokens[slot]) - leaving
        return min(self.width, room) if self.config.whole_windows else self.width

    def _after_window(self, slot: int, phase: int, decided: np.ndarray) -> int:
        rows = self.rows
        filled, bits = np.split(decided, [rows.window.shape[1]])
        gone, before, start = int(self.leaving[slot]), rows.window[slot].copy(), len(rows.tokens[slot])
        width = gone + int(self.staying[slot])
        staying = filled[gone:width]
        rows.window[slot] = rows.mask_token_id
        rows.window[slot, : len(staying)] = staying
        self.leaving[slot] = leaving = int(np.append(staying == rows.mask_token_id, True).argmax())
        self._join(slot, filled[:gone])
        going_on = not rows.complete[slot]
        if self.config.whole_windows and leaving < len(staying):
            self.staying[slot] = len(staying) - leaving
        else:
            self.staying[slot] = self._fresh(slot, leaving)
        if going_on:
            marks = np.where(before == filled, NOTHING, DENOISED)[:width].tolist()
            then, now = before[:width].tolist(), filled[:width].tolist()
            kept = laws.as_laws(bits[: width * self.law_size], self.law_size)
            step = partial(Step, "draft", start, then, now, now, marks, laws=kept)
            rows.progress[slot].record(step, verified=False)
        if going_on and not self.staying[slot]:
            self._join(slot, staying)
        return 0

    def _join(self, slot: int, tokens: np.ndarray) -> None:
        """Decided ``tokens`` (K,) join the answer of row ``slot``; it may be complete."""
        rows = self.rows
        if len(tokens):
            stops = rows.extend(slot, tokens.tolist(), self.config.stop_token_ids)
            rows.complete[slot] |= stops or len(rows.tokens[slot]) >= rows.limit[slot]
