"""The rows in flight: what each sequence holds, on the device and mirrored on the host.

The host knows where every row stands (phase, block, lengths), so the next pass can be laid out without asking the
device. The device holds the tokens. One small read per engine step (:meth:`Rows.update_host`) keeps the mirror true.
"""

from __future__ import annotations

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import Progress, Request

IDLE, PREFILL, DRAFT, VERIFY, COMMIT = range(5)
"""Phases of a row: what its next forward does."""

KIND_OF_PHASE = ("idle", "prefill", "draft", "verify", "commit")


class Rows:
    """State of ``rows`` sequences of up to ``length`` positions in blocks of ``block_length`` (B).

    ``store`` (rows, length + B + 1) on the device holds each row's canvas (prompt, decided tokens, masks), behind it
    the current block with every mask drafted, and one mask token: all that a pass may want to feed, addressable by one
    index.
    """

    def __init__(self, rows: int, length: int, block_length: int, mask_token_id: int, device: torch.device) -> None:
        self.count = rows
        self.length = -(-length // block_length) * block_length
        self.block_length = block_length
        self.mask_token_id = mask_token_id
        self.device = device
        self.store = torch.full((rows, self.length + block_length + 1), mask_token_id, dtype=torch.long, device=device)

        self.phase = np.full(rows, IDLE)
        self.cached = np.zeros(rows, dtype=np.int64)
        """Positions that have keys and values."""
        self.start = np.zeros(rows, dtype=np.int64)
        """First position of the current block."""
        self.prompt = np.zeros(rows, dtype=np.int64)
        """Prompt lengths."""
        self.total = np.zeros(rows, dtype=np.int64)
        """End of the last block."""
        self.step = np.zeros(rows, dtype=np.int64)
        """Denoising steps of the current block that are complete."""
        self.key = np.zeros(rows, dtype=np.int64)
        self.block = np.full((rows, block_length), mask_token_id, dtype=np.int64)
        """Mirror of the current block."""
        self.wanted = np.zeros((rows, block_length), dtype=bool)
        """Places of the block whose logits the next forward must give."""
        self.span = np.zeros((rows, block_length), dtype=bool)
        """Places of the block that are before the verifier."""
        self.ended = np.zeros(rows, dtype=bool)
        """No further block: the answer stopped, or this was the last one."""
        self.complete = np.zeros(rows, dtype=bool)
        """Nothing left to run."""
        self.requests: list[Request | None] = [None] * rows
        self.progress: list[Progress] = [Progress() for _ in range(rows)]
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        """Prompt and finished blocks."""
        self.kept: list[tuple[int, str] | None] = [None] * rows
        """How many new tokens a stop rule keeps, and which rule, once one has struck."""

    @property
    def stride(self) -> int:
        """Distance of two rows in the flattened store."""
        return self.store.shape[1]

    @property
    def masks(self) -> np.ndarray:
        """(rows, B) undecided places of the current block."""
        return self.block == self.mask_token_id

    def free(self) -> np.ndarray:
        """Slots without a request."""
        return np.flatnonzero(self.phase == IDLE)

    def active(self) -> np.ndarray:
        """Slots with a request."""
        return np.flatnonzero(self.phase != IDLE)

    def admit(self, slot: int, request: Request) -> None:
        """Seat a request; its first block begins at the last block boundary in the prompt."""
        prompt, block = len(request.prompt), self.block_length
        self.requests[slot] = request
        self.progress[slot] = Progress()
        self.store[slot, : self.length] = self.mask_token_id
        self.store[slot, :prompt] = torch.tensor(request.prompt, dtype=torch.long)
        self.cached[slot] = 0
        self.prompt[slot] = prompt
        self.total[slot] = -(-(prompt + request.max_new_tokens) // block) * block
        self.key[slot] = request.key
        self.ended[slot] = False
        self.complete[slot] = False
        self.kept[slot] = None
        self.phase[slot] = PREFILL
        self.tokens[slot] = list(request.prompt[: prompt // block * block])
        self.begin_block(slot, prompt // block * block)

    def begin_block(self, slot: int, start: int) -> None:
        """Turn to the block at ``start``; it holds what is left of the prompt, then masks."""
        self.start[slot] = start
        self.step[slot] = 0
        self.block[slot] = self.mask_token_id
        request = self.requests[slot]
        assert request is not None
        rest = request.prompt[start : start + self.block_length]
        self.block[slot, : len(rest)] = rest

    def end_block(self, slot: int, stop_token_ids: tuple[int, ...]) -> None:
        """The current block holds no mask any more: take its tokens over and ask the stop rules."""
        start, prompt = int(self.start[slot]), int(self.prompt[slot])
        request, tokens = self.requests[slot], self.tokens[slot]
        assert request is not None
        fresh = self.block[slot].tolist()
        tokens += fresh
        self.progress[slot].blocks += 1
        stops = [
            start + place for place, token in enumerate(fresh) if token in stop_token_ids and start + place >= prompt
        ]
        struck = [(stops[0] - prompt, "stop")] if stops else []
        kept = request.stop(tokens[prompt:]) if request.stop is not None else None
        if kept is not None:
            struck.append((kept, "stop_string"))
        if struck:
            self.kept[slot] = min(struck)
        self.ended[slot] = bool(struck) or start + self.block_length >= self.total[slot]

    def retire(self, slot: int) -> None:
        """Free a slot."""
        self.phase[slot] = IDLE
        self.requests[slot] = None
