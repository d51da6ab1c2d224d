"""From where the rows stand to the next pass: which queries, where, who sees whom, which logits.

Everything is laid out on the host in numpy, for all rows at once, and goes to the device in one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.config import DecodingConfig
from s2d2_lmeval.decoding.rows import DRAFT, PREFILL, VERIFY, Rows
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, block_end, by_reach


class Upload:
    """Collects integer arrays and moves them to the device in one transfer."""

    def __init__(self) -> None:
        self._parts: dict[str, np.ndarray] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """Take ``values`` along under ``name``."""
        self._parts[name] = np.asarray(values, dtype=np.int64)

    def send(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The arrays as int64 tensors on ``device``, shapes kept."""
        flat = np.concatenate([part.reshape(-1) for part in self._parts.values()])
        pieces = (
            torch.from_numpy(flat).to(device, non_blocking=True).split([part.size for part in self._parts.values()])
        )
        return {name: piece.view(part.shape) for (name, part), piece in zip(self._parts.items(), pieces, strict=True)}


@dataclass(frozen=True)
class BlockPlan:
    """A pass and how to read its logits: first those of drafts, then those of verifiers, each in row-major order.

    ``draft_at`` and ``verify_at`` are (rows, places) of these logits; ``draft_rows`` and ``verify_rows`` (rows,) bool
    on the device;
    ``facts`` holds per-row numbers on the device: ``block`` (rows, B) store index of the current block, ``position``
    (rows, B),
    ``step``, ``count`` (tokens the schedule asks for), ``key``, ``given`` (prompt tokens in the block), all (rows, 1).
    """

    request: Pass
    phases: np.ndarray
    wanted_counts: np.ndarray
    draft_at: tuple[torch.Tensor, torch.Tensor]
    verify_at: tuple[torch.Tensor, torch.Tensor]
    draft_rows: torch.Tensor
    verify_rows: torch.Tensor
    facts: dict[str, torch.Tensor]

    @property
    def drafts(self) -> int:
        """Number of draft logits."""
        return len(self.draft_at[0])

    @property
    def verifies(self) -> int:
        """Number of verifier logits."""
        return len(self.verify_at[0])


def scheduled_count(step: np.ndarray, config: DecodingConfig) -> np.ndarray:
    """Tokens that step ``step`` of a block must decide: the block spread over the steps, the remainder to the first
    ones.
    """
    steps = config.denoising_steps
    assert steps is not None
    whole, rest = divmod(config.block_length, steps)
    # Behind the schedule (possible only if the model keeps predicting the mask itself) one token a step is asked for.
    return np.where(step < steps, whole + (step < rest), 1)


def prefill_end(rows: Rows, slots: np.ndarray, chunk: int) -> np.ndarray:
    """Where the next prefill chunk of each row ends; chunks are whole blocks."""
    chunk = max(chunk // rows.block_length, 1) * rows.block_length
    return np.minimum(rows.start[slots], rows.cached[slots] + chunk)


def plan_blocks(rows: Rows, config: DecodingConfig, chunk: int) -> BlockPlan:
    """Lay out the next forward of all active rows.

    A row that prefills, drafts or commits brings the canvas from its first position without keys up to the end of the
    chunk or block; a finished part in front of a draft rides along and is kept. A row that verifies brings the drafted
    block up to its last wanted place and a mask for every wanted place (S2D2's 2L pass, without the places that nobody
    reads).
    """
    slots, length = rows.active(), rows.block_length
    phase, cached, start = rows.phase[slots], rows.cached[slots], rows.start[slots]
    wanted, verifying = rows.wanted[slots], phase == VERIFY
    last_wanted = length - 1 - wanted[:, ::-1].argmax(1)
    end = np.where(phase == PREFILL, prefill_end(rows, slots, chunk), start + length)
    head = np.where(verifying, last_wanted, end - cached)
    layout = Layout(slots, head + np.where(verifying, wanted.sum(1), 0))

    r, local = layout.row_of, layout.local
    copies = local >= head[r]  # the verifier's masks
    copy_row, copy_place = np.nonzero(wanted & verifying[:, None])
    positions = cached[r] + local
    positions[copies] = start[copy_row] + copy_place
    source = slots[r] * rows.stride + positions + np.where(verifying, rows.length - start, 0)[r]
    source[copies] = slots[copy_row] * rows.stride + rows.length + length

    in_block = (positions >= start[r]) & (phase == DRAFT)[r]
    first_mask = rows.masks[slots].argmax(1)
    decided_prefix = in_block & config.draft_ver & (positions < (start + first_mask)[r])
    causal = decided_prefix | (verifying[r] & ~copies) | (~in_block & config.token_causal)
    reach = np.where(causal, positions, block_end(positions, length))
    reach[copies] = positions[copies] - 1
    rank = np.where(copies, NOBODY, positions)

    draft_row, draft_place = np.nonzero(wanted & (phase == DRAFT)[:, None])
    read = np.concatenate([(layout.offsets + start - cached)[draft_row] + draft_place, np.flatnonzero(copies)])
    sent = _send(
        rows,
        config,
        source=source,
        positions=positions,
        rank=layout.padded(rank, NOBODY),
        reach=layout.padded(reach, NOTHING),
        read=read,
        draft_row=slots[draft_row],
        draft_place=draft_place,
        verify_row=slots[copy_row],
        verify_place=copy_place,
    )
    keep = np.where(verifying, 0, np.where(phase == DRAFT, start, end) - cached)
    return BlockPlan(
        request=Pass(
            layout=layout,
            tokens=rows.store.view(-1)[sent["source"]],
            positions=sent["positions"],
            visible=by_reach(sent["rank"], sent["reach"]),
            wanted=sent["read"],
            keep=keep,
        ),
        phases=phase,
        wanted_counts=np.where((phase == DRAFT) | verifying, wanted.sum(1), 0),
        draft_at=(sent["draft_row"], sent["draft_place"]),
        verify_at=(sent["verify_row"], sent["verify_place"]),
        draft_rows=sent["drafting"].bool(),
        verify_rows=sent["verifying"].bool(),
        facts=sent,
    )


def _send(rows: Rows, config: DecodingConfig, **arrays: np.ndarray) -> dict[str, torch.Tensor]:
    """Upload ``arrays`` and what the decoder needs to know of every row (active or not)."""
    upload = Upload()
    for name, values in arrays.items():
        upload.add(name, values)
    position = rows.start[:, None] + np.arange(rows.block_length)
    upload.add("position", position)
    upload.add("block", np.arange(rows.count)[:, None] * rows.stride + position)
    upload.add("drafting", rows.phase == DRAFT)
    upload.add("verifying", rows.phase == VERIFY)
    upload.add("step", rows.step[:, None])
    upload.add("count", scheduled_count(rows.step, config))
    upload.add("key", rows.key[:, None])
    upload.add("given", (rows.prompt - rows.start).clip(0, rows.block_length))
    upload.add("verify_slots", np.flatnonzero(rows.phase == VERIFY))
    return upload.send(rows.device)
