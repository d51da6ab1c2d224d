"""Plan the next pass from the state of the rows: queries, positions, visibility, wanted logits.

Everything is laid out on the host in numpy, for all rows at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from s2d2_lmeval.decoding.blocks.rows import Rows
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.passes import PassBuilder, Plan, Segment
from s2d2_lmeval.decoding.state import COMMIT, DRAFT, PREFILL, VERIFY
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, block_end


def scheduled_count(
    step: np.ndarray | int, config: DecodingConfig, fresh: np.ndarray | int | None = None
) -> np.ndarray:
    """Tokens that step ``step`` of a block must decide: the block divided by the steps, with the remainder in the first
    ones; at least ``num_to_transfer``. ``transfer_counts`` may divide the masks ``fresh`` at the block's beginning
    (None: all of it) instead, or divide them otherwise.
    """
    steps, masks = config.steps, config.block_length if fresh is None else fresh
    if config.transfer_counts == "rounded":
        return rounded_counts(config.block_length, steps)[masks, np.minimum(step, steps)]
    whole, rest = np.divmod(masks if config.transfer_counts == "masks" else config.block_length, steps)
    # After the schedule (possible only if the model keeps predicting the mask) a step must decide one token.
    return np.maximum(np.where(step < steps, whole + (step < rest), 1), config.num_to_transfer)


@lru_cache(maxsize=16)
def rounded_counts(length: int, steps: int) -> np.ndarray:
    """(1 + length, 1 + steps) tokens per step of a block with so many masks: the masks left divided by the steps left,
    rounded half to even; steps of none are left out, and after the last step one is decided.
    """
    table = np.ones((1 + length, 1 + steps), dtype=np.int64)
    for masks in range(1, 1 + length):
        counts, left = [], masks
        for remaining in range(steps, 0, -1):
            counts += [round(left / remaining)] * (round(left / remaining) > 0)
            left -= round(left / remaining)
        table[masks, : len(counts)] = counts
    return table


def text_end(rows: Rows, slots: np.ndarray, chunk: int) -> np.ndarray:
    """Where the text that each row brings ends: with a prefill chunk of whole blocks, or with the current block, or, in
    a draft, with the last block in work.
    """
    start, ahead = rows.start[slots], (rows.phase == DRAFT) * (rows.width - rows.block_length)
    end = np.minimum(rows.start + rows.block_length + ahead, rows.total)[slots]
    return np.where(rows.phase[slots] == PREFILL, prefill_end(rows, slots, rows.block_length, chunk, start), end)


def prefill_end(rows: Rows, slots: np.ndarray, length: int, chunk: int, most: np.ndarray) -> np.ndarray:
    """(R,) where a prefill chunk of about ``chunk`` tokens ends: with a block of ``length``, at ``most`` (R,)."""
    end = rows.cached[slots] + max(chunk, length)
    return np.minimum(most, end - (end + rows.offset[slots]) % length)


def end_of_block(
    rows: Rows, slots: np.ndarray, segment_row: np.ndarray, position: np.ndarray, length: int
) -> np.ndarray:
    """(K,) where the blocks of ``length`` end that hold each ``position`` (K,) of the active rows ``segment_row``."""
    offset = rows.offset[slots][segment_row]
    return block_end(position + offset, length) - offset


def set_text(text: Segment, rows: Rows, slots: np.ndarray, config: DecodingConfig) -> None:
    """Set tokens and visibility of the queries of the rows' own text; ``config`` is that of whole blocks."""
    row, position, start, phase = text.row, text.position, rows.start[slots], rows.phase[slots]
    verifying, block = phase == VERIFY, rows.block_start(config.block_length)[slots]
    source, drafted = position, (phase == DRAFT)[row] & (position >= block[row])
    causal = ~drafted & (config.token_causal | verifying)[row]
    if config.draft_ver:
        causal |= drafted & (position < (start + rows.masks[slots].argmax(1))[row])
    if verifying.any():  # a verifier reads the drafted block, which lies after the canvas
        source = position + (verifying[row] & (position >= start[row])) * (rows.length - start)[row]
    reach = end_of_block(rows, slots, row, position, config.block_length)
    text.set(source=source, rank=position, reach=np.where(causal, position, reach), branch=drafted)


