"""Prompts that begin alike (few-shot examples, a system text) are run through the model once.

The keys and values of a prompt stay in their slot until the slot is taken by another, so a request that is admitted can
copy what it shares with any prompt that lies in the cache. Requests that share a long beginning with one that is still
being run wait for it, which costs nothing: other requests take the free slots meanwhile.

A position's keys and values depend on what it sees. Token-causally that is what lies before it, block-causally the rest
of its block as well, so what is shared ends on a block boundary. Where a prompt sees all of itself nothing is shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

import numpy as np

from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.state import SequenceState

WORTH_WAITING = 64
"""Positions for which a request waits until another has run them."""

LOOKAHEAD = 4
"""Waiting requests per slot among which one that need not wait is looked for."""


class SharedPrefixes:
    """What the slots of a run hold of prompts. ``grain`` is the block whose ends a shared prefix may have; None: no
    prefix is shared.
    """

    def __init__(self, rows: SequenceState, grain: int | None) -> None:
        self.rows = rows
        self.grain = grain
        self.held = [np.empty(0, dtype=np.int64) for _ in range(rows.count)]
        """The prompt that was last admitted to each slot."""

    def next(self, waiting: deque[int], requests: Sequence[Request]) -> int | None:
        """The place in ``waiting`` of the first request that need not wait for another's prefix; None: all wait."""
        if self.grain is None:
            return 0
        for place, index in enumerate(islice(waiting, LOOKAHEAD * self.rows.count)):
            if not self._coming(np.array(requests[index].prompt)):
                return place
        return None

    def source_for(self, slot: int, prompt: Sequence[int]) -> tuple[int, int]:
        """``prompt`` is to go to ``slot``: the slot that holds most of its beginning, and how much (0: none).

        To be asked before the rows know of the new request.
        """
        tokens = np.array(prompt)
        source, length = slot, 0
        if self.grain is not None:
            shared = [self._shared(tokens, other, self._ready(other)) for other in range(self.rows.count)]
            # Nothing needs copying where the slot's own last prompt serves as well.
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
        """Whether a row in flight is about to hold much more of ``prompt`` than any slot holds now."""
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
