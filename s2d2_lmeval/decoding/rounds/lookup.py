"""Drafts from text that is there: what followed the last few tokens before, in prompt, answer and earlier answers.

Nothing is trained and nothing is run: a continuation of the text is the tree of what followed its last n-gram, then of
what followed that, and so on (prompt lookup; SuffixDecoding, arXiv 2411.04975). How far a match is to be trusted is
learned from the run, for every length and source of the match: each decided token says whether it was foreseen, whether
or not it was drafted. So where text does not repeat, nothing is worth drafting any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

LONGEST = 4
"""Tokens of an n-gram."""

FOLLOWERS = 3
"""Different tokens kept for each n-gram, the latest ones."""

REMEMBERED = 2**16
"""Tokens of earlier answers after which the older half is forgotten."""

PRIOR_HITS, PRIOR_TRIES = 0.5, 4.0
"""What is assumed of a match before it was ever tried."""

Gram = tuple[int, ...]
Cell = tuple[int, int, int]
"""A source (0: the text itself), the length of the match, and how many other followers are more recent."""


class Followers(dict[Gram, list[int]]):
    """What followed each n-gram of some text, the latest first."""

    def read(self, tokens: Sequence[int], begin: int, end: int) -> None:
        """Learn the ``tokens`` from index ``begin`` up to ``end``."""
        for place in range(max(begin, 1), end):
            token = tokens[place]
            for start in range(max(place - LONGEST, 0), place):
                after = self.setdefault(tuple(tokens[start:place]), [])
                if token not in after[:1]:
                    if token in after:
                        after.remove(token)
                    after.insert(0, token)
                    del after[FOLLOWERS:]


class Draft(NamedTuple):
    """A tree in descending value: ``token``, ``parent`` (0: the root, else 1 + its index), ``depth`` and ``value``."""

    token: list[int]
    parent: list[int]
    depth: list[int]
    value: list[float]

    def above(self, price: float) -> Draft:
        """The first nodes, those that are worth more than ``price``."""
        kept = sum(value > price for value in self.value)
        return Draft(self.token[:kept], self.parent[:kept], self.depth[:kept], self.value[:kept])


class Text:
    """A sequence that :class:`Lookup` follows: its ``tokens``, a list that grows, and what follows what in it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.known = len(tokens)
        self.followers = Followers()
        self.followers.read(tokens, 0, len(tokens))

    def tail(self, end: int) -> Gram:
        """The n-gram before index ``end``."""
        return tuple(self.tokens[max(end - LONGEST, 0) : end])


class Lookup:
    """What follows what in texts that are ``finished``, and the trust in it; drafts continuations of others."""

    def __init__(self) -> None:
        self.recent, self.older = Followers(), Followers()
        self._room = REMEMBERED // 2
        self._hits: dict[Cell, float] = {}
        self._tries: dict[Cell, float] = {}

    def follow(self, text: Text) -> None:
        """Read what has been decided of ``text`` since the last time, and whether it was foreseen."""
        for place in range(text.known, len(text.tokens)):
            for token, cell in self._foreseen(text, text.tail(place)).items():
                self._tries[cell] = self._tries.get(cell, PRIOR_TRIES) + 1
                self._hits[cell] = self._hits.get(cell, PRIOR_HITS) + (token == text.tokens[place])
            text.followers.read(text.tokens, place, place + 1)
        text.known = len(text.tokens)

    def finished(self, text: Text) -> None:
        """Draft later texts from this one too."""
        if self._room < len(text.tokens):
            self.recent, self.older, self._room = Followers(), self.recent, REMEMBERED // 2
        self._room -= len(text.tokens)
        self.recent.read(text.tokens, 0, len(text.tokens))

    def draft(self, text: Text, nodes: int, depths: int, least: float, chain: bool = False) -> Draft:
        """The likeliest ``nodes`` continuations of ``text``, each likelier than ``least``, at most ``depths`` deep."""
        made = Draft([], [], [], [])
        waiting: list[tuple[float, int, int, int, Gram]] = []

        def expand(parent: int, depth: int, value: float, tail: Gram) -> None:
            for token, cell in list(self._foreseen(text, tail).items())[: 1 if chain else FOLLOWERS]:
                worth = value * self._hits.get(cell, PRIOR_HITS) / self._tries.get(cell, PRIOR_TRIES)
                if worth > least:
                    # Among equals the earlier one first, so that a parent precedes its child.
                    heappush(waiting, (-worth, depth + 1, parent, token, (*tail, token)[-LONGEST:]))

        if depths > 0:
            expand(0, 0, 1.0, text.tail(len(text.tokens)))
        while waiting and len(made.token) < nodes:
            worth, depth, parent, token, tail = heappop(waiting)
            made.token.append(token)
            made.parent.append(parent)
            made.depth.append(depth)
            made.value.append(-worth)
            if depth < depths:
                expand(len(made.token), depth, -worth, tail)
        return made

    def _foreseen(self, text: Text, tail: Gram) -> dict[int, Cell]:
        """What may follow ``tail``, after its longest end that is known, and where it is known from."""
        found: dict[int, Cell] = {}
        for length in range(len(tail), 0, -1):
            gram = tail[-length:]
            for source, followers in enumerate((text.followers, self.recent, self.older)):
                for rank, token in enumerate(followers.get(gram, ())):
                    found.setdefault(token, (min(source, 1), length, rank))
            if found:
                break
        return found