def plan_blocks(rows: Rows, config: DecodingConfig, chunk: int) -> Plan:
    """Lay out the next forward of all active rows. A row brings up to three segments, in this order:

    text    its own tokens from the first position without keys: a prefill chunk, a block to commit, the block being
            drafted (a finished part before it is also run and kept), or the drafted block under verification
    copies  verification: a mask for every wanted place, which sees the text before that place (S2D2's 2L pass, without
            the unread rows)
    ahead   lookahead: if the verification may finish the block, the masks of the next one, seeing the text

    Reads ``verify`` and ``fresh``, the drafts of this block and the next, and tells which are ``overdue``
    (:func:`overdue`); knows ``text`` (R,), the queries of the first segment. Sends ``carries``, the rows with an
    ``ahead``.
    """
    slots, length = rows.active(), rows.block_length
    phase, cached, start = rows.phase[slots], rows.cached[slots], rows.start[slots]
    wanted, masks, verifying, drafting = rows.wanted[slots], rows.masks[slots], phase == VERIFY, phase == DRAFT
    lookahead, verifies = config.schedule == "lookahead", bool(verifying.any())
    end, more = text_end(rows, slots, chunk), {}
    if verifies:
        may_finish = verifying & lookahead & (wanted == masks).all(1)
        carries = may_finish & (start + 2 * length <= rows.total[slots])
        last_wanted = start + length - 1 - wanted[:, ::-1].argmax(1)
        end = np.where(verifying & ~may_finish, last_wanted + lookahead, end)

    builder = PassBuilder(slots)
    text = builder.span(cached, end - cached)
    set_text(text, rows, slots, config)
    mask = rows.length + rows.width
    if verifies:
        copy_row, copy_place = (wanted & verifying[:, None]).nonzero()
        copies = builder.each(copy_row, start[copy_row] + copy_place)
        copies.set(source=mask, rank=NOBODY, reach=copies.position - 1)
        ahead = builder.span(start + length, carries * length)
        ahead.set(source=mask, rank=ahead.position, reach=end_of_block(rows, slots, ahead.row, ahead.position, length))

    builder.lay_out()
    row, place = (wanted & drafting[:, None]).nonzero()
    query = (text.first + start - cached)[row] + place
    late = overdue(rows, slots, config)
    of_fresh = late[row]
    if verifies:
        builder.read("verify", copy_row, copy_place, copies.query, overdue=late[copy_row])
        # The next block's draft is at its first step.
        of_fresh = np.concatenate([of_fresh, np.zeros(len(ahead.row), dtype=bool)])
        fresh = (row, ahead.row), (place, ahead.local), (query, ahead.query)
        row, place, query = map(np.concatenate, fresh)
    builder.read("fresh", row, place, query, overdue=of_fresh)
    more["carries"] = np.zeros(rows.count, dtype=np.int64)
    if verifies:
        more["carries"][slots] = carries
    # Under lookahead the draft already runs the decided prefix of the block token-causally: it stays.
    settled = start + masks.argmax(1) if lookahead else start
    keep = np.where(verifying, 0, np.where(drafting, settled, end) - cached)
    return block_plan(builder, rows, config, keep, known={"text": end - cached}, more=more)


def overdue(rows: Rows, slots: np.ndarray, config: DecodingConfig) -> np.ndarray:
    """(R,) whose block has masks although all steps of its schedule are over."""
    return (rows.step[slots] >= config.steps) & rows.masks[slots, : rows.block_length].any(1)


def plan_subblocks(rows: Rows, config: DecodingConfig, whole: DecodingConfig, chunk: int, narrow: np.ndarray) -> Plan:
    """Lay out the next forward of all active rows of a shifted model, whose rows' "block" is a sub-block; ``whole`` is
    the configuration of whole blocks. What a row brings:

    prefill, commit  text without keys up to the block's first position; if that is where the block begins to be
                     decoded, the last query gives its first token
    draft            the whole block (and text before it that may ride along). With ``use_block_cache`` the sub-block
                     comes last, so that the rest of the block can be kept without it; and where ``narrow`` (rows,) it
                     comes alone, with the keys of that rest before it
    verify           the block up to the last drafted token's predecessor, token-causal

    Reads ``verify``, ``fresh`` and ``first``; knows the rows whose ``first`` (R,) token comes.
    """
    slots, part = rows.active(), rows.block_length
    phase, cached, start = rows.phase[slots], rows.cached[slots], rows.start[slots]
    drafting, verifying = phase == DRAFT, phase == VERIFY
    wanted, narrow = rows.wanted[slots] & (drafting | verifying)[:, None], narrow[slots] & drafting
    block, end = subblock_text(rows, slots, whole, chunk)
    end = np.where(verifying, start + part - 1 - wanted[:, ::-1].argmax(1), end)
    begin, end = np.where(narrow, start, cached), np.where(narrow, start + part, end)
    last = drafting & ~narrow & config.use_block_cache

    builder = PassBuilder(slots)
    text = builder.span(begin, np.where(last, start, end) - begin)
    rest = builder.span(start + part, last * (end - start - part))
    subblock = builder.span(start, last * part)
    for segment in (text, rest, subblock) if last.any() else (text,):
        set_text(segment, rows, slots, whole)

    builder.lay_out()
    late = overdue(rows, slots, config)
    for name, among in (("verify", verifying), ("fresh", drafting)):
        row, place = (wanted & among[:, None]).nonzero()
        # The query before a token predicts it; if the pass has none, or masks predict their own token, its own.
        shift = name == "verify" or rows.shifted_drafts
        before = np.maximum(start[row] + place - shift, np.where(narrow, start, block)[row])
        inside = last[row] & (before >= start[row])
        query = np.where(inside, (subblock.first - start)[row], (text.first - begin)[row]) + before
        builder.read(name, row, place, query, overdue=late[row])
    first = read_first(builder, rows, end)
    keep = np.where(verifying, 0, np.where(drafting, block, end) - cached)
    # Progress is the decided share of the sub-block, including prompt tokens.
    return block_plan(builder, rows, config, keep, known={"first": first}, given=np.zeros(rows.count, dtype=np.int64))


