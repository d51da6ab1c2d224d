"""The state of the rows in flight of block decoders.

The host knows every row's phase, block and tokens, so it can plan the next pass without reading from the device. One
small read per engine step keeps it up to date.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.state import SequenceState


class Rows(SequenceState):
    """State of ``count`` sequences of up to ``length`` positions in blocks of ``block_length`` (B), on the host.

    Blocks are counted from position 0 if ``absolute``, else back and forth from the prompt's end; ``whole_length`` is
    that of whole blocks if these are parts. ``blocks`` are in work at once: the tables (count, W) of the current block
    hold W / B of them, of which it is the first. With ``short_last`` the last block ends with the requested tokens;
    what the tables hold beyond is :attr:`filler`, which no pass feeds.

    ``store`` (count, length + W + 1) holds each row's canvas (prompt, decided tokens, masks), after it the current
    block with every mask drafted, and one mask token: everything that a pass may feed, addressed by one index. Places
    from :attr:`states_at` on are those of drafted states, which only the device knows.
    """

    def __init__(
        self,
        count: int,
        length: int,
        block_length: int,
        mask_token_id: int,
        device: torch.device,
        absolute: bool = True,
        short_last: bool = False,
        whole_length: int | None = None,
        blocks: int = 1,
    ) -> None:
        super().__init__(count)
        self.device = device
        self.width = width = block_length * blocks
        self.length = -(-length // block_length) * block_length + width - block_length
        self.block_length = self.prefix_grain = block_length
        self.mask_token_id = mask_token_id
        self.absolute, self.short_last = absolute, short_last
        self.whole_length = whole_length or block_length
        self.filler = int(mask_token_id == 0)
        self.shifted_drafts = True
        """In shifted models: whether masks, too, predict the token after them."""
        self.states_at = self.length + width + 1
        """Where the drafted states begin."""
        self.draft_states = 0
        """Maximum number of drafted states of a row."""
        self.store = np.full((count, self.states_at), mask_token_id, dtype=np.int64)
        self.start = np.zeros(count, dtype=np.int64)
        """First position of the current block."""
        self.total = np.zeros(count, dtype=np.int64)
        """End of the last block."""
        self.offset = np.zeros(count, dtype=np.int64)
        """What added to a position makes whole blocks begin at multiples of their length."""
        self.fresh = np.zeros(count, dtype=np.int64)
        """Masks of the current block when it began."""
        self.step = np.zeros(count, dtype=np.int64)
        """Denoising steps of the current block that are complete."""
        self.block = np.full((count, width), mask_token_id, dtype=np.int64)
        """Mirror of the current block, and of those after it that are in work."""
        self.wanted = np.zeros((count, width), dtype=bool)
        """Places of the block whose logits the next forward must return."""
        self.span = np.zeros((count, width), dtype=bool)
        """Places of the block that are being verified."""

    @property
    def masks(self) -> np.ndarray:
        """(count, W) undecided places of the current block."""
        return self.block == self.mask_token_id

    @property
    def draw(self) -> np.ndarray:
        """(count, 1), or (count, W) with several blocks: how often each place was drawn, or another number of its own.
        A block counts its steps from 0 in every place that it has among those in work.
        """
        ahead = np.arange(self.width) // self.block_length << 16
        return self.step[:, None] + (ahead if self.width > self.block_length else 0)

    def admit(self, slot: int, request: Request) -> None:
        """Take a request; its first block begins at the last block boundary in the prompt."""
        super().admit(slot, request)
        prompt, block = len(request.prompt), self.block_length
        self.offset[slot] = offset = 0 if self.absolute else -prompt % self.whole_length
        start = (prompt + offset) // block * block - offset
        total = prompt + request.max_new_tokens
        self.total[slot] = total if self.short_last else start - (start - total) // block * block
        self.store[slot, : self.length] = self.mask_token_id
        self.store[slot, :prompt] = request.prompt
        if self.short_last or self.width > self.block_length:
            self.store[slot, self.total[slot] : self.length] = self.filler
        self.tokens[slot] = list(request.prompt[:start])
        self.begin_block(slot, start)

    def begins_block(self, slots: np.ndarray | int) -> np.ndarray:
        """Whether the current block of ``slots`` (K,) is where a whole one begins (K,)."""
        return (self.start[slots] + self.offset[slots]) % self.whole_length == 0

    def block_start(self, length: int) -> np.ndarray:
        """(count,) where the blocks of ``length`` that hold the current blocks begin."""
        return (self.start + self.offset) // length * length - self.offset

    def write(self, slots: np.ndarray, block: np.ndarray, draft: np.ndarray) -> None:
        """The current blocks of ``slots`` (K,) are ``block`` (K, W) now; ``draft`` (K, W) is the same with every mask
        drafted.
        """
        self.block[slots] = block
        self.store[slots[:, None], self.start[slots, None] + np.arange(self.width)] = block
        self.store[slots, self.length : self.length + self.width] = draft

    def begin_block(self, slot: int, start: int) -> None:
        """Open the block at ``start``; it holds the rest of the prompt, what was decided ahead, and masks."""
        self.start[slot] = start
        self.step[slot] = 0
        self.block[slot] = self.store[slot, start : start + self.width]
        self.fresh[slot] = (self.block[slot, : self.block_length] == self.mask_token_id).sum()

    def end_block(self, slot: int, stop_token_ids: tuple[int, ...], ends: bool = True) -> None:
        """The current block is finished: take over its tokens and check whether the answer ends here.

        ``ends`` as in :meth:`extend`.
        """
        self.progress[slot].blocks += 1
        within = self.block[slot, : min(self.block_length, self.total[slot] - self.start[slot])]
        stop_hit = self.extend(slot, within.tolist(), stop_token_ids, ends)
        self.ended[slot] = stop_hit or self.start[slot] + self.block_length >= self.total[slot]


@dataclass
class BlockState:
    """The position of every row in its block, on the device."""

    block: torch.Tensor
    """(rows, W) tokens."""
    position: torch.Tensor
    """(rows, W)"""
    step: torch.Tensor
    """(rows, 1) of the block, or (rows, W): :attr:`Rows.draw`."""
    count: torch.Tensor
    """(rows,) tokens that the schedule asks of the step."""
    given: torch.Tensor
    """(rows,) prompt tokens in the block."""
    key: torch.Tensor
    """(rows, 1) key of the request's randomness."""

    def draws(self, purpose: int) -> random.Key:
        """Keys of the draws at every place, with at most one draw per place, purpose and step."""
        return random.Key(purpose, self.key, self.position, self.step)

    def next_block(self, moved: torch.Tensor, mask_token_id: int, first_count: int) -> BlockState:
        """The same with the rows ``moved`` (rows,) at the beginning of their next block."""
        across = moved.unsqueeze(1)
        length = self.block.shape[1]
        return replace(
            self,
            block=self.block.masked_fill(across, mask_token_id),
            position=self.position + across * length,
            step=self.step.masked_fill(across, 0),
            count=self.count.masked_fill(moved, first_count),
            given=self.given.masked_fill(moved, 0),
        )
