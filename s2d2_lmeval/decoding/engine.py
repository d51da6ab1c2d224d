"""The batch loop: runs all requests through one decoder and one model, with as many rows in flight as fit."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from s2d2_lmeval.decoding.decoder import Decoder, DecoderSetup
from s2d2_lmeval.decoding.generation import Generation, Progress, Request
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.reading import misfit
from s2d2_lmeval.decoding.prefixes import SharedPrefixes
from s2d2_lmeval.decoding.sampling.filters import bias_of, tables_of
from s2d2_lmeval.decoding.state import KIND_OF_PHASE
from s2d2_lmeval.decoding.stepping import Stepper
from s2d2_lmeval.errors import CapacityError, ConfigError
from s2d2_lmeval.families import Facts
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.graphs import Tables
from s2d2_lmeval.runtime.memory import RowLimit, RowNeeds, out_of_memory
from s2d2_lmeval.runtime.runner import Runner, refuse_to_halve
from s2d2_lmeval.runtime.trace import ForwardRecord, Trace

logger = logging.getLogger("s2d2_lmeval")

PREFILL_CHUNK, PREFILL_TOKENS = 512, 8192
"""Maximum number of prompt tokens per row and forward, and per forward of all rows."""


REHEARSED, WORTH_REHEARSING = 48, 512
"""Tokens of an answer that a rehearsal decodes, and tokens per row in flight of a run that is worth one."""


Requests = Sequence[Request] | Mapping[int, Request]
"""By their number."""

NOT_KEPT = np.empty(0, dtype=np.int64)
"""In place of what only kept records tell."""


class Engine:
    """Decodes requests: admit, plan, run, settle, retire."""

    def __init__(self, runner: Runner, facts: Facts, config: DecodingConfig, trace: Trace, limit: RowLimit) -> None:
        self.runner = runner
        self.facts = facts
        self.config = config
        self.trace = trace
        self.limit = limit
        self.in_flight: dict[int, int] = {}
        """Slot -> index of the request in it."""
        self.rehearsing = False
        """Whether this run is only for the graphs that it leaves."""

    @torch.inference_mode()
    def run(
        self, requests: Sequence[Request], on_finished: Callable[[int, Generation], None] | None = None
    ) -> list[Generation]:
        """Answer every request, in order. ``on_finished`` is called as each one completes.

        On out-of-memory the requests in flight restart with half as many rows; randomness is keyed, so their answers
        stay the same.

        Raises:
            CapacityError: if memory does not hold a single row.
        """
        answers: list[Generation | None] = [None] * len(requests)
        waiting = deque(index for index, request in enumerate(requests) if request.max_new_tokens > 0)

        def finished(index: int, answer: Generation) -> None:
            answers[index] = answer
            if on_finished is not None:
                on_finished(index, answer)

        for index, request in enumerate(requests):
            if request.max_new_tokens == 0:
                finished(index, self._nothing_to_do(request))
        while waiting:
            self._decode(requests, waiting, finished)
        return [answer for answer in answers if answer is not None]

    def _decode(self, requests: Requests, waiting: deque[int], finished: Callable[[int, Generation], None]) -> None:
        """Answer all that are ``waiting``. If memory runs out, those in flight wait again, for fewer rows."""
        if not self._went_through(requests, waiting, finished):
            # The exception is gone by now, and with it the tensors of the failed step that it kept alive.
            waiting.extendleft(sorted(self.in_flight.values(), reverse=True))
            self.in_flight = {}
            self._back_off()

    def _expected(self, requests: Requests, waiting: deque[int]) -> Sequence[Request]:
        """The requests that the run makes room for."""
        return [requests[index] for index in waiting]

    def _more(self, waiting: deque[int]) -> bool:
        """Whether requests wait to be admitted."""
        return bool(waiting)

    def _went_through(
        self, requests: Requests, waiting: deque[int], finished: Callable[[int, Generation], None]
    ) -> bool:
        """Answer all that are ``waiting``; False if memory ran out, with requests still in flight."""
        self.slots = 0
        try:
            asked = self._expected(requests, waiting)
            self._prepare(asked)
            if self._worth_rehearsing(asked):
                self._rehearse(asked[: 2 * self.slots])
                self._prepare(asked)
            while self._more(waiting) or self.in_flight:
                self._admit(requests, waiting)
                self._step()
                for slot in [slot for slot in self.in_flight if self.rows.complete[slot]]:
                    index, answer = self.in_flight.pop(slot), self._answer(slot)
                    self.rows.retire(slot)
                    finished(index, answer)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _back_off(self) -> None:
        """Out of memory: release everything and continue with half as many rows."""
        rows = self.slots
        refuse_to_halve(self.runner, rows)
        self.runner.release()
        if rows <= 1:
            raise CapacityError(
                "Memory ran out with a single request in flight. Lower max_new_tokens or max_context, shorten the "
                "prompts, or load the weights in a smaller type."
            )
        self.limit.at_most = rows // 2
        self.trace.batch_halvings += 1
        logger.warning(
            "memory ran out with %d requests in flight; going on with %d. Those in flight begin again and come out the "
            "same.",
            *(rows, rows // 2),
        )

    def decoder_class(self) -> type[Decoder[Any]]:
        """The decoder's class.

        Raises:
            ConfigError: the decoder does not fit the checkpoint.
        """
        entry = DECODERS.find(self.config.decoder, self.facts.scheme)
        if entry is None or (entry.needs_drafter and self.facts.drafter is None):
            raise ConfigError(misfit(self.config.decoder, self.facts))
        decoder: type[Decoder[Any]] = entry.implementation
        return decoder

    def _prepare(self, requests: Sequence[Request]) -> None:
        """Prepare the run: the decoder, its slots, and cache space for the longest request."""
        decoder = self.decoder_class()
        self.config.check_fits(self.facts)
        config = self.config if not self.runner.part else within(self.config, self.runner.part)
        # Published code prefills a prompt in one forward.
        published = self.config.schedule == "reference"
        dtype = torch.promote_types(self.runner.model.dtype, torch.float32)
        tables, after_token = Tables(self.runner.device), self.runner.after_token
        setup = DecoderSetup(config, self.facts, requests, 1, tables, PREFILL_CHUNK, dtype, after_token)
        if published:
            setup = replace(setup, prefill_chunk=setup.longest)
        # The published draw order of a sequential source exists for one row only.
        most = 1 if not self.config.keyed else min(self.limit.most(self.runner.device), len(requests))
        if self.limit.automatic and most > 1:
            needs = self._needs(decoder(replace(setup, slots=2)), min(setup.prefill_chunk, setup.longest))
            most = min(most, self.runner.rows_that_fit(needs if published else replace(needs, together=PREFILL_TOKENS)))
        self.slots = most
        if not published:
            setup = replace(setup, prefill_chunk=max(min(PREFILL_CHUNK, PREFILL_TOKENS // most), 1))
        if self.runner.part:  # a chunk shares its forward with a block or a tree
            setup = replace(setup, prefill_chunk=max(self.runner.part // 2, 1))
        if self.runner.graphs is not None:
            setup = replace(setup, tables=self.runner.graphs.tables)
        self.decoder = decoder(replace(setup, slots=most))
        bias = bias_of(self.config, self.facts.vocab_size, self.runner.device)
        bias = None if bias is None else setup.tables.put("bias", bias)
        self.stepper = Stepper(self.decoder, config, self.runner, bias)
        self.rows = self.decoder.rows
        # Published code runs every prompt whole.
        self.prefixes = SharedPrefixes(self.rows, None if published else self.rows.prefix_grain)
        self.runner.reserve(most, self.decoder.capacity)
        self.decoder.calibrate_costs(partial(self.runner.measure_costs, most))

    def _worth_rehearsing(self, requests: Sequence[Request]) -> bool:
        """Whether graphs that the run will need are captured before its first request."""
        graphs, tokens = self.runner.graphs, sum(request.max_new_tokens for request in requests)
        if graphs is None or not graphs.captures or not self.config.keyed or self.rehearsing:
            return False
        return tokens >= WORTH_REHEARSING * self.slots and self.stepper.program not in graphs.rehearsed

    def _rehearse(self, requests: Sequence[Request]) -> None:
        """Decode the beginnings of some answers, of different lengths, for their graphs alone."""
        graphs, ends = self.runner.graphs, range(REHEARSED // 4, REHEARSED + 1, 4)
        assert graphs is not None
        rehearsal = type(self)(self.runner, self.facts, self.config, Trace(), RowLimit(self.slots))
        rehearsal.rehearsing = True
        with tqdm(desc="Capturing graphs", unit=" graphs", disable=None, leave=False) as bar:
            graphs.on_captured = bar.update
            try:
                rehearsal.run(
                    [
                        replace(request, stop=partial(_ends_after, end))
                        for request, end in zip(requests, cycle(reversed(ends)), strict=False)
                    ]
                )
            finally:
                graphs.on_captured = None
        graphs.rehearsed.add(self.stepper.program)

    def _needs(self, decoder: Decoder[Any], tokens: int) -> RowNeeds:
        """What a row of ``decoder`` takes that brings at most so many ``tokens`` to a forward."""
        read, drawn = decoder.most_logits
        return RowNeeds(decoder.capacity, read + drawn * (tables_of(self.config) - 1), tokens)

    def _admit(self, requests: Requests, waiting: deque[int]) -> None:
        """Fill free slots with waiting requests."""
        for slot in self.rows.free().tolist():
            place = self.prefixes.next(waiting, requests) if waiting else None
            if place is None:
                return
            index = waiting[place]
            del waiting[place]
            request, self.in_flight[slot] = requests[index], index
            source, shared = self.prefixes.source_for(slot, request.prompt)
            self.runner.begin(slot, source, shared)
            self.rows.admit(slot, request)
            self.rows.cached[slot] = shared
            self.decoder.admitted(slot)
            self.trace.admitted(len(request.prompt), shared)

    def _step(self) -> None:
        """One engine step: plan, run, settle, and record it in the trace."""
        started, model_seconds = clock.now(), self.runner.model_seconds
        plan = self.decoder.plan()
        table = self.stepper(plan)
        kept = self.decoder.settle(table)
        if table is not None:  # otherwise nobody waited for the device
            self.runner.synchronize()
        self.runner.commit(plan.layout.slots, kept, plan.model)
        self.trace.forwarded(
            ForwardRecord(
                kinds=tuple(KIND_OF_PHASE[phase] for phase in plan.phases),
                widths=plan.layout.widths,
                wanted=plan.wanted_counts if self.trace.keep_records else NOT_KEPT,
                kept=plan.keep + kept,
                seconds=clock.since(started),
                model_seconds=self.runner.model_seconds - model_seconds,
            )
        )

    def _answer(self, slot: int) -> Generation:
        """The answer of a complete row."""
        rows, config = self.rows, self.config
        request, progress, canvas = rows.requests[slot], rows.progress[slot], rows.tokens[slot]
        assert request is not None
        new = canvas[len(request.prompt) :]
        kept, reason = rows.kept[slot] or (len(new), "length")
        if reason == "stop":
            # The stop token was decoded too: it counts, whether or not it is shown.
            counted, kept = kept + 1, kept + (not config.trim_stop_tokens)
        else:
            counted = kept
        if counted > request.max_new_tokens:
            counted = kept = request.max_new_tokens
            reason = "length"
        stats = self._count(progress, len(request.prompt), counted)
        return Generation(new[:kept], reason, stats, canvas, progress, prompt_length=len(request.prompt))

    def _nothing_to_do(self, request: Request) -> Generation:
        """The answer to a request for no tokens."""
        progress = Progress()
        stats = self._count(progress, len(request.prompt), 0)
        return Generation([], "length", stats, list(request.prompt), progress, prompt_length=len(request.prompt))

    def _count(self, progress: Progress, prompt: int, new_tokens: int) -> dict[str, float]:
        """The statistics of a complete request, which the trace counts too."""
        counts, depths = progress.verified(prompt + new_tokens)
        stats = progress.summary(new_tokens, counts)
        self.trace.finished({**stats, **depths})
        return stats


def _ends_after(most: int, tokens: list[int]) -> int | None:
    """A stop rule for the first ``most`` tokens."""
    return most if len(tokens) >= most else None


def within(config: DecodingConfig, part: int) -> DecodingConfig:
    """``config`` for forwards of exactly ``part`` queries, where more in a row cost nothing: trees that fill them."""
    rows, trees = part // 2, max(part // 2 - 1, 1)
    row_budget, tree_budget = config.row_budget, config.tree_budget
    return replace(
        config,
        row_budget=rows if isinstance(row_budget, str) else min(row_budget, rows),
        tree_budget=trees if isinstance(tree_budget, str) else min(tree_budget, trees),
    )
