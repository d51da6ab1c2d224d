"""From where the rows of a pipelined decoder stand to their next pass.

Everything is laid out on the host in numpy, for all rows at once.
"""

from __future__ import annotations

import numpy as np

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.passes import PassBuilder, Plan
from s2d2_lmeval.decoding.pipelined.rows import PipelineRows
from s2d2_lmeval.decoding.state import DRAFT, VERIFY
from s2d2_lmeval.runtime.shapes import power
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING


def plan_pipeline(
    rows: PipelineRows, config: DecodingConfig, shifted: bool, slots: np.ndarray, steady: bool = False
) -> Plan:
    """Lay out the next forward of ``slots`` (R,). A row brings up to two segments, in this order:

    text    drafting: everything from the first position without keys to the end of the last open block; decided blocks
            in front are committed by the same forward. Verifying: the drafted window, as far as it is needed
    copies  verifying, where a token's own row predicts it: a mask for every place of the verifier blocks that the span
            touches, seeing the verifier blocks before and its own masks (S2D2's 2L pass, without unread rows)

    Reads ``verify`` and ``draft``, at places of the window (:func:`window_tables`). Where the row before predicts a
    token (``shifted``), the first place after the keys has no row here: its logits were kept when the row before was
    committed. ``verify_kept`` and ``draft_kept`` are the rows that read those, at place 0 and before all others;
    ``save_slot`` says which rows' logits of place 0 to keep now, and ``save`` where they are. Which of these three
    there are is fixed. Knows ``groups``, how many draft logits each block has (of all rows, in order).
    """
    target = config.target_block_size
    verifying = rows.phase[slots] == VERIFY
    prompt, cached, base = rows.prompt[slots], rows.cached[slots], rows.base[slots]
    span = rows.span[slots] & verifying[:, None]
    texts, copies, copied = _verifier_extents(span, base, target, shifted)
    texts = np.where(verifying, texts, prompt + rows.end[slots] - cached)

    builder = PassBuilder(slots)
    text = builder.span(np.where(verifying, prompt + base, cached), texts)
    size, before = np.where(verifying, target, rows.block_length)[text.row], prompt[text.row]
    block_end = np.maximum((text.position - before) // size + 1, 0) * size
    source = text.position + np.where(verifying, rows.length - prompt, 0)[text.row]
    text.set(source=source, rank=text.position, reach=before + block_end - 1)
    masks = builder.span(prompt + copied, copies)
    block = (masks.local + copied[masks.row]) // target
    masks.set(source=rows.stride - 1, rank=NOBODY, reach=prompt[masks.row] + block * target - 1, group=block + 1)
    layout = builder.lay_out()

    tables, widest = window_tables(rows, config, slots, steady)
    row, place = np.nonzero(span)
    query = place - 1 - base[row] if shifted else place + (texts - copied)[row]
    lists = _read(builder, rows, "verify", row, place, query)
    undecided = (rows.generated[slots] == rows.mask_token_id) & (np.arange(rows.places) < rows.end[slots, None])
    row, place = np.nonzero(undecided & ~verifying[:, None])
    query = (prompt - cached)[row] + place - shifted
    lists |= _read(builder, rows, "draft", row, place, query)
    first = np.flatnonzero((place == base[row])[query >= 0] & shifted)
    lists["save_slot"] = slots[row[query >= 0][first]]
    lists["save"] = builder.groups["draft"].start + first
    lists["verify_slots"] = np.flatnonzero(rows.phase == VERIFY)
    present = tuple(int(len(lists[name]) > 0) for name in ("verify_kept", "draft_kept", "save"))
    return builder.plan(
        rows.phase[slots],
        np.where(verifying, 0, prompt + base - cached),
        widest,
        queries={"tokens": rows.store[slots[layout.row_of], builder.column("source")]},
        tables={"rank": (0, NOBODY), "reach": (0, NOTHING), "group": (0, 0)},
        rows=tables,
        lists={name: (values, 0) for name, values in lists.items()},
        known={"groups": np.unique(row * rows.blocks + place // rows.block_length, return_counts=True)[1]},
        fixed=present,
    )


def _verifier_extents(
    span: np.ndarray, base: np.ndarray, target: int, shifted: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What verifying ``span`` (R, G) takes of each row: queries of its own text from ``base`` on, masks, and the place
    of the first mask. Rows without a span get no mask.
    """
    last = span.shape[1] - 1 - span[:, ::-1].argmax(1)
    start, end = span.argmax(1) // target * target, (last // target + 1) * target
    if shifted:
        return np.maximum(((last - 1) // target + 1) * target - base, 1), np.zeros_like(base), start
    return last // target * target - base, np.where(span.any(1), end - start, 0), start


def _read(
    builder: PassBuilder, rows: PipelineRows, name: str, row: np.ndarray, place: np.ndarray, query: np.ndarray
) -> dict[str, np.ndarray]:
    """Want the logits of the generated ``place`` (K,), which the ``query``-th (K,) query of ``row`` (K,) gives. Returns
    the slots ``…_kept`` of those that were kept from an earlier forward, where it is negative, and their place
    ``…_kept_at`` in a table (count, G + 1).
    """
    fresh, slot = query >= 0, builder.slots[row]
    at = slot * (rows.places + 1) + place
    window = place - rows.base[slot]
    queries = (builder.layout.offsets[row] + query)[fresh]
    builder.read(name, row[fresh], window[fresh], queries, generated=at[fresh])
    return {f"{name}_kept": slot[~fresh], f"{name}_kept_at": at[~fresh]}


def window_tables(
    rows: PipelineRows, config: DecodingConfig, slots: np.ndarray, steady: bool
) -> tuple[dict[str, np.ndarray], int]:
    """What is undecided of the rows ``slots`` (R,): W places from their first undecided block on, and W itself, which
    takes few values if ``steady``.

    Tables (count, W): ``open`` where a row has a place; ``block`` its token, -1 where there is none; ``column`` place
    among the generated ones (G where there is none); ``position``; ``forced`` places of blocks that may be forced on.
    ``step`` and ``key`` (count, 1) name draws. Rows (count,): ``stalled``, ``drafting`` and ``verifying``.
    """
    part = np.isin(np.arange(rows.count), slots)
    widths = np.where(part, rows.end - rows.base, 0)
    blocks = int(widths.max()) // rows.block_length
    widest = min(power(blocks), rows.blocks) * rows.block_length if steady else blocks * rows.block_length
    offset = np.arange(widest)
    is_open = offset < widths[:, None]
    place = rows.base[:, None] + offset
    column = np.where(is_open, place, rows.places)
    tables = {
        "open": is_open,
        "block": np.where(is_open, np.take_along_axis(np.pad(rows.generated, ((0, 0), (0, 1))), column, axis=1), -1),
        "column": column,
        "position": rows.prompt[:, None] + place,
        "forced": np.take_along_axis(np.pad(rows.forced(config), ((0, 0), (0, 1))), column, axis=1),
        "step": rows.step[:, None],
        "key": rows.key[:, None],
        "stalled": rows.stalled,
        "drafting": (rows.phase == DRAFT) & part,
        "verifying": (rows.phase == VERIFY) & part,
    }
    return tables, widest
