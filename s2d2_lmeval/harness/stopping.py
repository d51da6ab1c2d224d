"""Stop strings inside a block: where in a request's new tokens the first one is complete."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

_MARGIN = 8
"""Tokens re-read beyond what a stop string can span: tokens without text of their own, and a leading space that a
decoder drops.
"""


class StopStrings:
    """Finds stop strings as blocks arrive; the ``stop`` of :meth:`s2d2_lmeval.model.BlockDiffusionModel.generate`.

    ``stopper(request, tokens)`` is given every new token of a request so far and answers how many of them to keep (up
    to and including the one that completes the earliest stop string), or None. Text is decoded only from where a stop
    string could begin that the last call did not see whole, so a request costs time linear in its length. A string
    that a multi-byte character or a token boundary cuts in two is found when its second half arrives.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], strings: Sequence[str]) -> None:
        """
        :param decode: token ids to text, special tokens included.
        :param strings: the stop strings; empty ones are ignored.
        """
        self._decode = decode
        self._strings = tuple(dict.fromkeys(string for string in strings if string))
        # Every token but those the margin is for carries at least a byte.
        self._overlap = max((len(string.encode()) for string in self._strings), default=0) + _MARGIN
        self._seen: dict[int, int] = {}

    def __call__(self, request: int, tokens: list[int]) -> int | None:
        if not self._strings:
            return None
        seen = self._seen.get(request, 0)
        if len(tokens) <= seen:
            return None
        first = max(0, seen - self._overlap)
        if not self._stopped(tokens[first:]):
            self._seen[request] = len(tokens)
            return None
        # The text of a prefix of tokens is a prefix of the text, so "holds a stop string" is monotone in the number of
        # tokens.
        counts = range(seen + 1, len(tokens) + 1)
        return counts[bisect_left(counts, True, key=lambda count: self._stopped(tokens[first:count]))]

    def _stopped(self, tokens: list[int]) -> bool:
        text = self._decode(tokens)
        return any(string in text for string in self._strings)
