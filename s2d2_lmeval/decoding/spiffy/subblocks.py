"""Speculation over denoising states of sub-blocks (Fast-dLLM v2): a draft state is the whole block around it.

The state of a step is the sub-block being decided; the rest of its block is decided or masked. A draft state brings the
whole block, because every row of it sees all others. One that leaves no mask gives the next sub-block's first logits.
The end of a block is a forward of its own in this scheme, so no state goes beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.rows import COMMIT, DRAFT, PREFILL, Rows
from s2d2_lmeval.decoding.blocks.stages import Decisions
from s2d2_lmeval.decoding.blocks.subblock_planning import Frame, Order, SubblockPlan, reach_of
from s2d2_lmeval.decoding.blocks.subblocks import SubblockDenoiser
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.readback import Outcome, StepTables
from s2d2_lmeval.decoding.spiffy.decoder import ChainReadback, Spiffy
from s2d2_lmeval.decoding.spiffy.planning import StateGroups, StatePlan, WriteStates, state_plan
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, block_end


@DECODERS.register("spiffy", "subblock")
class SubblockSpiffy(SubblockDenoiser, Spiffy):
    """The decoder ``spiffy`` of shifted models. The rows' "block" is a sub-block here."""

    _plan: SubblockStatePlan

    @property
    def widths(self) -> tuple[int, int]:
        return self.frame.block_length, self.frame.block_length

    def plan(self) -> SubblockStatePlan:
        self._plan = plan_subblock_states(self.rows, self.config, self.frame, *self._offers(), self._write_states)
        return self._plan

    def _may_finish(self) -> np.ndarray:
        """(rows,) where another sub-block of the same block follows and will be decoded."""
        end = self.rows.start + self.rows.block_length
        return (end % self.frame.block_length != 0) & ((end < self.limit) | self.finishes_blocks)

    def _read_chain(
        self, tables: list[StepTables[torch.Tensor]], links: torch.Tensor, crossed: torch.Tensor
    ) -> ChainReadback:
        """First tokens come along in the tables of the first step: a row has one or the other."""
        if self._plan.firsts:
            none = Decisions(self._stage.block, self.rows.mask_token_id).tables(self.draft.tokens)
            tables = [self._begin_blocks(tables[0] if tables else none), *tables[1:]]
        return super()._read_chain(tables, links, crossed)

    def _record(self, slot: int, step: StepTables[np.ndarray], kind: str) -> None:
        super()._record(slot, step, kind)
        decided, stop = self._extent(self.rows.block)
        self.decided[slot], self.stop[slot] = decided[slot], stop[slot]

    def _keep_block(self, row: int, slot: int, state: int, outcome: Outcome) -> None:
        """The block is still open: no keys are kept."""


@dataclass(frozen=True)
class SubblockStatePlan(StatePlan, SubblockPlan):
    """A pass over current blocks and draft states whose last logits begin a block."""


def plan_subblock_states(
    rows: Rows,
    config: DecodingConfig,
    frame: Frame,
    inside: np.ndarray,
    finishing: np.ndarray,
    write_states: WriteStates,
) -> SubblockStatePlan:
    """Lay out the next forward of all active rows, which offer so many draft states ``inside`` and ``finishing``
    (rows,).
    """
    slots, part, block = rows.active(), rows.block_length, frame.block_length
    phase, start = rows.phase[slots], rows.start[slots]
    drafting = phase == DRAFT
    wanted = rows.wanted[slots] & drafting[:, None]
    order = Order.of(rows, frame, wanted, np.zeros(len(slots), dtype=bool), False)
    states = inside[slots] + finishing[slots]
    groups = StateGroups.of(slots, order.heads, states, np.zeros_like(states), block)
    layout, state, place = groups.layout, groups.state, groups.place
    r, drafted = layout.row_of, state >= 0
    positions = np.where(drafted, order.block[r] + place, order.begin[r] + layout.local)
    # From where the sub-block begins; a draft state replaces it.
    local = positions - start[r]
    source = np.where(drafted & (local >= 0) & (local < part), rows.states_at + state * part + local, positions)
    reach = np.where(drafted, block_end(positions, block), reach_of(rows, frame, layout, positions))
    first_rows = np.isin(phase, (PREFILL, COMMIT)) & (order.begin + order.heads == start) & rows.masks[slots, 0]

    row, at = np.nonzero(wanted | (finishing[slots] > 0)[:, None])
    # The row before a token predicts it; in a state that finishes the sub-block, a token of the next one.
    number = np.arange(1 + int(states.max(initial=0)))
    within = number <= inside[slots][row][:, None]
    before = (start - order.block)[row] + at - 1
    predictor = np.where(within, before.clip(0)[:, None], before[:, None] + part)
    copies = layout.offsets[row][:, None] + order.heads[row][:, None] + (number - 1) * block + predictor
    queries = np.where(number == 0, order.predictors(layout, row, at)[:, None], copies)
    read = np.where(within, wanted[row, at][:, None], number <= states[row][:, None])
    lookup = np.zeros_like(queries)
    lookup[read] = np.arange(read.sum())
    arrays = {
        "source": slots[r] * rows.stride + source,
        "positions": positions,
        "rank": layout.padded(positions, NOBODY),
        "reach": layout.padded(reach, NOTHING),
        "branch": layout.padded(np.where(drafting[r] & (positions >= order.block[r]), 2 + state, 0), 0),
        "open_state": layout.padded(np.where(drafted, slots[r] * rows.draft_states + state, -1), -1),
        "place": layout.padded(local, 0),
        "read": np.concatenate([queries[read], (layout.offsets + layout.widths - 1)[first_rows]]),
        "fresh_row": slots[row],
        "fresh_place": at,
        "lookup": lookup,
        "inside": inside,
        "finishing": finishing,
        # Progress is the share of the sub-block that is decided, whoever decided it.
        "given": np.zeros(rows.count),
    }
    return state_plan(
        SubblockStatePlan,
        rows,
        config,
        layout,
        arrays,
        write_states,
        heads=order.heads,
        keep=np.where(drafting, order.block - rows.cached[slots], order.heads),
        wanted_counts=np.bincount(row, read.sum(1), minlength=len(slots)).astype(np.int64) + first_rows,
        first_slots=torch.from_numpy(slots[first_rows]).to(rows.device),
        first_rows=first_rows,
    )
