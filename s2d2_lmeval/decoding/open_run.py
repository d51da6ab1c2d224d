"""A run that stays open: requests join it while others are decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from s2d2_lmeval.decoding.engine import Engine, Requests
from s2d2_lmeval.decoding.generation import Generation, Request

Arrivals = Callable[[int, bool], dict[int, Request] | None]
"""``arrivals(room, idle)``: at most ``room`` new requests by number, after waiting for one where the run is ``idle``;
None ends the run once those in flight are answered."""


class OpenRun(Engine):
    """Decodes requests of up to ``longest`` positions each, prompt and answer together, as they arrive."""

    def __init__(self, *of_engine: Any, longest: int, arrivals: Arrivals) -> None:
        super().__init__(*of_engine)
        self.longest, self.arrivals = longest, arrivals
        self.requests: dict[int, Request] = {}
        self.ended = False

    @torch.inference_mode()
    def serve(self, on_finished: Callable[[int, Generation], None]) -> None:
        """Answer requests until :data:`Arrivals` ends the run; ``on_finished`` is called as each one completes.

        Raises:
            CapacityError: memory does not hold a single row.
        """
        waiting: deque[int] = deque()

        def finished(number: int, answer: Generation) -> None:
            del self.requests[number]
            on_finished(number, answer)

        while waiting or not self.ended:
            self._decode(self.requests, waiting, finished)

    def _expected(self, requests: Requests, waiting: deque[int]) -> Sequence[Request]:
        return [Request([0], self.longest - 1)] * self.limit.most(self.runner.device)

    def _more(self, waiting: deque[int]) -> bool:
        room = self.slots - len(self.in_flight) - len(waiting)
        if room > 0 and not self.ended:
            new = self.arrivals(room, not (waiting or self.in_flight))
            self.ended = new is None
            self.requests.update(new or {})
            waiting.extend(new or ())
        return bool(waiting)
