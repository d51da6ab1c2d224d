"""Block denoising with token editing, plain and with S2D2 (LLaDA2).

While a block is open its decided tokens are drafted too, and may be replaced. A step of a row:

1. draft   tokens and their confidence at every place of the block outside the prompt
2. edit    replace decided tokens by other drafted ones above ``editing_threshold``
3. verify  S2D2 only: verify the edited block, with its masks drafted, if the policy says so
4. decide  every mask above ``confidence_threshold``, at least ``num_to_transfer`` of them

A block without masks may be edited in up to ``max_post_steps`` further steps, until one changes nothing. The verifier
only fills masks. The last block is not committed.
"""

from __future__ import annotations

import numpy as np
import torch

from s2d2_lmeval.decoding import reference
from s2d2_lmeval.decoding.blocks.denoising import DENOISING, BlockDenoiser
from s2d2_lmeval.decoding.blocks.rows import BlockState
from s2d2_lmeval.decoding.blocks.s2d2 import S2D2
from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.generation import EDITED
from s2d2_lmeval.decoding.options.blocks import ConfidenceOption, EditingOptions, MultiBlockOption
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.steps import Decisions, StepTables
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.graphs import numbers


@DECODERS.register(
    "editing",
    "editing",
    promise="the definition of block denoising with token editing (LLaDA2)",
    options=(*DENOISING, ConfidenceOption, MultiBlockOption, EditingOptions),
    strategy="low_confidence_dynamic",
    plain=True,
)
class EditingDenoiser(BlockDenoiser):
    """The decoder ``editing``."""

    edits = True
    notation = staticmethod(reference.order_of_edits)

    def __init__(self, setup: DecoderSetup, part: DecodingConfig | None = None) -> None:
        super().__init__(setup, part)
        self.post_steps = np.zeros(setup.slots, dtype=np.int64)
        """Steps of the current block that began without a mask."""
        self.edited = np.zeros(setup.slots, dtype=bool)
        """Whether the current step edited anything."""

    def _revise(self, decisions: Decisions, state: BlockState, drafting: torch.Tensor) -> None:
        place = numbers(state.block.shape[1], state.block.device)
        own = (place >= state.given.unsqueeze(1)) & (place < self._sent["room"].unsqueeze(1))
        editable = drafting.unsqueeze(1) & ~decisions.masks & own
        # A decided token never becomes the mask token again; the published code leaves that to the model.
        other = (self.drafted != decisions.block) & (self.drafted != self.rows.mask_token_id)
        decisions.decide(editable & other & (self.confidence > self.config.editing_threshold), self.drafted, EDITED)

    # ---- host ----

    def admitted(self, slot: int) -> None:
        super().admitted(slot)
        self.post_steps[slot] = 0

    def _record(self, slots: np.ndarray, step: StepTables[np.ndarray], kind: str) -> None:
        super()._record(slots, step, kind)
        if kind == "draft":
            self.edited[slots] = (step.marks[slots, : self.rows.block_length] == EDITED).any(1)

    def _block_finished(self, slots: np.ndarray) -> np.ndarray:
        """No masks, and no further step that may edit."""
        filled, posted = super()._block_finished(slots), self.post_steps[slots]
        settled = (posted > 0) & ~self.edited[slots]
        finished = filled & (settled | (posted == self.config.max_post_steps))
        self.post_steps[slots] = np.where(finished, 0, posted + filled)
        return finished

    def _enter_draft(self, slots: np.ndarray) -> None:
        super()._enter_draft(slots)
        rows = self.rows
        if not self.rules.drafts_whole_block:
            position = rows.start[slots, None] + np.arange(rows.width)
            rows.wanted[slots] = (position >= rows.prompt[slots, None]) & (position < rows.total[slots, None])


@DECODERS.register("s2d2", "editing")
class EditingS2D2(EditingDenoiser, S2D2):
    """The decoder ``s2d2`` where decided tokens may be edited."""
