"""The block-diffusion training objective of SDAR: noised copies of the answer beside a clean copy of the text.

A row holds ``clean | view | view``. A noised block sees the clean blocks before it and, in both directions, itself; a
clean block sees the clean blocks up to itself. Blocks are counted from absolute position 0. With block size 1 this is
left-to-right prediction: every answer position is a lone mask that sees the clean tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALL_MASKED = 0.15
"""Share of blocks that are masked whole, as the first step of decoding a block sees them."""

Example = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer, the end token included."""


@dataclass(frozen=True)
class Batch:
    """Input of one training step, shapes as in :meth:`recipes.toy.network.Network.forward`.

    ``targets`` (number of wanted,) are the true tokens at the wanted positions.
    """

    tokens: Tensor
    positions: Tensor
    visible: Tensor
    wanted: Tensor
    targets: Tensor


def make_batch(examples: list[Example], block: int, mask_id: int, end_id: int, generator: torch.Generator) -> Batch:
    """Noise ``examples`` at one block size: one view for block size 1, else two views with complementary masks."""
    prompt = torch.tensor([len(p) for p, _ in examples])
    total = prompt + torch.tensor([len(a) for _, a in examples])
    end = -(-total // block) * block  # the end token's block is predicted to its end
    clean = torch.full((len(examples), int(end.max())), end_id)
    for row, (prompt_ids, answer_ids) in enumerate(examples):
        clean[row, : total[row]] = torch.tensor(prompt_ids + answer_ids)

    start = prompt // block * block
    window = start[:, None] + torch.arange(int((end - start).max()))
    in_window = window < end[:, None]
    window = window.clamp(max=clean.shape[1] - 1)
    truth = clean.gather(1, window)
    is_answer = in_window & (window >= prompt[:, None])
    views = [view & is_answer for view in _noise(window // block, block, generator)]

    everywhere = torch.arange(clean.shape[1]).expand_as(clean)
    position = torch.cat((everywhere, *[window] * len(views)), 1)
    segment = torch.zeros(clean.shape[1])  # 0 for the clean copy, then the number of the view
    segment = torch.cat((segment, *(torch.full(window.shape[1:], i + 1.0) for i in range(len(views)))))
    valid = torch.cat((everywhere < total[:, None], *[in_window] * len(views)), 1)
    wanted = torch.cat((torch.zeros_like(clean, dtype=torch.bool), *views), 1)
    return Batch(
        tokens=torch.cat((clean, *(torch.where(view, mask_id, truth) for view in views)), 1),
        positions=position,
        visible=_visibility(position // block, segment, valid)[:, None],
        wanted=wanted,
        targets=torch.cat((clean, *[truth] * len(views)), 1)[wanted],
    )


def _noise(blocks: Tensor, block: int, generator: torch.Generator) -> list[Tensor]:
    """Masks per view, each the shape of ``blocks`` (block number of every position): one noise level per block."""
    if block == 1:
        return [torch.ones_like(blocks, dtype=torch.bool)]
    rows, count = blocks.shape[0], int(blocks.max()) + 1
    level = torch.rand(rows, count, generator=generator).gather(1, blocks)
    noised = torch.rand(blocks.shape, generator=generator) < level
    whole = [torch.rand(rows, count, generator=generator).gather(1, blocks) < ALL_MASKED for _ in range(2)]
    return [noised | whole[0], ~noised | whole[1]]


def _visibility(block: Tensor, segment: Tensor, valid: Tensor) -> Tensor:
    """(rows, length, length) bool, from block number and validity per (row, position) and segment per position."""
    query, key = block[:, :, None], block[:, None, :]
    query_segment, key_segment = segment[:, None], segment[None, :]
    from_clean = query_segment == 0
    to_clean = key_segment == 0
    visible = (from_clean & to_clean & (key <= query)) | (~from_clean & to_clean & (key < query))
    visible |= ~from_clean & (query_segment == key_segment) & (key == query)
    visible &= valid[:, None, :]
    return visible | torch.eye(len(segment), dtype=torch.bool)  # no row of padding is empty
