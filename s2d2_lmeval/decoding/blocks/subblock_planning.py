"""From where the rows stand to the next pass, for sub-blocks of shifted models.

As in block denoising (:mod:`s2d2_lmeval.decoding.blocks.planning`) everything is laid out in numpy for all rows at
once. What a row brings:

prefill, commit  text without keys up to the block's first position; if that is where the block begins to be decoded,
                 the last row gives its first token
draft            the whole block (and text before it that may ride along); where ``narrow``, the sub-block alone, in
                 front of it the keys of the rest of the block as an earlier draft left them
verify           the block up to the last drafted token's predecessor, token-causal
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.planning import BlockPlan, send_facts
from s2d2_lmeval.decoding.blocks.rows import COMMIT, DRAFT, PREFILL, VERIFY, Rows
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, block_end, by_reach


@dataclass(frozen=True)
class Frame:
    """The block around the sub-blocks: its length, how it is committed and drafted, and the longest prefill."""

    block_length: int
    token_causal: bool
    draft_ver: bool
    prefill_chunk: int


@dataclass(frozen=True)
class SubblockPlan(BlockPlan):
    """A pass whose last logits are those that begin a block: of the rows ``first_slots``.

    ``first_rows`` (R,) says on the host which active rows these are.
    """

    first_slots: torch.Tensor
    first_rows: np.ndarray

    @property
    def firsts(self) -> int:
        """Number of logits that begin a block."""
        return len(self.first_slots)


@dataclass(frozen=True)
class Order:
    """Which positions each row brings, in which order.

    A row brings ``heads`` (R,) queries: the positions from ``begin`` (R,) on. Where ``turned`` (R,), the sub-block's
    come last, behind those of the rest of the block: then that rest can be kept without it. Where ``narrow`` (R,) they
    come alone. The sub-block of ``part`` positions begins at ``start`` (R,), its block at ``block`` (R,).
    """

    begin: np.ndarray
    heads: np.ndarray
    turned: np.ndarray
    narrow: np.ndarray
    start: np.ndarray
    block: np.ndarray
    part: int

    @classmethod
    def of(cls, rows: Rows, frame: Frame, wanted: np.ndarray, narrow: np.ndarray, block_cache: bool) -> Order:
        """The order of the active rows (R,): ``wanted`` (R, part) places, ``narrow`` (R,) drafts."""
        slots, part, block = rows.active(), rows.block_length, frame.block_length
        phase, cached, start = rows.phase[slots], rows.cached[slots], rows.start[slots]
        begin = start // block * block
        last_wanted = start + part - 1 - wanted[:, ::-1].argmax(1)
        text_end = np.minimum(begin, cached + max(frame.prefill_chunk // block, 1) * block)
        end = np.where(phase == DRAFT, begin + block, np.where(phase == VERIFY, last_wanted, text_end))
        return cls(
            begin=np.where(narrow, start, cached),
            heads=np.where(narrow, part, end - cached),
            turned=(phase == DRAFT) & ~narrow & block_cache,
            narrow=narrow,
            start=start,
            block=begin,
            part=part,
        )

    def positions(self, layout: Layout) -> np.ndarray:
        """(N,) position of each packed query."""
        r = layout.row_of
        nominal = self.begin[r] + layout.local
        moved = nominal + self.part
        end = (self.begin + self.heads)[r]
        turned = np.where(moved < end, moved, self.start[r] + moved - end)
        return np.where(self.turned[r] & (nominal >= self.start[r]), turned, nominal)

    def predictors(self, layout: Layout, row: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The queries that predict these places (K,); where the pass brings no predecessor, the place's own."""
        earliest = np.where(self.narrow, self.start, self.block)[row]
        position = np.maximum(self.start[row] + place - 1, earliest)
        inside = self.turned[row] & (position >= self.start[row])
        last = self.heads[row] - self.part + position - self.start[row]
        return layout.offsets[row] + np.where(inside, last, position - self.begin[row])


def reach_of(rows: Rows, frame: Frame, layout: Layout, positions: np.ndarray) -> np.ndarray:
    """(N,) last position that each query of the rows' own text sees."""
    r, phase, start = layout.row_of, rows.phase[layout.slots], rows.start[layout.slots]
    first_mask = start + rows.masks[layout.slots].argmax(1)
    block = start // frame.block_length * frame.block_length
    drafted = (phase == DRAFT)[r] & (positions >= block[r])
    causal = np.where(drafted, frame.draft_ver & (positions < first_mask[r]), frame.token_causal | (phase == VERIFY)[r])
    return np.where(causal, positions, block_end(positions, frame.block_length))


def plan_subblocks(rows: Rows, config: DecodingConfig, frame: Frame, narrow: np.ndarray) -> SubblockPlan:
    """Lay out the next forward of all active rows; ``narrow`` (rows,) are those that draft their sub-block alone."""
    slots = rows.active()
    phase, start = rows.phase[slots], rows.start[slots]
    drafting, verifying = phase == DRAFT, phase == VERIFY
    wanted = rows.wanted[slots] & (drafting | verifying)[:, None]
    order = Order.of(rows, frame, wanted, narrow[slots] & drafting, config.use_block_cache)
    layout = Layout(slots, order.heads)
    r, positions = layout.row_of, order.positions(layout)
    first_rows = np.isin(phase, (PREFILL, COMMIT)) & (order.begin + order.heads == start) & rows.masks[slots, 0]

    # A verifier reads the drafted sub-block, which lies behind the canvas.
    source = positions + np.where(verifying[r] & (positions >= start[r]), rows.length - start[r], 0)

    verify_at = np.nonzero(wanted & verifying[:, None])
    draft_at = np.nonzero(wanted & drafting[:, None])
    firsts = (layout.offsets + layout.widths - 1)[first_rows]
    sent = send_facts(
        rows,
        config,
        source=slots[r] * rows.stride + source,
        positions=positions,
        rank=layout.padded(positions, NOBODY),
        reach=layout.padded(reach_of(rows, frame, layout, positions), NOTHING),
        read=np.concatenate([order.predictors(layout, *verify_at), order.predictors(layout, *draft_at), firsts]),
        verify_row=slots[verify_at[0]],
        verify_place=verify_at[1],
        fresh_row=slots[draft_at[0]],
        fresh_place=draft_at[1],
        first_slots=slots[first_rows],
        # Progress is the share of the sub-block that is decided, whoever decided it.
        given=np.zeros(rows.count),
    )
    return SubblockPlan(
        request=Pass(
            layout=layout,
            tokens=rows.store.view(-1)[sent["source"]],
            positions=sent["positions"],
            visible=by_reach(sent["rank"], sent["reach"]),
            wanted=sent["read"],
            keep=np.where(verifying, 0, np.where(drafting, order.block - rows.cached[slots], order.heads)),
        ),
        phases=phase,
        heads=order.heads,
        wanted_counts=wanted.sum(1) + first_rows,
        verifies=len(verify_at[0]),
        drafts=len(draft_at[0]),
        aheads=0,
        verify_at=(sent["verify_row"], sent["verify_place"]),
        fresh_at=(sent["fresh_row"], sent["fresh_place"]),
        verify_rows=sent["verifying"].bool(),
        draft_rows=sent["drafting"].bool(),
        ahead_rows=torch.zeros_like(sent["drafting"], dtype=torch.bool),
        facts=sent,
        first_slots=sent["first_slots"],
        first_rows=first_rows,
    )
