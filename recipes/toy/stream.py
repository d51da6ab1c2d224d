"""Endless problems to train on."""

from __future__ import annotations

import random
from collections.abc import Iterator

from s2d2_lmeval.toy import CORPORA, Problem, held_out


def training_stream(name: str, seed: int) -> Iterator[Problem]:
    """Endless random problems of a corpus; those with the prompt of a held-out problem are left out."""
    rng = random.Random(f"train {seed} {name}")
    forbidden = {problem.prompt for problem in held_out(name)}
    while True:
        problem = CORPORA[name].make_problem(rng)
        if problem.prompt not in forbidden:
            yield problem
