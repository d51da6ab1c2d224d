"""Prefix sharing: a common beginning of prompts (few-shot examples, a system prompt) runs through the model once.

The keys and values of a prompt stay in their slot until another request takes it, so a new request can copy its common
prefix with any prompt in the cache. Requests that share a long prefix with one that is still running wait for it, at no
cost, because other requests take the free slots in the meantime.

A position's keys and values depend on what it sees: with token-causal attention the text before it, with block-causal
attention also the rest of its block. So shared prefixes end on a block boundary, and a prompt that sees all of itself
shares nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.state import SequenceState

WORTH_WAITING = 64
"""Positions for which a request waits until another has run them."""

LOOKAHEAD = 4
"""Waiting requests per slot among which one that need not wait is looked for."""


class SharedPrefixes:
    """The prompts in the slots of a run. Shared prefixes end at multiples of ``grain``; None disables sharing."""

    def __init__(self, rows: SequenceState, grain: int | None) -> None:
        self.rows = rows
        self.grain = grain
        self.held = [np.empty(0, dtype=np.int64) for _ in range(rows.count)]
        """The prompt that was last admitted to each slot."""

    def next(self, waiting: deque[int], requests: Sequence[Request] | Mapping[int, Request]) -> int | None:
        """The index in ``waiting`` of the first request that need not wait for another's prefix; None if all wait."""
        if self.grain is None:
            return 0
        for place, index in enumerate(islice(waiting, LOOKAHEAD * self.rows.count)):
            if not self._coming(np.array(requests[index].prompt)):
                return place
        return None

    def source_for(self, slot: int, prompt: Sequence[int]) -> tuple[int, int]:
        """For a ``prompt`` that goes to ``slot``: the slot with its longest cached prefix, and the length (0: none).

        Call it before the rows take the new request.
        """
        tokens = np.array(prompt)
        source, length = slot, 0
        if self.grain is not None:
            shared = [self._shared(tokens, other, self._ready(other)) for other in range(self.rows.count)]
            # No copy is needed if the slot's own last prompt serves as well.
            source = slot if shared[slot] == max(shared) else int(np.argmax(shared))
            length = shared[source]
        self.held[slot] = tokens
        return source, length

    def _ready(self, slot: int) -> int:
        """Positions of its prompt that ``slot`` has keys of; a slot keeps its count until it is taken again."""
        return min(int(self.rows.cached[slot]), len(self.held[slot]))

    def _shared(self, prompt: np.ndarray, slot: int, ready: int) -> int:
        """Positions of ``prompt`` that the first ``ready`` ones of ``slot`` can serve.

        Its last token is always run: some decoders read its logits.
        """
        assert self.grain is not None
        held = self.held[slot]
        length = min(len(prompt) - 1, len(held), ready)
        if length <= 0:
            return 0
        unlike = prompt[:length] != held[:length]
        common = int(unlike.argmax()) if unlike.any() else length
        return common // self.grain * self.grain

    def _coming(self, prompt: np.ndarray) -> bool:
        """Whether a row in flight will soon hold much more of ``prompt`` than any slot does now."""
        assert self.grain is not None
        running = [
            slot
            for slot in self.rows.active().tolist()
            if not self.rows.complete[slot] and self._ready(slot) < len(self.held[slot]) // self.grain * self.grain
        ]
        if not running:
            return False
        soon = max(self._shared(prompt, slot, len(self.held[slot])) for slot in running)
        if soon < WORTH_WAITING:
            return False
        now = max(self._shared(prompt, slot, self._ready(slot)) for slot in range(self.rows.count))
        return soon - now >= WORTH_WAITING
