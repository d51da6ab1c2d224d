"""From where the rows stand to the next pass, for sub-blocks of shifted models.

As in block denoising (:mod:`s2d2_lmeval.decoding.planning`) everything is laid out in numpy for all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.config import DecodingConfig
from s2d2_lmeval.decoding.planning import BlockPlan, send_facts
from s2d2_lmeval.decoding.rows import COMMIT, DRAFT, PREFILL, VERIFY, Rows
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
    """A pass whose last ``firsts`` logits are those that begin a block: of the rows ``first_slots``.

    ``first_rows`` (R,) says on the host which active rows these are.
    """

    firsts: int
    first_slots: torch.Tensor
    first_rows: np.ndarray


@dataclass(frozen=True)
class _Order:
    """Which positions each row brings, in which order.

    A row brings ``heads`` (R,) queries: the positions from ``begin`` (R,) on. Where ``turned`` (R,), the sub-block's
    come last, behind those of the rest of the block: then that rest can be kept without it.
    """

    begin: np.ndarray
    heads: np.ndarray
    turned: np.ndarray
    start: np.ndarray
    part: int

    def positions(self, layout: Layout) -> np.ndarray:
        """(N,) position of each packed query."""
        r = layout.row_of
        nominal = self.begin[r] + layout.local
        moved = nominal + self.part
        end = (self.begin + self.heads)[r]
        turned = np.where(moved < end, moved, self.start[r] + moved - end)
        return np.where(self.turned[r] & (nominal >= self.start[r]), turned, nominal)

    def local(self, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Index inside its row of the query at ``position`` (K,), which is not behind the sub-block."""
        inside = self.turned[row] & (position >= self.start[row])
        last = self.heads[row] - self.part + position - self.start[row]
        return np.where(inside, last, position - self.begin[row])


def plan_subblocks(rows: Rows, config: DecodingConfig, frame: Frame, narrow: np.ndarray) -> SubblockPlan:
    """Lay out the next forward of all active rows. What a row brings:

    prefill, commit  text without keys up to the block's first position; if that is where the block begins to be
                     decoded, the last row gives its first token
    draft            the whole block (and text before it that may ride along); where ``narrow``, the sub-block alone, in
                     front of it the keys of the rest of the block as an earlier draft left them
    verify           the block up to the last drafted token's predecessor, token-causal
    """
    slots, part, block = rows.active(), rows.block_length, frame.block_length
    phase, cached, start = rows.phase[slots], rows.cached[slots], rows.start[slots]
    begin, drafting, verifying = start // block * block, phase == DRAFT, phase == VERIFY
    narrow = narrow[slots] & drafting
    wanted = rows.wanted[slots] & (drafting | verifying)[:, None]
    last_wanted = start + part - 1 - wanted[:, ::-1].argmax(1)
    text_end = np.minimum(begin, cached + max(frame.prefill_chunk // block, 1) * block)
    end = np.where(drafting, begin + block, np.where(verifying, last_wanted, text_end))
    order = _Order(
        begin=np.where(narrow, start, cached),
        heads=np.where(narrow, part, end - cached),
        turned=drafting & ~narrow & config.use_block_cache,
        start=start,
        part=part,
    )
    layout = Layout(slots, order.heads)
    r, positions = layout.row_of, order.positions(layout)
    first_rows = np.isin(phase, (PREFILL, COMMIT)) & (end == start) & rows.masks[slots, 0]

    first_mask = start + rows.masks[slots].argmax(1)
    drafted = drafting[r] & (positions >= begin[r])
    causal = np.where(drafted, frame.draft_ver & (positions < first_mask[r]), frame.token_causal | verifying[r])
    reach = np.where(causal, positions, block_end(positions, block))
    # A verifier reads the drafted sub-block, which lies behind the canvas.
    source = positions + np.where(verifying[r] & (positions >= start[r]), rows.length - start[r], 0)

    def queries(row: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The queries that predict these places; the block's first place has none, its own stands in."""
        predecessor = np.maximum(start[row] + place - 1, np.where(narrow, start, begin)[row])
        return layout.offsets[row] + order.local(row, predecessor)

    verify_at = np.nonzero(wanted & verifying[:, None])
    draft_at = np.nonzero(wanted & drafting[:, None])
    firsts = (layout.offsets + layout.widths - 1)[first_rows]
    sent = send_facts(
        rows,
        config,
        source=slots[r] * rows.stride + source,
        positions=positions,
        rank=layout.padded(positions, NOBODY),
        reach=layout.padded(reach, NOTHING),
        read=np.concatenate([queries(*verify_at), queries(*draft_at), firsts]),
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
            keep=np.where(verifying, 0, np.where(drafting, begin - cached, order.heads)),
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
        firsts=len(firsts),
        first_slots=sent["first_slots"],
        first_rows=first_rows,
    )
