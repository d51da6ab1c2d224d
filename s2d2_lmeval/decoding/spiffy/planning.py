"""From where the rows stand and what they may draft to the next pass: the current block and draft states side by side.

What a row brings, in this order; draft states see the row's text before the block, and themselves only:

text       its own text from the first position without keys: a prefill chunk, a block to commit, or the block being
           denoised (a finished part in front rides along and is kept)
inside     a copy of the block per draft state that leaves a mask: its logits are wanted where the text's are
finishing  per draft state that leaves none: the finished block as it would be committed, after it the masks of the
           next block, whose logits are wanted; if the block comes out so, its keys are kept and the next block's first
           draft is there already

Of shifted models the rows' "block" is a sub-block, and a draft state is a copy of the whole block around it, because
every query of it sees all others. One that finishes the sub-block gives the next one's first logits.

Plans read ``fresh``, several logits per place: places are ``slots_read`` and ``places_read`` (K,), and ``lookup`` (1 +
S, K) says where the logits of each lie, in the row's current state and in each draft state. Of every row, ``offered``
(rows, S) says which slots for states are in use and ``ends`` (rows, S) which of these finish the block. Plans know how
many states ``inside`` and ``finishing`` (R,) there are, and the queries ``text`` (R,).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.planning import (
    block_plan,
    end_of_block,
    read_first,
    set_text,
    subblock_text,
    text_end,
)
from s2d2_lmeval.decoding.blocks.rows import Rows
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.passes import PassBuilder, Plan, Sent
from s2d2_lmeval.decoding.state import DRAFT
from s2d2_lmeval.runtime.shapes import power
from s2d2_lmeval.runtime.visibility import by_reach, in_branches

DraftStates = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Drafts so many states ``inside`` and ``finishing`` (rows,) that may follow ``block`` (rows, B), (rows, D, B); what is
not asked for means nothing."""


