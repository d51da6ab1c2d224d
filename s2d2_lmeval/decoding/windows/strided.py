"""Strided decoding (I-DLM, arXiv 2604.11035): every forward verifies the last draft and drafts the next stride.

A round of a row, whose last token, the pending one, has no keys yet:

1. forward  the pending token, the drafted tokens and ``block_length - 1`` masks, token-causally
2. accept   a drafted token x with probability min(1, p(x) / q(x)), p the law after the token before it and q the one
            that it was drawn from; at temperature zero, if it is p's argmax
3. reject   the first that is not is replaced by a draw from (p - q)+, and the masks were in vain: the next round has no
            draft. If all are accepted, the next pending token is drawn after the last, and the masks give a new draft

Both laws are filtered alike, so the answer's is that of ``ar``; published code takes the unfiltered softmax for p.
"""

from __future__ import annotations

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import EXACT, DecoderSetup
from s2d2_lmeval.decoding.options.blocks import BlockOption, ScheduleOption
from s2d2_lmeval.decoding.options.general import LogprobsOption
from s2d2_lmeval.decoding.options.windows import StridedOptions
from s2d2_lmeval.decoding.passes import Cells, PassBuilder, Sent
from s2d2_lmeval.decoding.reference import uniforms_until_refused
from s2d2_lmeval.decoding.sampling import laws, random
from s2d2_lmeval.decoding.sampling.acceptance import residual
from s2d2_lmeval.decoding.state import PREFILL
from s2d2_lmeval.decoding.windows.window import WindowDecoder
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.graphs import numbers


