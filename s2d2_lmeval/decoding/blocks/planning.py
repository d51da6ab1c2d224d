"""From where the rows stand to the next pass: which queries, where, who sees whom, which logits.

Everything is laid out on the host in numpy, for all rows at once, and goes to the device in one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.rows import DRAFT, PREFILL, VERIFY, Rows
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.passes import Upload
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, block_end, by_reach


@dataclass(frozen=True)
class BlockPlan:
    """A pass and how to read its logits: those of verifiers, of drafts, of next blocks' drafts, each in row-major
    order.

    ``verify_at`` and ``fresh_at`` (drafts, then next blocks' drafts) are (rows, places) of these logits;
    ``verify_rows``,
    ``draft_rows`` and ``ahead_rows`` (rows,) bool on the device; ``heads`` (R,) leading queries of each active row that
    stand for the row's own text; ``facts`` holds what :func:`send_facts` tells the device of every row.
    """

    request: Pass
    phases: np.ndarray
    heads: np.ndarray
    wanted_counts: np.ndarray
    verifies: int
    drafts: int
    aheads: int
    verify_at: tuple[torch.Tensor, torch.Tensor]
    fresh_at: tuple[torch.Tensor, torch.Tensor]
    verify_rows: torch.Tensor
    draft_rows: torch.Tensor
    ahead_rows: torch.Tensor
    facts: dict[str, torch.Tensor]

    @property
    def draft_at(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, places) of the draft logits."""
        rows, places = self.fresh_at
        return rows[: self.drafts], places[: self.drafts]


def scheduled_count(step: np.ndarray | int, config: DecodingConfig) -> np.ndarray:
    """Tokens that step ``step`` of a block must decide: the block spread over the steps, the remainder to the first
    ones; ``num_to_transfer`` at least.
    """
    steps = config.steps
    whole, rest = divmod(config.block_length, steps)
    # Behind the schedule (possible only if the model keeps predicting the mask itself) one token a step is asked for.
    return np.maximum(np.where(step < steps, whole + (step < rest), 1), config.num_to_transfer)


def prefill_end(rows: Rows, slots: np.ndarray, chunk: int) -> np.ndarray:
    """Where the next prefill chunk of each row ends; chunks are whole blocks."""
    chunk = max(chunk // rows.block_length, 1) * rows.block_length
    return np.minimum(rows.start[slots], rows.cached[slots] + chunk)


def plan_blocks(rows: Rows, config: DecodingConfig, chunk: int) -> BlockPlan:
    """Lay out the next forward of all active rows. A row brings up to three groups of queries, in this order:

    head    its own text from the first position without keys: a prefill chunk, a block to commit, the block being
            drafted (a finished part in front rides along and is kept), or the drafted block under verification
    copies  verification: a mask for every wanted place, seeing the head before that place (S2D2's 2L pass, without the
            rows that nobody reads)
    ahead   lookahead: if the verification may finish the block, the masks of the next one, seeing the head
    """
    slots, length = rows.active(), rows.block_length
    phase, cached, start = rows.phase[slots], rows.cached[slots], rows.start[slots]
    wanted, masks, verifying, drafting = rows.wanted[slots], rows.masks[slots], phase == VERIFY, phase == DRAFT
    lookahead = config.schedule == "lookahead"
    may_finish = verifying & lookahead & (wanted == masks).all(1)
    carries = may_finish & (start + length < rows.total[slots])

    last_wanted = length - 1 - wanted[:, ::-1].argmax(1)
    end = np.where(phase == PREFILL, prefill_end(rows, slots, chunk), start + length)
    end = np.where(verifying & ~may_finish, start + last_wanted + lookahead, end)
    heads = end - cached
    copies = np.where(verifying, wanted.sum(1), 0)
    layout = Layout(slots, heads + copies + carries * length)

    r, local = layout.row_of, layout.local
    copy, ahead = local >= heads[r], local >= (heads + copies)[r]
    copy &= ~ahead
    copy_row, copy_place = np.nonzero(wanted & verifying[:, None])
    positions = cached[r] + local
    positions[copy] = start[copy_row] + copy_place
    positions[ahead] -= copies[r][ahead]
    source = positions + np.where(verifying, rows.length - start, 0)[r]
    source[copy | ahead] = rows.length + length

    first_mask = start + masks.argmax(1)
    drafted = drafting[r] & (positions >= start[r])
    causal = np.where(drafted, config.draft_ver & (positions < first_mask[r]), config.token_causal | verifying[r])
    reach = np.where(causal & ~ahead, positions, block_end(positions, length))
    reach[copy] -= 1
    rank = np.where(copy, NOBODY, positions)

    draft_row, draft_place = np.nonzero(wanted & drafting[:, None])
    draft_query = (layout.offsets + start - cached)[draft_row] + draft_place
    ahead_row, ahead_place = np.nonzero(np.repeat(carries[:, None], length, axis=1))
    sent = send_facts(
        rows,
        config,
        source=slots[r] * rows.stride + source,
        positions=positions,
        rank=layout.padded(rank, NOBODY),
        reach=layout.padded(reach, NOTHING),
        read=np.concatenate([np.flatnonzero(copy), draft_query, np.flatnonzero(ahead)]),
        verify_row=slots[copy_row],
        verify_place=copy_place,
        fresh_row=slots[np.concatenate([draft_row, ahead_row])],
        fresh_place=np.concatenate([draft_place, ahead_place]),
        carrying=np.isin(np.arange(rows.count), slots[carries]),
    )
    # Under lookahead the decided prefix of the block is token-causal in the draft already: it stays.
    settled = np.where(lookahead, first_mask, start)
    return BlockPlan(
        request=Pass(
            layout=layout,
            tokens=rows.store.view(-1)[sent["source"]],
            positions=sent["positions"],
            visible=by_reach(sent["rank"], sent["reach"]),
            wanted=sent["read"],
            keep=np.where(verifying, 0, np.where(drafting, settled - cached, heads)),
        ),
        phases=phase,
        heads=heads,
        wanted_counts=np.where(drafting | verifying, wanted.sum(1), 0) + carries * length,
        verifies=len(copy_row),
        drafts=len(draft_row),
        aheads=len(ahead_row),
        verify_at=(sent["verify_row"], sent["verify_place"]),
        fresh_at=(sent["fresh_row"], sent["fresh_place"]),
        verify_rows=sent["verifying"].bool(),
        draft_rows=sent["drafting"].bool(),
        ahead_rows=sent["carrying"].bool(),
        facts=sent,
    )


def send_facts(rows: Rows, config: DecodingConfig, **arrays: np.ndarray) -> dict[str, torch.Tensor]:
    """Upload what decoders need to know of every row, active or not, and ``arrays``, which may replace some of it.

    ``block`` (rows, B) store index of the current block, ``position`` (rows, B), ``step`` (rows, 1), ``key`` (rows, 1),
    ``count`` (rows,) tokens the schedule asks for, ``given`` (rows,) prompt tokens in the block, ``drafting`` and
    ``verifying`` (rows,), ``verify_slots`` the rows that verify.
    """
    upload = Upload()
    position = rows.start[:, None] + np.arange(rows.block_length)
    upload.add("position", position)
    upload.add("block", np.arange(rows.count)[:, None] * rows.stride + position)
    upload.add("drafting", rows.phase == DRAFT)
    upload.add("verifying", rows.phase == VERIFY)
    upload.add("verify_slots", np.flatnonzero(rows.phase == VERIFY))
    upload.add("step", rows.step[:, None])
    upload.add("count", scheduled_count(rows.step, config))
    upload.add("key", rows.key[:, None])
    upload.add("given", (rows.prompt - rows.start).clip(0, rows.block_length))
    for name, values in arrays.items():
        upload.add(name, values)
    return upload.send(rows.device)
