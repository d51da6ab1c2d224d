"""Walking every path of a decoder's draws, each with its exact probability."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Path:
    """One path through the tree of draws: the ``script`` as far as it goes, then the first branches.

    ``probability`` of what was taken; ``pending`` scripts of the branches that were not.
    """

    def __init__(self, script: Sequence[int]) -> None:
        self.script = list(script)
        self.path: list[int] = []
        self.probability = 1.0
        self.pending: list[list[int]] = []

    def branch(self, probabilities: Sequence[float]) -> int:
        """A draw: which of its outcomes is taken here."""
        possible = [i for i, p in enumerate(probabilities) if p > 0]
        step = len(self.path)
        taken = self.script[step] if step < len(self.script) else possible[0]
        if step >= len(self.script):
            self.pending += [[*self.path, other] for other in possible[1:]]
        self.path.append(taken)
        self.probability *= probabilities[taken]
        return taken

    def first_rejected(self, accepts: Sequence[float]) -> int:
        """Where the first rejection falls if every place is accepted with its probability; after the last: nowhere."""
        rejections = [math.prod(accepts[:place]) * (1 - accept) for place, accept in enumerate(accepts)]
        return self.branch([*rejections, math.prod(accepts)])
