"""From where the rows of a pipelined decoder stand to their next pass.

Everything is laid out on the host in numpy, for all rows at once, and goes to the device in one transfer.
"""

from __future__ import annotations

import numpy as np

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.passes import PassBuilder, Plan
from s2d2_lmeval.decoding.pipelined.rows import PipelineRows
from s2d2_lmeval.decoding.state import DRAFT, VERIFY
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, by_reach, with_group


def plan_pipeline(rows: PipelineRows, config: DecodingConfig, shifted: bool, slots: np.ndarray) -> Plan:
    """Lay out the next forward of ``slots`` (R,). A row brings up to two segments, in this order:

    text    drafting: everything from the first position without keys to the end of the last open block; decided blocks
            in front are committed by the same forward. Verifying: the drafted window, as far as it is needed
    copies  verifying, where a token's own row predicts it: a mask for every place of the verifier blocks that the span
            touches, seeing the verifier blocks before and its own masks (S2D2's 2L pass, without unread rows)

    Reads ``verify`` and ``draft``, at places of the window (:func:`window_tables`). Where the row before predicts a
    token (``shifted``), the first place after the keys has no row here: its logits were kept when the row before was
    committed. ``verify_kept`` and ``draft_kept`` are the rows that read those, at place 0 and before all others;
    ``save`` (2, K) says which rows' logits of place 0 to keep now, and where they are among the draft's. Knows
    ``groups``, how many draft logits each block has (of all rows, in order).
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
    block_end = ((text.position - before) // size + 1).clip(0) * size
    source = text.position + np.where(verifying, rows.length - prompt, 0)[text.row]
    text.set(source=source, rank=text.position, reach=before + block_end - 1)
    masks = builder.span(prompt + copied, copies)
    block = (masks.local + copied[masks.row]) // target
    masks.set(source=rows.stride - 1, rank=NOBODY, reach=prompt[masks.row] + block * target - 1, group=block + 1)
    layout = builder.lay_out()

    row, place = np.nonzero(span)
    query = place - 1 - base[row] if shifted else place + (texts - copied)[row]
    verify_kept = _read(builder, "verify", row, place - base[row], query)
    undecided = (rows.generated[slots] == rows.mask_token_id) & (np.arange(rows.places) < rows.end[slots, None])
    row, place = np.nonzero(undecided & ~verifying[:, None])
    query = (prompt - cached)[row] + place - shifted
    draft_kept = _read(builder, "draft", row, place - base[row], query)
    first = np.flatnonzero((place == base[row])[query >= 0] & shifted)
    save = np.stack([slots[row[query >= 0][first]], first])
    facts = {"verify_kept": verify_kept, "draft_kept": draft_kept, "save": save}
    facts |= {"source": slots[layout.row_of] * rows.stride + builder.column("source")}
    facts |= {name: builder.padded(name, fill) for name, fill in (("rank", NOBODY), ("reach", NOTHING), ("group", 0))}
    sent = builder.send(rows.device, **window_tables(rows, config, slots), **facts)
    sent |= {name: sent[name].bool() for name in ("open", "forced", "stalled", "drafting", "verifying")}
    visible = by_reach(sent["rank"], sent["reach"])
    visible = with_group(visible, sent["group"]) if target > 1 else visible
    return builder.plan(
        sent,
        rows.phase[slots],
        tokens=rows.store.view(-1)[sent["source"]],
        visible=visible,
        keep=np.where(verifying, 0, prompt + base - cached),
        groups=np.unique(row * rows.blocks + place // rows.block_length, return_counts=True)[1],
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


def _read(builder: PassBuilder, name: str, row: np.ndarray, place: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Want the logits of ``place`` (K,), which the ``query``-th (K,) query of ``row`` (K,) gives; the slots of those
    that were kept from an earlier forward, where it is negative.
    """
    fresh = query >= 0
    builder.read(name, row[fresh], place[fresh], (builder.layout.offsets[row] + query)[fresh])
    return builder.slots[row[~fresh]]


def window_tables(rows: PipelineRows, config: DecodingConfig, slots: np.ndarray) -> dict[str, np.ndarray]:
    """What is undecided of the rows ``slots`` (R,): W places from their first undecided block on.

    Tables (count, W): ``open`` where a row has a place; ``cell`` index of its token in the flattened store, ``drafted``
    of the same place with masks drafted; ``column`` place among the generated ones (G where there is none);
    ``position``; ``forced`` places of blocks that may be forced on. ``step`` and ``key`` (count, 1) name draws.
    Rows (count,): ``stalled``, ``drafting`` and ``verifying``; ``verify_slots`` (K,) are the rows that verify.
    """
    part = np.isin(np.arange(rows.count), slots)
    verifying = (rows.phase == VERIFY) & part
    widths = np.where(part, rows.end - rows.base, 0)
    offset = np.arange(int(widths.max()))
    is_open = offset < widths[:, None]
    place = rows.base[:, None] + offset
    begins = np.arange(rows.count)[:, None] * rows.stride
    nowhere = begins + rows.stride - 1
    column = np.where(is_open, place, rows.places)
    return {
        "open": is_open,
        "cell": np.where(is_open, begins + rows.prompt[:, None] + place, nowhere),
        "drafted": np.where(is_open, begins + rows.length + place, nowhere),
        "column": column,
        "position": rows.prompt[:, None] + place,
        "forced": np.take_along_axis(np.pad(rows.forced(config), ((0, 0), (0, 1))), column, axis=1),
        "step": rows.step[:, None],
        "key": rows.key[:, None],
        "stalled": rows.stalled,
        "drafting": (rows.phase == DRAFT) & part,
        "verifying": verifying,
        "verify_slots": np.flatnonzero(verifying),
    }