class States:
    """The draft states of the active rows (R,) as a segment of their pass: ``inside`` (R,) of ``widths[0]`` queries
    each, from position ``first`` (R,) on, then ``finishing`` (R,) of ``widths[1]``.

    Of each query (K,): which ``state`` of its row, whether that ``finishes``, and its place in the state, ``local``.
    """

    def __init__(
        self,
        builder: PassBuilder,
        first: np.ndarray,
        inside: np.ndarray,
        finishing: np.ndarray,
        widths: tuple[int, int],
    ) -> None:
        self.inside, self.finishing, self.widths = inside, finishing, widths
        self.segment = builder.add(inside * widths[0] + finishing * widths[1])
        row, local = self.segment.row, self.segment.local
        beyond = local - (inside * widths[0])[row]
        self.finishes = beyond >= 0
        self.state = np.where(self.finishes, inside[row] + beyond // widths[1], local // widths[0])
        self.local = np.where(self.finishes, beyond % widths[1], local % widths[0])
        self.position = first[row] + self.local
        self.segment.set(position=self.position)

    def read(
        self,
        builder: PassBuilder,
        places: tuple[np.ndarray, np.ndarray],
        wanted: np.ndarray,
        queries: tuple[np.ndarray, np.ndarray, np.ndarray],
        most: int,
    ) -> dict[str, np.ndarray]:
        """Want the logits of ``places``, (rows, places) (M,), in all states that have some; ``wanted`` (M,) where
        those that leave a mask do. ``queries`` (M,) give each place's query in the text, in a state inside, and in a
        finishing one; ``most`` states of a row are told of.

        Returns what :class:`~s2d2_lmeval.decoding.spiffy.decoder.Spiffy` needs to find them.
        """
        row, place = places
        text, inside, finishing = queries
        state, before = np.arange(most), self.inside[row][:, None]
        copies = np.where(
            state < before,
            state * self.widths[0] + inside[:, None],
            before * self.widths[0] + (state - before) * self.widths[1] + finishing[:, None],
        )
        query = np.hstack([text[:, None], self.segment.first[row][:, None] + copies])
        number = np.arange(1 + most)
        read = np.where(number <= before, wanted[:, None], number <= (self.inside + self.finishing)[row][:, None])
        which = np.nonzero(read)
        lookup = np.zeros_like(query)
        lookup[which] = np.arange(len(which[0]))
        builder.read("fresh", row[which[0]], place[which[0]], query[which])
        return {"slots_read": builder.slots[row], "places_read": place, "lookup": lookup.T}


def plan_states(
    rows: Rows,
    config: DecodingConfig,
    whole: DecodingConfig,
    shifted: bool,
    chunk: int,
    offers: tuple[np.ndarray, np.ndarray],
    chain: int,
    steady: bool = False,
) -> Plan:
    """Lay out the next forward of all active rows, which offer so many draft states, inside and finishing (rows,), for
    a ``chain`` of at most so many steps. Numbers of states told of take few values if ``steady``.

    Where the model is ``shifted`` the rows' "block" is a sub-block; ``whole`` is the configuration of whole blocks.
    """
    slots, part, length = rows.active(), rows.block_length, whole.block_length
    cached, start, drafting = rows.cached[slots], rows.start[slots], rows.phase[slots] == DRAFT
    block, end = subblock_text(rows, slots, whole, chunk) if shifted else (start, text_end(rows, slots, chunk))
    builder = PassBuilder(slots)
    text = builder.span(cached, end - cached)
    set_text(text, rows, slots, whole)
    inside, finishing = (count[slots] for count in offers)
    states = States(builder, block, inside, finishing, (length, length if shifted else 2 * length))

    _set_states(states, rows, slots, config, length, shifted)
    builder.lay_out()
    wanted = rows.wanted[slots] & drafting[:, None]
    at_row, at = np.nonzero(wanted | (finishing > 0)[:, None])
    # A shifted model predicts a token before it; in a state that finishes, tokens of what comes next are predicted.
    before = (start - block)[at_row] + at - shifted
    query = np.maximum(before, 0)
    current = (text.first + block - cached)[at_row] + query
    drafts = int((inside + finishing).max(initial=0))
    slot = np.arange(min(power(drafts), rows.draft_states) if steady and drafts else drafts)
    queries = (current, query, before + part)
    read = states.read(builder, (at_row, at), wanted[at_row, at], queries, len(slot))
    known: dict[str, np.ndarray] = {"inside": inside, "finishing": finishing, "text": end - cached}
    keep = np.where(drafting, block, end) - cached
    told = {"inside": offers[0], "finishing": offers[1], "text_after": np.zeros(rows.count, dtype=np.int64)}
    told["text_after"][slots] = end - cached - keep
    told |= {"offered": slot < (offers[0] + offers[1])[:, None], "ends": slot >= offers[0][:, None]}
    if shifted:
        known["first"] = read_first(builder, rows, end)
    # In the table of drafted states (rows, D, B).
    of_state = builder.column("source") - rows.states_at
    of_state += np.where(of_state >= 0, slots[builder.layout.row_of] * rows.draft_states * part, 0)
    return block_plan(
        builder,
        rows,
        config,
        keep,
        queries={"of_state": of_state},
        known=known,
        tables={"branch": (0, 0), "open_state": (-1, -1), "place": (0, 0)},
        lists={name: (values, rows.count * part) for name, values in read.items()},
        moves=bool(finishing.any()) and not shifted,
        fixed=(len(slot), chain),
        given=np.zeros(rows.count, dtype=np.int64) if shifted else None,
        more=told,
    )


def _set_states(
    states: States, rows: Rows, slots: np.ndarray, config: DecodingConfig, length: int, shifted: bool
) -> None:
    """Set tokens and visibility of the queries of draft states, in blocks of ``length``."""
    part = rows.block_length
    row, place = states.segment.row, states.position - rows.start[slots][states.segment.row]
    drafted = (place >= 0) & (place < part)
    # Around a sub-block the block is as it is; after a finished one, which is run as a commit would run it, come masks.
    around = states.position if shifted else rows.states_at - 1
    committed = states.finishes & (not shifted)
    causal = committed & drafted & config.token_causal
    states.segment.set(
        source=np.where(drafted, rows.states_at + states.state * part + place, around),
        rank=states.position,
        reach=np.where(causal, states.position, end_of_block(rows, slots, row, states.position, length)),
        branch=2 + states.state,
        open_state=np.where(committed, -1, slots[row] * rows.draft_states + states.state),
        place=place,
    )


def assemble_states(
    rows: Rows, config: DecodingConfig, sent: Sent, draft_states: DraftStates
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill in the draft states on the device: the tokens (N,), and who sees whom (R, W, W)."""
    reach, tokens = sent["reach"], sent["tokens"]
    if sent.fixed[0]:
        drafted = draft_states(sent["block"], sent["inside"], sent["finishing"])
        if config.draft_ver:
            reach = _causal_up_to_first_mask(drafted == rows.mask_token_id, sent, reach)
        of_state = sent["of_state"]
        tokens = torch.where(of_state >= 0, drafted.flatten()[of_state.clamp_min(0)], tokens)
    return tokens, in_branches(by_reach(sent["rank"], reach), sent["branch"])


def _causal_up_to_first_mask(masks: torch.Tensor, sent: Sent, reach: torch.Tensor) -> torch.Tensor:
    """``reach`` (R, W) where the decided prefix of a draft state, as that of any open block, sees no later token.

    ``masks`` (rows, D, B) are those of the draft states.
    """
    length = masks.shape[-1]
    first_mask = torch.where(masks.any(-1), masks.long().argmax(-1), length).view(-1)
    state = sent["open_state"]
    causal = (state >= 0) & (sent["place"] < first_mask[state.clamp_min(0)])
    return torch.where(causal, sent["rank"], reach)
