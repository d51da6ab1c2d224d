"""Linear self-speculation (Nemotron-Labs-Diffusion): draft a block by diffusion, verify it autoregressively, in turns.

A round of a row, whose last token has no keys yet:

1. draft   that token and masks after it, which all see each other; every mask is filled, or, with ``draft_threshold``,
           those above it and the best one, until none is left
2. verify  the same block token-causally: the model's own choice after every token
3. accept  as long as the choice is the drafted token, and the choice after that; their keys stay

The choices are those of ``ar``, so the answer is that of ``ar`` with the same seed. ``sliding`` gives the same in one
forward per round.
"""

from __future__ import annotations

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.remasking import ranks
from s2d2_lmeval.decoding.decoder import EXACT, DecoderSetup
from s2d2_lmeval.decoding.options.blocks import BlockOption
from s2d2_lmeval.decoding.options.general import LogprobsOption
from s2d2_lmeval.decoding.options.windows import LinearOptions
from s2d2_lmeval.decoding.passes import Cells, PassBuilder, Sent
from s2d2_lmeval.decoding.sampling import laws
from s2d2_lmeval.decoding.sampling.row_statistics import probability_of
from s2d2_lmeval.decoding.state import DRAFT, VERIFY
from s2d2_lmeval.decoding.windows.window import WindowDecoder
from s2d2_lmeval.registry import DECODERS


@DECODERS.register(
    "linear_spec",
    "seeded",
    promise=f"the model's own autoregressive law, token for token the output of ar with the same seed{EXACT}",
    options=(BlockOption, LinearOptions, LogprobsOption),
)
class LinearSpeculation(WindowDecoder):
    """The decoder ``linear_spec``."""

    def __init__(self, setup: DecoderSetup) -> None:
        super().__init__(setup, setup.config.block_length)

    @staticmethod
    def layout(config: object) -> str:
        return f"blocks of {config.block_length}, drafted and verified in turns"  # type: ignore[attr-defined]

    def _lay_out(self, builder: PassBuilder, slots: np.ndarray, among: np.ndarray) -> np.ndarray:
        rows, width = self.rows, self.rows.window.shape[1]
        block = builder.span(rows.cached[slots], among * width)
        drafting = (rows.phase[slots] == DRAFT)[block.row]
        reach = np.where(drafting, width - 1, block.local)
        block.set(token=rows.window[slots][block.row, block.local], rank=block.local, reach=reach)
        block.set(gated=drafting.astype(np.int64))
        self._block = block
        return np.zeros_like(slots)

    def _read(self, builder: PassBuilder, slots: np.ndarray) -> None:
        rows, block = self.rows, self._block
        verifying = (rows.phase[slots] == VERIFY)[block.row]
        # Published code draws for the whole block.
        whole = self.config.sampled and not self.config.keyed
        wanted = whole | (rows.window[slots][block.row, block.local] == rows.mask_token_id)
        for name, which in (("draft", wanted & ~verifying), ("verify", verifying)):
            at = np.flatnonzero(which)
            builder.read(name, block.row[at], block.local[at], block.query[at])

    # ---- device ----

    def _decide(self, sent: Sent, logits: torch.Tensor) -> list[torch.Tensor]:
        block = sent["window"]
        if sent.has("draft"):
            block = self._fill(sent, logits[sent.part("draft")])
        chosen, kept = Cells.like(block, -1), Cells.of_entries(block, self.law_size)
        if sent.has("verify"):
            (slots, place), verifier = sent.at("verify"), logits[sent.part("verify")]
            # The token after the place's own.
            tokens = self._choose(sent, verifier, slots, sent["length"][slots] + place)
            chosen.put(sent.cells("verify"), tokens)
            self._keep(kept, sent.cells("verify"), verifier, tokens)
        same = (chosen.table[:, :-1] == block[:, 1:]).long()
        return [same.cumprod(1).sum(1, keepdim=True), block, chosen.table, laws.as_bits(kept.table)]

    def _fill(self, sent: Sent, logits: torch.Tensor) -> torch.Tensor:
        """The blocks (count, W) with the masks filled that this draft decides."""
        (slots, place), block, cells = sent.at("draft"), sent["window"], sent.cells("draft")
        drawn = self._choose(sent, logits, slots, sent["length"][slots] + place - 1)
        tokens = Cells.like(block).put(cells, drawn)
        masks = (block == self.rows.mask_token_id) & sent["drafting"].bool().unsqueeze(1)
        threshold = self.config.draft_threshold
        if threshold > 0:
            confidence = Cells.like(torch.zeros(block.shape, dtype=logits.dtype, device=block.device))
            sure = confidence.put(cells, probability_of(logits, drawn))
            masks = masks & ((sure >= threshold) | (ranks(sure, masks) == 0))
        return torch.where(masks, tokens, block)

    # ---- host ----

    def _facts(self) -> dict[str, np.ndarray]:
        return {"drafting": self.rows.phase == DRAFT}

    def _begin(self, slot: int) -> None:
        rows = self.rows
        rows.window[slot] = rows.mask_token_id
        rows.window[slot, 0] = rows.tokens[slot][-1]
        rows.phase[slot] = DRAFT if rows.window.shape[1] > 1 else VERIFY

    def _after_window(self, slot: int, phase: int, decided: np.ndarray) -> int:
        rows, accepted = self.rows, int(decided[0])
        block, chosen, *kept = decided[1:].reshape(2 + self.law_size, -1)
        if phase == DRAFT:
            stuck = (rows.window[slot] == block).all()  # the model predicts the mask
            rows.window[slot] = block
            if stuck or not (block == rows.mask_token_id).any():
                rows.phase[slot] = VERIFY
            return 0
        self._accept(slot, chosen[: accepted + 1].tolist(), np.array(kept).flatten(), np.arange(1, len(block)))
        self._begin(slot)
        return accepted + 1
