"""The rows in flight of pipelined decoders: several blocks of a sequence are decoded at once (D2F).

Blocks come after the prompt and are counted from there: place 0 is the first generated token. The host holds a mirror
of the generated tokens, so it knows which blocks are open, decided, or may be forced on, and lays out the next pass
without asking the device.
"""

from __future__ import annotations

import numpy as np

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.state import DRAFT, SequenceState


class PipelineRows(SequenceState):
    """State of sequences with room for any of a run's requests, in blocks of ``block_length`` (B).

    ``store`` (count, stride) holds each row's canvas (prompt, generated tokens, masks), after it the generated places
    with every mask drafted, and one mask token: all that a pass may want to feed, addressable by one index.
    """

    def __init__(self, setup: DecoderSetup) -> None:
        super().__init__(setup.slots)
        requests, count, mask_token_id = setup.requests, self.count, setup.facts.mask_token_id
        self.block_length = block_length = setup.config.block_length
        self.mask_token_id = mask_token_id
        self.device = setup.device
        rooms = [-(-request.max_new_tokens // block_length) * block_length for request in requests]
        self.places = max(rooms)
        """G, the most generated places of a row."""
        self.length = max(len(request.prompt) + room for request, room in zip(requests, rooms, strict=True))
        self.stride = self.length + self.places + 1
        self.store = np.full((count, self.stride), mask_token_id, dtype=np.int64)
        self.generated = np.full((count, self.places), mask_token_id, dtype=np.int64)
        """(count, G) mirror of the generated tokens."""
        self.span = np.zeros((count, self.places), dtype=bool)
        """(count, G) places that the verifier looks at."""
        self.limit = np.zeros(count, dtype=np.int64)
        """Maximum number of blocks."""
        self.opened = np.zeros(count, dtype=np.int64)
        """Blocks that take part."""
        self.base = np.zeros(count, dtype=np.int64)
        """First place of the first block that is not decided."""
        self.step = np.zeros(count, dtype=np.int64)
        """Iterations that are complete."""
        self.stalled = np.zeros(count, dtype=bool)
        """The model predicted the mask token where something had to be decided."""

    @property
    def blocks(self) -> int:
        """The most blocks of a row."""
        return self.places // self.block_length

    @property
    def end(self) -> np.ndarray:
        """(count,) place after the last open block."""
        return self.opened * self.block_length

    def admit(self, slot: int, request: Request) -> None:
        """Take a request; none of its blocks is open yet."""
        super().admit(slot, request)
        self.store[slot] = self.mask_token_id
        self.store[slot, : len(request.prompt)] = request.prompt
        self.tokens[slot] = list(request.prompt)
        self.generated[slot] = self.mask_token_id
        self.span[slot] = False
        self.limit[slot] = -(-request.max_new_tokens // self.block_length)
        self.opened[slot] = self.base[slot] = self.step[slot] = 0
        self.stalled[slot] = False

    def write(self, slot: int, first: int, tokens: np.ndarray, draft: np.ndarray) -> None:
        """The generated places from ``first`` on are ``tokens`` (W,) now; ``draft`` (W,) is the same with every mask
        drafted.
        """
        places, canvas = slice(first, first + len(tokens)), int(self.prompt[slot])
        self.generated[slot, places] = tokens
        self.store[slot, canvas + first : canvas + first + len(tokens)] = tokens
        self.store[slot, self.length + first : self.length + first + len(tokens)] = draft

    def shares(self) -> np.ndarray:
        """(count, 1 + blocks) decided share of every block; the first entry is the prompt, which is decided."""
        decided = (self.generated != self.mask_token_id).reshape(self.count, self.blocks, self.block_length)
        return np.concatenate([np.ones((self.count, 1)), decided.mean(2)], axis=1)

    def forced(self, config: DecodingConfig) -> np.ndarray:
        """(count, G) places of the blocks that may be forced on: the block before is decided far enough."""
        ready = self.shares()[:, :-1] >= config.decoded_token_threshold
        return np.repeat(ready, self.block_length, axis=1) & (np.arange(self.places) < self.end[:, None])

    def begin_iteration(self, slots: np.ndarray, config: DecodingConfig) -> None:
        """Open the next block of each of ``slots`` that is ready for one; those with nothing left are complete."""
        shares = self.shares()[slots]
        last = np.take_along_axis(shares, self.opened[slots, None], axis=1)[:, 0]
        more = (self.opened[slots] < self.limit[slots]) & ~self.ended[slots]
        self.opened[slots] += more & (last >= config.block_add_threshold)
        decided = np.cumprod(shares[:, 1:] == 1, axis=1).sum(1)
        self.base[slots] = decided * self.block_length
        self.phase[slots] = DRAFT
        self.complete[slots] |= decided >= self.opened[slots]

    def end_iteration(self, slot: int, fresh: np.ndarray, config: DecodingConfig) -> None:
        """An iteration of ``slot`` has decided the tokens ``fresh``: note what they mean for the next."""
        self.step[slot] += 1
        self.stalled[slot] |= not (fresh != self.mask_token_id).any()
        self.ended[slot] |= bool(np.isin(fresh, config.stop_token_ids).any())
        self._hand_over(slot, config.stop_token_ids)

    def _hand_over(self, slot: int, stop_token_ids: tuple[int, ...]) -> None:
        """Take over what cannot change any more and ask the stop rules: the decided blocks at the front, or everything
        up to a stop token that has no mask before it.
        """
        if self.kept[slot] is not None:
            return
        done = len(self.tokens[slot]) - int(self.prompt[slot])
        masks = np.flatnonzero(self.generated[slot] == self.mask_token_id)
        reached = int(masks[0]) if len(masks) else self.places
        stops = np.flatnonzero(np.isin(self.generated[slot, done:reached], stop_token_ids))
        until = done + int(stops[0]) + 1 if len(stops) else reached // self.block_length * self.block_length
        if until > done:
            self.extend(slot, self.generated[slot, done:until].tolist(), stop_token_ids)

    def complete_if_over(self, slot: int, config: DecodingConfig) -> None:
        """See whether ``slot`` has nothing left to run; its blocks are then its answer."""
        kept = self.kept[slot]
        # Published code finishes the open blocks after a stop token.
        stopped = kept is not None and (kept[1] != "stop" or config.schedule != "reference")
        self.complete[slot] |= stopped
        if self.complete[slot]:
            self.progress[slot].blocks = int(self.base[slot]) // self.block_length
            if not stopped:
                self.tokens[slot][int(self.prompt[slot]) :] = self.generated[slot, : self.end[slot]].tolist()
