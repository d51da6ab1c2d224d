"""Grade-school arithmetic stories, answered one equation per line and then ``#### n``, as GSM8K answers are."""

from __future__ import annotations

import json
import random

from s2d2_lmeval.toy import Problem

NAMES = (
    "Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Jack", "Emma", "Leo", "Nora", "Max", "Ella", "Paul", "Ruth", "Carl",
    "Jane",
)  # fmt: skip
THINGS = ("apples", "pens", "books", "coins", "cards", "eggs", "shells", "stamps", "marbles", "cookies")
GAINS = ("buys", "finds", "gets")
LOSSES = ("gives away", "loses", "sells")
LARGEST = 99
"""No intermediate result is larger."""


def make_problem(rng: random.Random) -> Problem:
    """Draw a story of one to three steps."""
    person, things = rng.choice(NAMES), rng.choice(THINGS)
    changes = rng.choice((1, 2, 2, 3))
    steps: list[str] = []
    if rng.random() < 0.3:
        boxes, each = rng.randint(2, 9), rng.randint(2, 9)
        total = boxes * each
        story = f"{person} has {boxes} boxes with {each} {things} in each box."
        steps.append(f"{boxes}*{each}={total}")
        changes -= 1
    else:
        total = rng.randint(3, 60)
        story = f"{person} has {total} {things}."
    for _ in range(changes):
        sentence, equation, total = _change(rng, total)
        story += f" {person} {sentence}"
        steps.append(equation)
    question = f"{story} How many {things}?"
    return Problem(
        corpus="arithmetic",
        kind=f"{len(steps)}_steps",
        prompt=f"Question: {question}\nAnswer:",
        answer="\n".join((*steps, f"#### {total}")),
        separator=" ",
        check=json.dumps({"result": total}),
    )


def _change(rng: random.Random, total: int) -> tuple[str, str, int]:
    """One sentence that changes ``total``: (sentence after the name, equation, new total)."""
    grows = total < 4 or (total <= 90 and rng.random() < 0.5)
    if grows:
        amount = rng.randint(2, min(40, LARGEST - total))
        return f"{rng.choice(GAINS)} {amount} more.", f"{total}+{amount}={total + amount}", total + amount
    amount = rng.randint(1, min(60, total - 1))
    return f"{rng.choice(LOSSES)} {amount}.", f"{total}-{amount}={total - amount}", total - amount
