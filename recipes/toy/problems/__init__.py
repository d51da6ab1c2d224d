"""The toy corpora: endless problems to train on, and the held-out ones of a fixed seed that come with the package.

``python -m recipes.toy.problems`` writes the held-out problems anew; a test compares the file with what it would write.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from recipes.toy.problems import arithmetic, instructions, programs
from s2d2_lmeval.toy import Problem, held_out

HELD_OUT_SEED = 20_261_121
HELD_OUT_SIZE = 200

MAKE: dict[str, Callable[[random.Random], Problem]] = {
    "arithmetic": arithmetic.make_problem,
    "programs": programs.make_problem,
    "instructions": instructions.make_problem,
}
"""Corpus -> what draws a problem of it."""


def made_held_out(name: str) -> tuple[Problem, ...]:
    """:data:`HELD_OUT_SIZE` problems of different prompts, always the same ones."""
    rng = random.Random(f"{HELD_OUT_SEED} {name}")
    problems: dict[str, Problem] = {}
    while len(problems) < HELD_OUT_SIZE:
        problem = MAKE[name](rng)
        problems.setdefault(problem.prompt, problem)
    return tuple(problems.values())


def training_stream(name: str, seed: int) -> Iterator[Problem]:
    """Endless random problems of a corpus; those with the prompt of a held-out problem are left out."""
    rng = random.Random(f"train {seed} {name}")
    forbidden = {problem.prompt for problem in held_out(name)}
    while True:
        problem = MAKE[name](rng)
        if problem.prompt not in forbidden:
            yield problem