@DECODERS.register(
    "strided",
    "strided",
    promise=f"the model's own autoregressive law; at temperature zero the output of ar{EXACT}",
    options=(ScheduleOption, BlockOption, StridedOptions, LogprobsOption),
)
class Strided(WindowDecoder):
    """The decoder ``strided``. A row's window is its pending token, the drafted ones and the masks."""

    def __init__(self, setup: DecoderSetup) -> None:
        self.masks = setup.config.block_length - 1
        super().__init__(setup, 1 + 2 * self.masks)
        self.drafted = np.zeros(self.rows.count, dtype=np.int64)
        """Tokens that each row verifies next."""
        shape = (self.rows.count, self.masks, self.vocab_size if self.config.sampled else 0)
        self.law = setup.tables.full("law", shape, 0, setup.dtype)
        """What the drafted tokens were drawn from."""
        self.pending = np.zeros(self.rows.count, dtype=bool)
        """Rows whose pending token ends the answer, which published code runs nevertheless."""

    @staticmethod
    def layout(config: object) -> str:
        return f"strides of {config.block_length}"  # type: ignore[attr-defined]

    def _lay_out(self, builder: PassBuilder, slots: np.ndarray, among: np.ndarray) -> np.ndarray:
        rows = self.rows
        self._window = window = builder.span(rows.cached[slots], among * (1 + self.drafted[slots] + self.masks))
        window.set(token=rows.window[slots][window.row, window.local], rank=window.local, reach=window.local)
        window.set(gated=(window.local > self.drafted[slots][window.row]).astype(np.int64))
        return np.zeros_like(slots)

    def _read(self, builder: PassBuilder, slots: np.ndarray) -> None:
        window = self._window
        builder.read("window", window.row, window.local, window.query)

    def _facts(self) -> dict[str, np.ndarray]:
        running = np.zeros(self.rows.count, dtype=bool)
        running[self.rows.active()] = self.rows.phase[self.rows.active()] != PREFILL
        return {"drafted": self.drafted, "running": running}

    # ---- device ----

    def _decide(self, sent: Sent, logits: torch.Tensor) -> list[torch.Tensor]:
        window, running, drafted = sent["window"], sent["running"].bool(), sent["drafted"]
        if not sent.has("window"):
            return [window.new_zeros(len(window), 2 + self.masks + self.law_size * (1 + self.masks))]
        logits = logits[sent.part("window")]
        place = numbers(1 + self.masks, window.device)
        row_of = Cells.like(window).put(sent.cells("window"), numbers(len(logits), window.device))
        tested = place[: self.masks] < (drafted * running).unsqueeze(1)
        token, after_last = window[:, 1 : 1 + self.masks], drafted.unsqueeze(1) + place
        if not self.config.sampled:
            best = logits.argmax(-1)[row_of]
            accepted = ((best[:, : self.masks] == token) & tested).long().cumprod(1).sum(1, keepdim=True)
            pending, fresh = best.gather(1, accepted), best.gather(1, after_last)
        else:
            p = self._law(logits).softmax(-1)
            accepted, pending, fresh = self._draw(sent, p, row_of, tested, token, after_last, running)
        kept = []
        if self.law_size:
            decided = torch.where(place == accepted, pending, torch.nn.functional.pad(token, (0, 1)))
            entries = laws.entries(self._law(logits), decided, self.law_size, row_of[:, : 1 + self.masks])
            kept = [laws.as_bits(entries)]
        return [accepted, pending, fresh[:, 1:], *kept]

    def _draw(
        self,
        sent: Sent,
        p: torch.Tensor,
        row_of: torch.Tensor,
        tested: torch.Tensor,
        token: torch.Tensor,
        after_last: torch.Tensor,
        running: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many of the ``tested`` (count, M) tokens are accepted, the next pending token (count, 1), and the draft
        after it (count, 1 + M, without meaning in place 0) from the laws ``p`` of the window.
        """
        masks = self.masks
        length, key, step = sent["length"].unsqueeze(1), sent["key"].unsqueeze(1), sent["step"].unsqueeze(1)
        place = numbers(masks, p.device)
        of_target = p[row_of[:, :masks]].gather(2, token.unsqueeze(2)).squeeze(2)
        of_draft = self.law.gather(2, token.unsqueeze(2)).squeeze(2) * self.config.draft_tolerance
        ratio = of_target / of_draft.clamp_min(torch.finfo(p.dtype).tiny)
        where = random.Key(random.ACCEPT, key, length + place, step)
        stands = uniforms_until_refused(self.source, where, tested, ratio, not self.config.keyed)
        accepted = stands.long().cumprod(1).sum(1, keepdim=True)
        rejected = accepted < tested.sum(1, keepdim=True)
        after = p[row_of.gather(1, accepted).squeeze(1)]
        if masks:
            at = accepted.clamp_max(masks - 1).unsqueeze(2).expand(-1, -1, p.shape[1])
            corrected = residual(after, self.law.gather(1, at).squeeze(1) * self.config.draft_tolerance)
            after = torch.where(rejected, corrected, after)
        rows = self.source.drawing(numbers(len(after), p.device), running)
        where = random.Key(random.RESAMPLE, key[rows, 0], (length + accepted)[rows, 0], step[rows, 0])
        pending = torch.zeros_like(accepted)
        pending[rows] = self.source.categorical(after[rows], where).unsqueeze(1)
        fresh = torch.zeros_like(after_last)
        if masks:
            law = p[row_of.gather(1, after_last[:, 1:])]
            going_on = running & ~rejected.squeeze(1)
            rows = self.source.drawing(rows, going_on[rows])
            position = (length + accepted)[rows] + 1 + place
            whose, when = (one.expand_as(position).flatten() for one in (key[rows], step[rows]))
            where = random.Key(random.DRAFT, whose, position.flatten(), when)
            drawn = self.source.categorical(law[rows].flatten(0, 1), where)
            fresh[rows, 1:] = drawn.view(-1, masks)
            self.law.copy_(torch.where(going_on.view(-1, 1, 1), law, self.law))
        return accepted, pending, fresh

    # ---- host ----

    def _accept(self, slot: int, fresh: list[int], bits: np.ndarray, depths: np.ndarray | None = None) -> None:
        super()._accept(slot, fresh, bits, depths)
        rows = self.rows
        if self.config.schedule == "reference" and rows.complete[slot]:
            before, kept = len(rows.tokens[slot]) - 1, rows.kept[slot]
            over = before >= rows.limit[slot] or (kept is not None and kept[0] < before - rows.prompt[slot])
            self.pending[slot], rows.complete[slot] = not over, over

    def admitted(self, slot: int) -> None:
        self.pending[slot] = False

    def _begin(self, slot: int) -> None:
        rows = self.rows
        rows.window[slot] = rows.mask_token_id
        rows.window[slot, 0] = rows.tokens[slot][-1]
        self.drafted[slot] = 0

    def _after_window(self, slot: int, phase: int, decided: np.ndarray) -> int:
        decided, bits = np.split(decided, [2 + self.masks])
        (accepted, pending, *fresh), rows, drafted = decided.tolist(), self.rows, int(self.drafted[slot])
        if self.pending[slot]:
            rows.complete[slot] = True
            return 1 + accepted
        tokens = [*rows.window[slot, 1 : 1 + accepted].tolist(), pending]
        self._accept(slot, tokens, bits, np.arange(1, 1 + drafted))
        self._begin(slot)
        if accepted == drafted:
            rows.window[slot, 1 : 1 + self.masks] = fresh
            self.drafted[slot] = self.masks
        return 1 + accepted
