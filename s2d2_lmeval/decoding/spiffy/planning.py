"""From where the rows stand and what they may draft to the next pass: the current block and draft states side by side.

What a row brings, in this order; groups of draft states see the row's text before the block and themselves only:

head       its own text from the first position without keys: a prefill chunk, a block to commit, or the block being
           denoised (a finished part in front rides along and is kept)
inside     a copy of the block per draft state that leaves a mask: its logits are wanted where the head's are
finishing  per draft state that leaves none: the finished block as it would be committed, behind it the masks of the
           next block, whose logits are wanted; if the block comes out so, its keys are kept and the next block's first
           draft is there already
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.planning import BlockPlan, prefill_end, send_facts
from s2d2_lmeval.decoding.blocks.rows import DRAFT, PREFILL, Rows
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, block_end, by_reach, in_branches


@dataclass(frozen=True)
class StatePlan(BlockPlan):
    """A pass over current blocks and draft states.

    ``inside`` and ``finishing`` (R,) draft states of each active row; on the device, of every row, ``offered`` (rows,
    S) which of the slots for states are in use and ``ends`` (rows, S) which of these finish the block. ``lookup`` (M,
    1 + S) says for each place that is read where its logits are, in the row's current state and in each draft state.
    """

    inside: np.ndarray
    finishing: np.ndarray
    offered: torch.Tensor
    ends: torch.Tensor
    lookup: torch.Tensor


PlanT = TypeVar("PlanT", bound=StatePlan)


class WriteStates(Protocol):
    """Puts draft states into the store."""

    def __call__(self, block: torch.Tensor, inside: torch.Tensor, finishing: torch.Tensor) -> torch.Tensor:
        """As many states ``inside`` and ``finishing`` (rows,) as these say may follow ``block`` (rows, B).

        Returns (rows, D, B); what is not asked for means nothing.
        """


@dataclass(frozen=True)
class StateGroups:
    """Where each packed query (N,) of ``layout`` belongs.

    ``state`` is the row's draft state, -1 in the head; ``place`` counts from the block's first position on. ``heads``
    (R,) queries; ``inside`` and ``finishing`` (R,) draft states.
    """

    layout: Layout
    heads: np.ndarray
    inside: np.ndarray
    finishing: np.ndarray
    length: int
    state: np.ndarray
    place: np.ndarray

    @classmethod
    def of(
        cls, slots: np.ndarray, heads: np.ndarray, inside: np.ndarray, finishing: np.ndarray, length: int
    ) -> StateGroups:
        layout = Layout(slots, heads + (inside + 2 * finishing) * length)
        r = layout.row_of
        behind = layout.local - heads[r]
        beyond = behind - inside[r] * length
        double = beyond >= 0
        state = np.where(double, inside[r] + beyond // (2 * length), behind // length)
        place = np.where(double, beyond % (2 * length), behind % length)
        return cls(layout, heads, inside, finishing, length, np.where(behind < 0, -1, state), place)

    def queries(self, row: np.ndarray, place: np.ndarray, head: np.ndarray) -> np.ndarray:
        """(M, 1 + S) packed query of each ``place`` (M,) of rows ``row`` (M,): in the head, where it is ``head`` (M,),
        in the states inside, and in the masks behind those that finish.
        """
        most = int((self.inside + self.finishing).max(initial=0))
        inside = self.inside[row][:, None]
        state = np.arange(most)
        copies = state * self.length
        doubles = (2 * state - inside + 1) * self.length
        drafted = self.heads[row][:, None] + np.where(state < inside, copies, doubles) + place[:, None]
        return self.layout.offsets[row][:, None] + np.hstack([head[:, None], drafted])


def plan_states(
    rows: Rows, config: DecodingConfig, chunk: int, inside: np.ndarray, finishing: np.ndarray, write_states: WriteStates
) -> StatePlan:
    """Lay out the next forward of all active rows, which offer so many draft states ``inside`` and ``finishing``
    (rows,).
    """
    slots, length = rows.active(), rows.block_length
    phase, cached, start = rows.phase[slots], rows.cached[slots], rows.start[slots]
    drafting, masks = phase == DRAFT, rows.masks[slots]
    wanted = rows.wanted[slots] & drafting[:, None]
    heads = np.where(phase == PREFILL, prefill_end(rows, slots, chunk), start + length) - cached
    groups = StateGroups.of(slots, heads, inside[slots], finishing[slots], length)
    layout, state, place = groups.layout, groups.state, groups.place
    r, drafted = layout.row_of, groups.state >= 0
    positions = np.where(drafted, start[r] + place, cached[r] + layout.local)
    source = np.where(drafted, rows.states_at + state * length + place, positions)
    source[drafted & (place >= length)] = rows.states_at - 1  # the mask token

    in_block = drafting[r] & (positions >= start[r])
    first_mask = start + masks.argmax(1)
    # The finished block is seen and kept as a commit would run it; copies of an open one are put right on the device.
    finished = drafted & (state >= groups.inside[r]) & (place < length)
    causal = np.where(in_block & ~finished, config.draft_ver & (positions < first_mask[r]), config.token_causal)
    reach = np.where(causal & ~(drafted & ~finished), positions, block_end(positions, length))

    entered = wanted | (groups.finishing > 0)[:, None]
    row, at = np.nonzero(entered)
    queries = groups.queries(row, at, (start - cached)[row] + at)
    number = np.arange(queries.shape[1])
    among = (groups.inside + groups.finishing)[row][:, None]
    read = np.where(number <= groups.inside[row][:, None], wanted[row, at][:, None], number <= among)
    lookup = np.zeros_like(queries)
    lookup[read] = np.arange(read.sum())

    open_state = np.where(drafted & ~finished & (place < length), slots[r] * rows.draft_states + state, -1)
    arrays = {
        "source": slots[r] * rows.stride + source,
        "positions": positions,
        "rank": layout.padded(positions, NOBODY),
        "reach": layout.padded(reach, NOTHING),
        "branch": layout.padded(np.where(in_block, 2 + state, 0), 0),
        "open_state": layout.padded(open_state, -1),
        "place": layout.padded(place, 0),
        "read": queries[read],
        "fresh_row": slots[row],
        "fresh_place": at,
        "lookup": lookup,
        "inside": inside,
        "finishing": finishing,
    }
    return state_plan(
        StatePlan,
        rows,
        config,
        layout,
        arrays,
        write_states,
        heads=heads,
        keep=np.where(drafting, start - cached, heads),
        wanted_counts=np.bincount(row, read.sum(1), minlength=len(slots)).astype(np.int64),
    )


def state_plan(
    kind: type[PlanT],
    rows: Rows,
    config: DecodingConfig,
    layout: Layout,
    arrays: dict[str, np.ndarray],
    write_states: WriteStates,
    *,
    heads: np.ndarray,
    keep: np.ndarray,
    wanted_counts: np.ndarray,
    **more: Any,
) -> PlanT:
    """Send ``arrays`` to the device, fill in the draft states there, and make the pass of it.

    ``open_state`` and ``place`` (R, W) among the arrays say of which draft state with masks a query is part (-1: of
    none) and where; ``lookup``, ``inside`` and ``finishing`` are as in :class:`StatePlan`, the latter two (rows,).
    """
    inside, finishing = arrays["inside"], arrays["finishing"]
    slot = np.arange(arrays["lookup"].shape[1] - 1)
    offered, ends = slot < (inside + finishing)[:, None], slot >= inside[:, None]
    sent = send_facts(rows, config, **arrays, offered=offered, ends=ends)
    reach = sent["reach"]
    if slot.size:
        states = write_states(rows.store.view(-1)[sent["block"]], sent["inside"], sent["finishing"])
        if config.draft_ver:
            reach = _causal_up_to_first_mask(states == rows.mask_token_id, sent, reach)
    return kind(
        request=Pass(
            layout=layout,
            tokens=rows.store.view(-1)[sent["source"]],
            positions=sent["positions"],
            visible=in_branches(by_reach(sent["rank"], reach), sent["branch"]),
            wanted=sent["read"],
            keep=keep,
        ),
        phases=rows.phase[layout.slots],
        heads=heads,
        wanted_counts=wanted_counts,
        verifies=0,
        drafts=len(arrays["fresh_row"]),
        aheads=0,
        verify_at=(sent["fresh_row"][:0], sent["fresh_place"][:0]),
        fresh_at=(sent["fresh_row"], sent["fresh_place"]),
        verify_rows=sent["verifying"].bool(),
        draft_rows=sent["drafting"].bool(),
        ahead_rows=torch.zeros_like(sent["drafting"], dtype=torch.bool),
        facts=sent,
        inside=inside[layout.slots],
        finishing=finishing[layout.slots],
        offered=sent["offered"].bool(),
        ends=sent["ends"].bool(),
        lookup=sent["lookup"],
        **more,
    )


def _causal_up_to_first_mask(masks: torch.Tensor, sent: dict[str, torch.Tensor], reach: torch.Tensor) -> torch.Tensor:
    """``reach`` (R, W) where the decided prefix of a draft state, as that of any open block, sees no later token.

    ``masks`` (rows, D, B) are those of the draft states.
    """
    length = masks.shape[-1]
    first_mask = torch.where(masks.any(-1), masks.long().argmax(-1), length).view(-1)
    state = sent["open_state"]
    causal = (state >= 0) & (sent["place"] < first_mask[state.clamp_min(0)])
    return torch.where(causal, sent["rank"], reach)
