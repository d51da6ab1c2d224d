"""From where the rows of a pipelined decoder stand to their next pass.

Everything is laid out on the host in numpy, for all rows at once, and goes to the device in one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.passes import Upload
from s2d2_lmeval.decoding.pipelined.rows import PipelineRows
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.state import DRAFT, VERIFY
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, by_reach, with_mates


@dataclass(frozen=True)
class Window:
    """What is undecided of every row, on the device: W places from its first undecided block on, tables (count, W).

    ``block`` tokens, -1 where a row has no place; ``open`` where it has one; ``cell`` index of the token in the
    flattened store, ``drafted`` of the same place with masks drafted; ``column`` place (G where there is none);
    ``position``; ``forced`` places of blocks that may be forced on. ``step`` and ``key`` (count, 1) name draws;
    ``drafting`` and ``verifying`` (count,) rows.
    """

    block: torch.Tensor
    open: torch.Tensor
    cell: torch.Tensor
    drafted: torch.Tensor
    column: torch.Tensor
    position: torch.Tensor
    forced: torch.Tensor
    step: torch.Tensor
    key: torch.Tensor
    drafting: torch.Tensor
    verifying: torch.Tensor

    def draws(self, purpose: int) -> random.Key:
        """Names draws at every place: a place is drawn at most once per purpose and iteration."""
        return random.Key(purpose, self.key, self.position, self.step)


@dataclass(frozen=True)
class Wanted:
    """Logits of one kind: those that were kept from an earlier forward, then those of this forward.

    ``at`` (rows, places in the window) of both; ``kept`` (K,) rows whose kept logits are meant; ``count`` of this
    forward.
    """

    at: tuple[torch.Tensor, torch.Tensor]
    kept: torch.Tensor
    count: int


@dataclass(frozen=True)
class PipelinePlan:
    """A pass and how to read its logits: first those of verifiers, then those of drafts.

    ``verify_slots`` are the rows that verify; ``save_rows`` and ``save_from`` say which rows' logits of their first
    place to keep, and where they are among this forward's draft logits; ``groups`` how many draft logits each block
    has (of all rows, in order).
    """

    request: Pass
    phases: np.ndarray
    wanted_counts: np.ndarray
    widths: np.ndarray
    verify: Wanted
    draft: Wanted
    verify_slots: torch.Tensor
    save_rows: torch.Tensor
    save_from: torch.Tensor
    stalled: torch.Tensor
    groups: list[int]
    window: Window


@dataclass(frozen=True)
class Reading:
    """On the host: which rows (indices of the pass) and places want logits, and the query that has them.

    -1 where the logits were kept from an earlier forward.
    """

    row: np.ndarray
    place: np.ndarray
    query: np.ndarray

    def ordered(self) -> Reading:
        """Kept ones first."""
        order = np.argsort(self.query >= 0, kind="stable")
        return Reading(self.row[order], self.place[order], self.query[order])

    @property
    def fresh(self) -> np.ndarray:
        """Those of this forward."""
        return self.query >= 0


def plan_pipeline(rows: PipelineRows, config: DecodingConfig, shifted: bool, slots: np.ndarray) -> PipelinePlan:
    """Lay out the next forward of ``slots``. A row brings up to two groups of queries, in this order:

    head    drafting: everything from the first position without keys to the end of the last open block; decided blocks
            in front are committed by the same forward. Verifying: the drafted window, as far as it is needed
    copies  verifying, where a token's own row predicts it: a mask for every place of the verifier blocks that the span
            touches, seeing the verifier blocks before and its own masks (S2D2's 2L pass, without unread rows)

    Where the row before predicts a token (``shifted``), the first place after the keys has no row in the window: its
    logits were kept when the row before was committed.
    """
    target = config.target_block_size
    verifying = rows.phase[slots] == VERIFY
    prompt, cached, base = rows.prompt[slots], rows.cached[slots], rows.base[slots]
    span = rows.span[slots] & verifying[:, None]
    heads, copies, copy_from = _verifier_extents(span, base, target, shifted)
    heads = np.where(verifying, heads, prompt + rows.end[slots] - cached)
    layout = Layout(slots, heads + copies)

    r, local = layout.row_of, layout.local
    copy = local >= heads[r]
    place = np.where(verifying, base, cached - prompt)[r] + local
    place[copy] = (copy_from - heads)[r][copy] + local[copy]
    source = np.where(verifying, rows.length, prompt)[r] + place
    source[copy] = rows.stride - 1
    size = np.where(verifying, target, rows.block_length)[r]
    block_start = place // size * size
    reach = np.where(copy, block_start, np.where(place < 0, 0, block_start + size)) + prompt[r] - 1
    rank = np.where(copy, NOBODY, prompt[r] + place)
    mates = np.where(copy & (target > 1), place // target + 1, 0)

    verify = _verify_reading(layout, span, base, heads - copy_from, shifted)
    draft = _draft_reading(layout, rows, slots, verifying, shifted)
    read = np.concatenate([verify.row[verify.fresh], draft.row[draft.fresh]])
    arrays = {
        "source": slots[r] * rows.stride + source,
        "positions": prompt[r] + place,
        "rank": layout.padded(rank, NOBODY),
        "reach": layout.padded(reach, NOTHING),
        "mates": layout.padded(mates, 0),
        "read": np.concatenate([verify.query[verify.fresh], draft.query[draft.fresh]]),
    }
    sent, widths = _send(rows, config, shifted, slots, arrays, {"verify": verify, "draft": draft})
    visible = by_reach(sent["rank"], sent["reach"])
    visible = with_mates(visible, sent["mates"]) if target > 1 else visible
    tokens, keep = rows.store.view(-1)[sent["source"]], np.where(verifying, 0, prompt + base - cached)
    groups = np.unique(draft.row * rows.blocks + draft.place // rows.block_length, return_counts=True)[1]
    return PipelinePlan(
        request=Pass(layout, tokens, sent["positions"], visible, sent["read"], keep),
        phases=rows.phase[slots],
        wanted_counts=np.bincount(read, minlength=len(slots)),
        widths=widths,
        verify=_wanted("verify", verify, sent),
        draft=_wanted("draft", draft, sent),
        verify_slots=sent["verify_slots"],
        save_rows=sent["save_rows"],
        save_from=sent["save_from"],
        stalled=sent["stalled"].bool(),
        groups=groups.tolist(),
        window=_window(rows, sent),
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


def _verify_reading(layout: Layout, span: np.ndarray, base: np.ndarray, offset: np.ndarray, shifted: bool) -> Reading:
    """Where the verifier's word on each place of ``span`` (R, G) is found."""
    row, place = np.nonzero(span)
    query = place - 1 - base[row] if shifted else place + offset[row]
    return Reading(row, place, np.where(query < 0, -1, query + layout.offsets[row])).ordered()


def _draft_reading(
    layout: Layout, rows: PipelineRows, slots: np.ndarray, verifying: np.ndarray, shifted: bool
) -> Reading:
    """Where the draft of each undecided place of the drafting rows is found."""
    undecided = (rows.generated[slots] == rows.mask_token_id) & (np.arange(rows.places) < rows.end[slots, None])
    row, place = np.nonzero(undecided & ~verifying[:, None])
    query = (rows.prompt - rows.cached)[slots][row] + place - shifted
    return Reading(row, place, np.where(query < 0, -1, query + layout.offsets[row])).ordered()


def _wanted(name: str, reading: Reading, sent: dict[str, torch.Tensor]) -> Wanted:
    rows, places = sent[f"{name}_row"], sent[f"{name}_place"]
    fresh = int(reading.fresh.sum())
    return Wanted((rows, places), rows[: len(rows) - fresh], fresh)


def _send(
    rows: PipelineRows,
    config: DecodingConfig,
    shifted: bool,
    slots: np.ndarray,
    arrays: dict[str, np.ndarray],
    readings: dict[str, Reading],
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Upload ``arrays``, ``readings`` and what decoders need to know of every row; also the rows' window widths."""
    widths = np.zeros(rows.count, dtype=np.int64)
    widths[slots] = (rows.end - rows.base)[slots]
    offset = np.arange(int(widths.max()))
    is_open = offset < widths[:, None]
    place = rows.base[:, None] + offset
    row = np.arange(rows.count)[:, None]
    nowhere = row * rows.stride + rows.stride - 1
    column = np.where(is_open, place, rows.places)
    upload = Upload()
    for name, values in arrays.items():
        upload.add(name, values)
    for name, reading in readings.items():
        upload.add(f"{name}_row", slots[reading.row])
        upload.add(f"{name}_place", reading.place - rows.base[slots][reading.row])
    draft = readings["draft"]
    first = draft.fresh & (draft.place == rows.base[slots][draft.row]) & shifted
    upload.add("save_rows", slots[draft.row[first]])
    upload.add("save_from", np.flatnonzero(first) - (~draft.fresh).sum())
    upload.add("open", is_open)
    upload.add("cell", np.where(is_open, row * rows.stride + rows.prompt[:, None] + place, nowhere))
    upload.add("drafted", np.where(is_open, row * rows.stride + rows.length + place, nowhere))
    upload.add("column", column)
    upload.add("position", rows.prompt[:, None] + place)
    padded = np.pad(rows.forced(config), ((0, 0), (0, 1)))
    upload.add("forced", np.take_along_axis(padded, column, axis=1))
    upload.add("step", rows.step[:, None])
    upload.add("key", rows.key[:, None])
    upload.add("stalled", rows.stalled)
    taking_part = np.isin(np.arange(rows.count), slots)
    upload.add("drafting", (rows.phase == DRAFT) & taking_part)
    upload.add("verifying", (rows.phase == VERIFY) & taking_part)
    upload.add("verify_slots", np.flatnonzero((rows.phase == VERIFY) & taking_part))
    return upload.send(rows.device), widths


def _window(rows: PipelineRows, sent: dict[str, torch.Tensor]) -> Window:
    is_open = sent["open"].bool()
    return Window(
        block=rows.store.view(-1)[sent["cell"]].masked_fill(~is_open, -1),
        open=is_open,
        cell=sent["cell"],
        drafted=sent["drafted"],
        column=sent["column"],
        position=sent["position"],
        forced=sent["forced"].bool(),
        step=sent["step"],
        key=sent["key"],
        drafting=sent["drafting"].bool(),
        verifying=sent["verifying"].bool(),
    )
