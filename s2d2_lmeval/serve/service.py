"""The queue of an endpoint, and the thread that decodes what is in it."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import Condition, Event, Thread

from s2d2_lmeval.decoding.generation import Generation, Law, Request
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import S2D2Error, first_line
from s2d2_lmeval.harness.prompts import StopStrings
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.streaming import Stream

logger = logging.getLogger("s2d2_lmeval")

WAITED, ANSWERED, CANCELLED, FAILED = "waited", "answered", "cancelled", "failed"


class Full(S2D2Error):
    """The queue holds as many requests as it may."""


@dataclass(eq=False)
class Ask:
    """One answer that somebody waits for.

    ``on_tokens`` gets new tokens as blocks are finished, with their laws if kept, ``on_end`` the whole answer or what
    went wrong; both are called on the decoding thread. Setting ``cancelled`` ends it after its current block.
    """

    prompt: list[int]
    max_new_tokens: int
    config: DecodingConfig
    seed: int = 0
    until: tuple[str, ...] = ()
    on_tokens: Callable[[list[int], list[Law | None]], None] = lambda tokens, laws: None
    on_end: Callable[[Generation | Exception], None] = lambda answer: None
    cancelled: Event = field(default_factory=Event)


class Service:
    """Decodes asks in the order in which they came, as many at a time as the model has rows.

    Asks under one configuration share the running batch. One under another configuration waits until those before it
    are answered, and those after it wait for it, so that nobody is overtaken for ever.
    """

    def __init__(self, model: BlockDiffusionModel, most_waiting: int = 256) -> None:
        self.model, self.most_waiting = model, most_waiting
        self.outcomes: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()
        self._queue: deque[tuple[Ask, Request, Stream]] = deque()
        self._changed = Condition()
        self._in_flight: dict[int, tuple[Ask, Stream]] = {}
        self._count = 0
        self._closing = False
        self.thread = Thread(target=self._work, name="decoding", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Asks in the queue."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Asks that are being decoded."""
        return len(self._in_flight)

    @property
    def alive(self) -> bool:
        """Whether asks are answered."""
        return self.thread.is_alive()

    def submit(self, *asks: Ask) -> None:
        """Put ``asks`` into the queue, all or none.

        Raises:
            RequestError: a prompt that cannot be decoded.
            Full: there is no room.
        """
        entries = []
        for ask in asks:
            stream = Stream(ask.on_tokens, ask.config, ask.max_new_tokens, self._rule(ask))
            request = self.model.request(ask.prompt, ask.max_new_tokens, ask.seed, stream.stop, stream.begun)
            entries.append((ask, request, stream))
        with self._changed:
            if self._closing or len(self._queue) + len(entries) > self.most_waiting:
                raise Full(f"{len(self._queue)} requests are waiting, as many as this server keeps; try again later.")
            self._queue.extend(entries)
            self._changed.notify()

    def close(self) -> None:
        """Answer what is in flight, refuse the rest, and end."""
        with self._changed:
            self._closing = True
            left, self._queue = list(self._queue), deque()
            self._changed.notify()
        for ask, _, _ in left:
            ask.on_end(Full("the server is shutting down."))
        self.thread.join()

    def _rule(self, ask: Ask) -> Callable[[int, list[int]], int | None]:
        stopper = StopStrings(self._with_special_tokens, ask.until)

        def rule(index: int, new: list[int]) -> int | None:
            return len(new) if ask.cancelled.is_set() else stopper(index, new)

        return rule

    @cached_property
    def _with_special_tokens(self) -> Callable[..., str]:
        return lambda token_ids: str(self.model.tokenizer.decode(token_ids, skip_special_tokens=False))

    # On the decoding thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                config = self._queue[0][0].config
            try:
                self.model.serve(partial(self._arrivals, config), config, self._ended)
            except Exception as error:
                logger.exception("decoding failed; the requests in flight are lost, and the server goes on")
                for ask, _ in self._in_flight.values():
                    self._end(ask, FAILED, S2D2Error(f"decoding failed: {first_line(error)}"))
                self._in_flight.clear()

    def _arrivals(self, config: DecodingConfig, room: int, idle: bool) -> dict[int, Request] | None:
        """What the running batch may take in (:data:`~s2d2_lmeval.decoding.open_run.Arrivals`)."""
        taken: dict[int, Request] = {}
        with self._changed:
            if idle:
                self._changed.wait_for(lambda: self._queue or self._closing)
            while self._queue and len(taken) < room and self._queue[0][0].config == config:
                ask, request, stream = self._queue.popleft()
                if ask.cancelled.is_set():
                    self._end(ask, CANCELLED, S2D2Error("cancelled while it waited"))
                    continue
                self._count += 1
                taken[self._count], self._in_flight[self._count] = request, (ask, stream)
            changes = self._queue and self._queue[0][0].config != config
            return None if not taken and (self._closing or changes) else taken

    def _ended(self, number: int, answer: Generation) -> None:
        ask, stream = self._in_flight.pop(number)
        stream.finish(answer.token_ids)
        self.sums.update({name: value for name, value in answer.stats.items() if isinstance(value, (int, float))})
        self.sums["prompt_tokens"] += len(ask.prompt)
        self._end(ask, CANCELLED if ask.cancelled.is_set() else ANSWERED, answer)

    def _end(self, ask: Ask, outcome: str, result: Generation | Exception) -> None:
        self.outcomes[outcome] += 1
        ask.on_end(result)
