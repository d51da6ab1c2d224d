"""The three toy corpora under one interface, and their held-out sets, which are fixed by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from s2d2_lmeval.toy import arithmetic, instructions, programs
from s2d2_lmeval.toy.problem import Problem

HELD_OUT_SEED = 20_261_121
HELD_OUT_SIZE = 200


@dataclass(frozen=True)
class Corpus:
    """A generator and a scorer.

    Attributes:
        name: key in :data:`CORPORA`.
        make_problem: draws a problem from a random generator.
        score: (problem, response) -> 1.0 or 0.0.
    """

    name: str
    make_problem: Callable[[random.Random], Problem]
    score: Callable[[Problem, str], float]


CORPORA: dict[str, Corpus] = {
    "arithmetic": Corpus("arithmetic", arithmetic.make_problem, arithmetic.score),
    "programs": Corpus("programs", programs.make_problem, programs.score),
    "instructions": Corpus("instructions", instructions.make_problem, instructions.score),
}


@cache
def held_out(name: str) -> tuple[Problem, ...]:
    """The held-out problems of a corpus: :data:`HELD_OUT_SIZE` different prompts, always the same ones."""
    rng = random.Random(f"{HELD_OUT_SEED} {name}")
    problems: dict[str, Problem] = {}
    while len(problems) < HELD_OUT_SIZE:
        problem = CORPORA[name].make_problem(rng)
        problems.setdefault(problem.prompt, problem)
    return tuple(problems.values())


def score(problem: Problem, response: str) -> float:
    """Score a response by the rule of the problem's corpus: 1.0 or 0.0."""
    return CORPORA[problem.corpus].score(problem, response)
