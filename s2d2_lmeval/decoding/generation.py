"""Requests and answers of the batch loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from s2d2_lmeval.runtime import clock, statistics

NOTHING, ACCEPTED, RESAMPLED, RATIO, HIGH_CONFIDENCE, DENOISED, KEPT, AUTOREGRESSIVE, EDITED = range(9)
"""How a place was decided in a step: the marks of :class:`Step`."""

MARK_NAMES = ("", "accepted", "resampled", "ratio", "high confidence", "denoised", "kept", "autoregressive", "edited")

PublishedStep = list[int | float | str] | dict[str, list[Any]]
"""An entry of the published decoding order: positions; where tokens are edited, ``edit`` and ``unmask`` of a step."""


class Law(NamedTuple):
    """What is kept of the law that decided a token: its log-probability there, and the ``best`` tokens with theirs."""

    logprob: float
    best: list[tuple[int, float]]


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    ``key`` identifies the request's randomness. ``stop`` is called after each finished block with all new tokens so
    far, and returns how many of them to keep (decoding then stops) or None. ``begun`` gets its progress when it is
    admitted, once more if memory did not hold it.
    """

    prompt: list[int]
    max_new_tokens: int
    key: int = 0
    stop: Callable[[list[int]], int | None] | None = None
    begun: Callable[[Progress], None] | None = None


@dataclass(frozen=True)
class Step:
    """One draft or verification of one request.

    ``start`` is the block's first position; ``before``, ``draft`` and ``tokens`` are the block's ids before the step,
    with every mask drafted, and after the step; ``marks`` says how each place was decided in it (:data:`MARK_NAMES`; 0
    if it was not). ``drafted`` are the positions of the tokens submitted to the verifier; siblings of a tree share
    one. ``order`` ranks places with equal marks, if decoding has such an order; ``laws`` are of every place, as far
    as it was decided, if they are kept.
    """

    kind: str
    start: int
    before: list[int]
    draft: list[int]
    tokens: list[int]
    marks: list[int]
    drafted: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)


@dataclass(frozen=True)
class Generation:
    """The answer to a request.

    ``token_ids`` are the new tokens up to the stop or the limit; ``finish_reason`` is ``stop`` (a stop token),
    ``stop_string`` (the request's own rule) or ``length``; ``canvas`` holds the prompt and every decided block
    untrimmed; ``progress`` is how it came about; ``text`` is the answer to a prompt that was text;
    ``prompt_length`` counts the prompt's tokens; ``ar_logprobs`` are the log-probabilities of ``token_ids`` in the
    model's autoregressive mode, if they were asked for.
    """

    token_ids: list[int]
    finish_reason: str
    stats: dict[str, float] = field(repr=False)
    canvas: list[int] = field(repr=False)
    progress: Progress = field(repr=False, compare=False)
    text: str | None = None
    prompt_length: int = field(default=0, repr=False)
    ar_logprobs: list[float] | None = field(default=None, repr=False)

    @property
    def logprobs(self) -> list[float | None] | None:
        """Of ``token_ids``, the log-probabilities at the moment they were decided, under the law that decided them;
        None of a token that no law decided, which a budget for thoughts put there. None if they were not asked for.
        """
        return None if self._laws is None else [law and law.logprob for law in self._laws]

    @property
    def top_logprobs(self) -> list[list[tuple[int, float]]] | None:
        """Of ``token_ids``, the ``top_logprobs`` likeliest tokens under the same laws, best first, with their
        log-probabilities: fewer where the sampling options leave fewer.
        """
        return None if self._laws is None else [law.best if law else [] for law in self._laws]

    @property
    def _laws(self) -> list[Law | None] | None:
        return self.progress.laws(range(len(self.token_ids))) if self.progress.keeps_laws else None

    @property
    def steps(self) -> list[Step]:
        """The steps of the request."""
        return self.progress.steps

    @property
    def decoding_order(self) -> list[PublishedStep]:
        """The steps in the published notation."""
        return self.progress.decoding_order


FORWARDS = ("prefill", "draft", "verify", "commit", "drafter")
"""What a forward does for a request; ``drafter`` is a forward of a separate drafter."""


@dataclass(frozen=True)
class Verification:
    """A verification's contribution to the answer, which may end before the draft does.

    ``drafted`` counts tokens submitted to the verifier, ``accepted`` those it accepted, ``decided`` all decided ones;
    ``offered`` and ``stood`` are the depths at which a token was drafted and accepted, from 1 for the first position.
    """

    drafted: int
    accepted: int
    decided: int
    offered: frozenset[int]
    stood: frozenset[int]