def subblock_text(rows: Rows, slots: np.ndarray, whole: DecodingConfig, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(R,) where the block around each row's sub-block begins, and where the text that the row brings ends."""
    length = whole.block_length
    block = rows.block_start(length)[slots]
    prefill = prefill_end(rows, slots, length, chunk, block)
    return block, np.where(rows.phase[slots] == DRAFT, block + length, prefill)


def read_first(builder: PassBuilder, rows: Rows, end: np.ndarray) -> np.ndarray:
    """Want the logits that begin a block, where the text up to it ``end`` (R,)s there. Returns in which rows (R,)."""
    slots, layout = builder.slots, builder.layout
    phase = rows.phase[slots]
    due = ((phase == PREFILL) | (phase == COMMIT)) & (end == rows.start[slots]) & rows.masks[slots, 0]
    row = np.flatnonzero(due)
    builder.read("first", row, np.zeros_like(row), (layout.offsets + layout.widths - 1)[row], begins=np.ones_like(row))
    return due


def block_plan(
    builder: PassBuilder,
    rows: Rows,
    config: DecodingConfig,
    keep: np.ndarray,
    *,
    known: dict[str, Any],
    queries: Mapping[str, np.ndarray] = MappingProxyType({}),
    tables: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    lists: Mapping[str, tuple[np.ndarray, int]] = MappingProxyType({}),
    moves: bool = False,
    fixed: tuple[int, ...] = (),
    given: np.ndarray | None = None,
    more: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Plan:
    """The plan of a pass that feeds from the rows' store.

    It tells of every row, active or not: ``block`` (rows, W) tokens of the current block, ``position`` (rows, W),
    ``step`` (rows, 1 or W), ``key`` (rows, 1), ``count`` (rows,) tokens the schedule asks for, ``given`` (rows,) prompt
    tokens in the block, ``room`` (rows,) places before the last block's end, ``drafting`` and ``verifying`` (rows,),
    and ``more``, under names of its own; lists ``verify_slots``, the rows that verify; and ``tokens`` (N,),
    ``rank`` and ``reach`` (R, W) of queries.
    """
    position = rows.start[:, None] + np.arange(rows.width)
    source = np.minimum(builder.column("source"), rows.states_at - 1)
    tokens = rows.store[builder.slots[builder.layout.row_of], source]
    told = {
        "position": position,
        "block": rows.block,
        "drafting": rows.phase == DRAFT,
        "verifying": rows.phase == VERIFY,
        "step": rows.draw,
        "count": scheduled_count(rows.step, config, rows.fresh),
        "key": rows.key[:, None],
        "given": np.minimum(np.maximum(rows.prompt - rows.start, 0), rows.width) if given is None else given,
        "room": rows.total - rows.start,
        "in_flight": np.array([len(builder.slots)]),
    }
    assert not told.keys() & more.keys(), "two facts of the rows have one name"
    return builder.plan(
        rows.phase[builder.slots],
        keep,
        rows.width,
        queries={"tokens": tokens, **queries},
        tables={"rank": (0, NOBODY), "reach": (0, NOTHING), **tables},
        rows={**told, **more},
        lists={"verify_slots": ((rows.phase == VERIFY).nonzero()[0], 0), **lists},
        known=known,
        moves=moves,
        fixed=fixed,
    )
