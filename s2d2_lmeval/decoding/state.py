"""Host-side state of the sequences in flight, for all decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from s2d2_lmeval.decoding.generation import (
    ACCEPTED,
    AUTOREGRESSIVE,
    Law,
    Progress,
    PublishedStep,
    Request,
    Step,
    positions_decided,
)
from s2d2_lmeval.errors import RequestError, shown

IDLE, PREFILL, DRAFT, VERIFY, COMMIT, PROPOSE = range(6)
"""Phases of a row: what its next forward does."""

KIND_OF_PHASE = ("idle", "prefill", "draft", "verify", "commit", "drafter")


def as_round(kind: str, start: int, fresh: list[int], depths: np.ndarray, mask_token_id: int, laws: list[Law]) -> Step:
    """The step of a round that began at position ``start``, of what :meth:`SequenceState.record` was told."""
    marks = [ACCEPTED] * (len(fresh) - 1) + [AUTOREGRESSIVE]
    drafted = (start - 1 + depths).tolist()
    before = [mask_token_id] * len(fresh)
    return Step(kind, start, before, fresh, fresh, marks, drafted, laws=laws)


class SequenceState:
    """Host-side state of ``count`` sequences, one per slot."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.prefix_grain: int | None = None
        """A prompt's keys and values up to any multiple of this do not depend on later tokens; None: on all tokens."""
        self.phase = np.full(count, IDLE)
        self.cached = np.zeros(count, dtype=np.int64)
        """Positions that have keys and values."""
        self.prompt = np.zeros(count, dtype=np.int64)
        """Prompt lengths."""
        self.key = np.zeros(count, dtype=np.int64)
        """Keys of the requests' randomness."""
        self.ended = np.zeros(count, dtype=bool)
        """Whether no further token is to be decoded."""
        self.complete = np.zeros(count, dtype=bool)
        """Nothing left to run."""
        self.requests: list[Request | None] = [None] * count
        self.published_order: Callable[[Sequence[Step]], list[PublishedStep]] = positions_decided
        """Makes the published decoding order of steps."""
        self.progress: list[Progress] = [Progress() for _ in range(count)]
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        """Prompt and decided tokens."""
        self.kept: list[tuple[int, str] | None] = [None] * count
        """(tokens kept, rule) once a stop condition has fired."""

    def free(self) -> np.ndarray:
        """Slots without a request."""
        return (self.phase == IDLE).nonzero()[0]

    def active(self) -> np.ndarray:
        """Slots with a request."""
        return (self.phase != IDLE).nonzero()[0]

    def admit(self, slot: int, request: Request) -> None:
        """Take a request; it starts with nothing in the cache."""
        self.phase[slot] = PREFILL
        self.cached[slot] = 0
        self.prompt[slot] = len(request.prompt)
        self.key[slot] = request.key
        self.ended[slot] = self.complete[slot] = False
        self.requests[slot] = request
        self.progress[slot] = Progress(self.published_order, len(request.prompt))
        if request.begun is not None:
            request.begun(self.progress[slot])
        self.kept[slot] = None

    def retire(self, slot: int) -> None:
        """Free a slot."""
        self.phase[slot] = IDLE
        self.requests[slot] = None

    def record(
        self, slot: int, fresh: list[int], depths: np.ndarray, mask_token_id: int, laws: Sequence[Law] = ()
    ) -> None:
        """Record a round of the request, before :meth:`extend`: drafted tokens at ``depths``, from 1 for the next
        position, of which all of ``fresh`` except the last were accepted; ``laws`` of ``fresh``, if kept.
        """
        kind = KIND_OF_PHASE[self.phase[slot]]
        make = partial(as_round, kind, len(self.tokens[slot]), fresh, depths, mask_token_id, list(laws))
        self.progress[slot].record(make, verified=len(depths) > 0)

    def extend(self, slot: int, fresh: list[int], stop_token_ids: tuple[int, ...], ends: bool = True) -> bool:
        """Append decided tokens and apply the stop rules; True if one ends the decoding.

        A stop token does if ``ends``; otherwise it only says where to cut. Prompt tokens among ``fresh`` (a first block
        holds some) cannot stop anything.
        """
        request, tokens, prompt = self.requests[slot], self.tokens[slot], int(self.prompt[slot])
        assert request is not None
        start = len(tokens)
        tokens += fresh
        hits = [
            (start + place - prompt, "stop")
            for place, token in enumerate(fresh)
            if token in stop_token_ids and start + place >= prompt
        ][:1]
        kept = request.stop(tokens[prompt:]) if request.stop is not None else None
        if kept is not None:
            if not 0 <= kept <= len(tokens) - prompt:
                raise RequestError(f"stop answered {shown(kept)} of {len(tokens) - prompt} new tokens to keep.")
            hits.append((kept, "stop_string"))
        if hits:
            hits += [earlier] if (earlier := self.kept[slot]) is not None else []
            # Of as many tokens a stop string comes first: it needs no token after them.
            self.kept[slot] = min(hits, key=lambda hit: (hit[0], hit[1] != "stop_string"))
        return kept is not None or (ends and bool(hits))