def verifications(steps: Sequence[Step], end: int) -> Iterator[Verification]:
    """The verifications among ``steps``, restricted to positions before ``end``, the end of the answer."""
    for step in steps:
        drafted = [position for position in step.drafted if position < end]
        if drafted:
            first = min(step.drafted) - 1
            marks = step.marks[: max(end - step.start, 0)]
            accepted = [step.start + place for place, mark in enumerate(marks) if mark == ACCEPTED]
            yield Verification(
                drafted=len(drafted),
                accepted=len(accepted),
                decided=len(marks) - marks.count(NOTHING),
                offered=frozenset(position - first for position in drafted),
                stood=frozenset(position - first for position in accepted),
            )


def positions_decided(steps: Sequence[Step]) -> list[PublishedStep]:
    """Of each step, the positions that it decided."""
    return [[step.start + place for place, mark in enumerate(step.marks) if mark] for step in steps]


@dataclass
class Progress:
    """A request in flight: its counters and steps, filled in after each forward. Steps are made of what was recorded
    when somebody reads them.

    ``drafts`` counts those that a routing policy saw, ``routed_drafts`` those that it sent to the verifier.
    ``published_order`` converts the steps to the published decoding order.
    """

    published_order: Callable[[Sequence[Step]], list[PublishedStep]] = positions_decided
    prompt_length: int = 0

    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORWARDS, 0))
    drafts: int = 0
    routed_drafts: int = 0
    blocks: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """What only some decoders count."""
    begun: float = field(default_factory=clock.now)
    _steps: list[Any] = field(default_factory=list)
    """Each a :class:`Step`, or what makes it."""
    _verified: list[int] = field(default_factory=list)
    """Indices of the steps that ended with a verification."""

    def record(self, make: Callable[[], Step], verified: bool) -> None:
        """Take in a step, to be made when needed; ``verified`` says whether it ended with a verification."""
        if verified:
            self._verified.append(len(self._steps))
        self._steps.append(make)

    def _make(self, indices: Iterable[int]) -> list[Step]:
        """The steps at ``indices``."""
        for index in indices:
            if not isinstance(self._steps[index], Step):
                self._steps[index] = self._steps[index]()
        return [self._steps[index] for index in indices]

    @property
    def steps(self) -> list[Step]:
        """The steps so far."""
        self._make(range(len(self._steps)))
        return self._steps

    @property
    def decoding_order(self) -> list[PublishedStep]:
        """The steps in the published notation."""
        return self.published_order(self.steps)

    @property
    def keeps_laws(self) -> bool:
        """Whether the laws that tokens were decided by are kept."""
        return any(step.laws for step in self.steps)

    def laws(self, places: range) -> list[Law | None]:
        """The laws that decided new tokens: those of the last step that did; None of a token that none decided."""
        found: dict[int, Law] = {}
        for step in reversed(self.steps):
            if len(found) == len(places):
                break
            first = step.start - self.prompt_length
            for place, (mark, law) in enumerate(zip(step.marks, step.laws, strict=False), first):
                if mark and place in places:
                    found.setdefault(place, law)
        return [found.get(place) for place in places]

    def count(self, name: str, more: int) -> None:
        """Add ``more`` to one of the decoder's own counts."""
        self.counts[name] = self.counts.get(name, 0) + more

    def verified(self, end: int) -> tuple[dict[str, int], dict[str, int]]:
        """Counts of the verifications of an answer that ends before position ``end``, in total and by depth."""
        found = list(verifications(self._make(self._verified), end))
        counts = {name: sum(getattr(one, name) for one in found) for name in ("drafted", "accepted")}
        if found:
            counts |= {"rounds": len(found), "round_tokens": sum(one.decided for one in found)}
            counts["round_accepted"] = counts["accepted"]
        offered, stood = statistics.BY_DEPTH
        depths = Counter(f"{offered}{depth}" for one in found for depth in one.offered)
        depths.update(f"{stood}{depth}" for one in found for depth in one.stood)
        return counts, depths

    def summary(self, new_tokens: int, counts: dict[str, int]) -> dict[str, float]:
        """The request's statistics (:mod:`~s2d2_lmeval.runtime.statistics`); ``counts`` are those of :meth:`verified`.

        ``seconds`` is the time in flight, shared with other requests, so it does not give a rate.
        """
        nfe = sum(self.forwards.values())
        routing = {"drafts": self.drafts, "routed_drafts": self.routed_drafts} if self.drafts else {}
        everything = {
            "nfe": nfe,
            "decode_nfe": nfe - self.forwards["prefill"],
            "new_tokens": new_tokens,
            **{f"{kind}_forwards": count for kind, count in self.forwards.items()},
            **counts,
            **routing,
            "blocks": self.blocks,
            **self.counts,
        }
        return {**everything, **statistics.ratios(everything), "seconds": clock.since(self.begun)}
