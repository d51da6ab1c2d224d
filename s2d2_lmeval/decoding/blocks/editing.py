"""Block denoising with token editing, plain and with S2D2 (LLaDA2).

While a block is open its decided tokens are drafted too, and may be replaced. A step of a row:

1. draft   tokens and their confidence at every place of the block that is not of the prompt
2. edit    replace decided tokens by other drafted ones above ``editing_threshold``
3. verify  S2D2 only: the edited block, with its masks drafted, goes before the verifier if the policy says so
4. decide  masks: every one above ``confidence_threshold``, ``num_to_transfer`` at least

A block without masks may be edited in ``max_post_steps`` further steps, until one changes nothing. Whatever the
verifier predicts, it fills masks only. A block that no other follows is not committed.
"""

from __future__ import annotations

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.denoising import DENOISING, BlockDenoiser
from s2d2_lmeval.decoding.blocks.rows import Rows
from s2d2_lmeval.decoding.blocks.s2d2 import S2D2
from s2d2_lmeval.decoding.blocks.stages import Decisions, Stage
from s2d2_lmeval.decoding.generation import ACCEPTED, DENOISED, EDITED, RESAMPLED
from s2d2_lmeval.decoding.options.blocks import ConfidenceOption, EditingOptions
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.readback import StepTables, as_step
from s2d2_lmeval.registry import DECODERS

_SHOWN = {ACCEPTED: lambda p: -p, RESAMPLED: lambda p: -p - 0.5, DENOISED: lambda p: p}
"""How a mask was decided -> the published notation of its position."""


@DECODERS.register(
    "editing",
    "editing",
    promise="the definition of block denoising with token editing (LLaDA2)",
    options=(*DENOISING, ConfidenceOption, EditingOptions),
    strategy="low_confidence_dynamic",
    accelerable=True,
)
class EditingDenoiser(BlockDenoiser):
    """The decoder ``editing``."""

    commits_last_block = False

    def __init__(self, config: DecodingConfig, rows: Rows, prefill_chunk: int) -> None:
        super().__init__(config, rows, prefill_chunk)
        self.post_steps = np.zeros(rows.count, dtype=np.int64)
        """Steps of the current block that began without a mask."""
        self.edited = np.zeros(rows.count, dtype=bool)
        """Whether the current step edited anything."""

    def _revise(self, decisions: Decisions, stage: Stage, drafting: torch.Tensor) -> None:
        draft = self.draft
        place = torch.arange(stage.block.shape[1], device=stage.block.device)
        editable = drafting.unsqueeze(1) & ~decisions.masks & (place >= stage.given.unsqueeze(1))
        # A decided token never turns back into the mask token, which published code leaves to the model.
        other = (draft.tokens != decisions.block) & (draft.tokens != self.rows.mask_token_id)
        decisions.decide(editable & other & (draft.confidence > self.config.editing_threshold), draft.tokens, EDITED)

    # ---- host ----

    def admitted(self, slot: int) -> None:
        super().admitted(slot)
        self.post_steps[slot] = 0

    def _record(self, slot: int, step: StepTables[np.ndarray], kind: str) -> None:
        rows, marks, start = self.rows, step.marks[slot], int(self.rows.start[slot])
        progress = rows.progress[slot]
        progress.steps.append(as_step(step, slot, kind, start, rows.span[slot]))
        if kind == "draft":
            places = np.flatnonzero(marks == EDITED)
            before, after = step.before[slot].tolist(), step.after[slot].tolist()
            edits = [(start + place, before[place], after[place]) for place in places.tolist()]
            progress.decoding_order.append({"edit": edits, "unmask": []})
            self.edited[slot] = bool(edits)
        order = progress.decoding_order[-1]
        assert isinstance(order, dict)
        for mark, show in _SHOWN.items():
            order["unmask"] += [show(start + place) for place in np.flatnonzero(marks == mark).tolist()]
        rows.block[slot] = step.after[slot]

    def _block_finished(self, slot: int) -> bool:
        """No masks, and no further step that may edit."""
        if self.rows.masks[slot].any():
            return False
        settled = self.post_steps[slot] > 0 and not self.edited[slot]
        if settled or self.post_steps[slot] == self.config.max_post_steps:
            self.post_steps[slot] = 0
            return True
        self.post_steps[slot] += 1
        return False

    def _enter_draft(self, slot: int) -> None:
        super()._enter_draft(slot)
        rows = self.rows
        if not self.read_whole_block:
            rows.wanted[slot] = rows.start[slot] + np.arange(rows.block_length) >= rows.prompt[slot]


@DECODERS.register("s2d2", "editing")
class EditingS2D2(EditingDenoiser, S2D2):
    """The decoder ``s2d2`` where decided tokens may be edited."""
