"""Tiny Python functions: the prompt is a signature and a docstring, the answer is the body, scored by running it."""

from __future__ import annotations

import json
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.toy import Problem

FUNCTIONS = (
    "solve", "compute", "change", "apply", "pick", "find", "make", "build", "work", "process",
    "check", "adjust", "select", "update", "convert", "handle",
)  # fmt: skip
SCALARS = ("x", "n", "a", "b", "m", "size", "age", "cost", "score", "level")
SEQUENCES = ("items", "values", "data", "nums", "rows", "marks", "prices", "steps")
CASES = 6
"""Test cases per problem."""


@dataclass(frozen=True)
class Word:
    """An operation or a comparison: how the docstring says it, how Python writes it, what it computes."""

    phrase: str
    symbol: str
    function: Callable[[int, int], Any]


OPERATIONS = (
    Word("plus", "+", operator.add),
    Word("minus", "-", operator.sub),
    Word("times", "*", operator.mul),
    Word("modulo", "%", operator.mod),
)
COMPARISONS = (
    Word("greater than", ">", operator.gt),
    Word("less than", "<", operator.lt),
    Word("at least", ">=", operator.ge),
    Word("at most", "<=", operator.le),
    Word("equal to", "==", operator.eq),
    Word("not equal to", "!=", operator.ne),
)


@dataclass(frozen=True)
class Draft:
    """What a template returns: documentation, body lines (indented by one level less) and the function computed."""

    documentation: str
    lines: tuple[str, ...]
    function: Callable[..., Any]


class _Choices:
    """The random parts that a template may use; every constant is between 2 and 30."""

    def __init__(self, rng: random.Random) -> None:
        self.operation, self.other_operation = rng.choice(OPERATIONS), rng.choice(OPERATIONS)
        self.comparison = rng.choice(COMPARISONS)
        self.first, self.second, self.bound = (rng.randint(2, 30) for _ in range(3))


def _calculation(c: _Choices, x: str) -> Draft:
    op, k = c.operation, c.first
    return Draft(f"Return {x} {op.phrase} {k}.", (f"return {x} {op.symbol} {k}",), lambda v: op.function(v, k))


def _predicate(c: _Choices, x: str) -> Draft:
    test, k = c.comparison, c.bound
    line = f"return {x} {test.symbol} {k}"
    return Draft(f"Tell if {x} is {test.phrase} {k}.", (line,), lambda v: test.function(v, k))


def _limit(c: _Choices, x: str) -> Draft:
    op, k, bound = c.operation, c.first, c.bound
    return Draft(
        f"Return {x} {op.phrase} {k}, but no more than {bound}.",
        (f"return min({x} {op.symbol} {k}, {bound})",),
        lambda v: min(op.function(v, k), bound),
    )


def _branch(c: _Choices, x: str) -> Draft:
    test, then, other = c.comparison, c.operation, c.other_operation
    bound, k, j = c.bound, c.first, c.second
    return Draft(
        f"If {x} is {test.phrase} {bound}, return {x} {then.phrase} {k}, else {x} {other.phrase} {j}.",
        (f"if {x} {test.symbol} {bound}:", f"    return {x} {then.symbol} {k}", f"return {x} {other.symbol} {j}"),
        lambda v: then.function(v, k) if test.function(v, bound) else other.function(v, j),
    )


def _mapping(c: _Choices, xs: str) -> Draft:
    op, k = c.operation, c.first
    return Draft(
        f"List each of {xs} {op.phrase} {k}.",
        (f"return [v {op.symbol} {k} for v in {xs}]",),
        lambda vs: [op.function(v, k) for v in vs],
    )


def _selection(c: _Choices, xs: str) -> Draft:
    test, k = c.comparison, c.bound
    return Draft(
        f"List those of {xs} that are {test.phrase} {k}.",
        (f"return [v for v in {xs} if v {test.symbol} {k}]",),
        lambda vs: [v for v in vs if test.function(v, k)],
    )


def _count(c: _Choices, xs: str) -> Draft:
    test, k = c.comparison, c.bound
    return Draft(
        f"Count those of {xs} that are {test.phrase} {k}.",
        ("total = 0", f"for v in {xs}:", f"    if v {test.symbol} {k}:", "        total += 1", "return total"),
        lambda vs: sum(test.function(v, k) for v in vs),
    )


def _total(c: _Choices, xs: str) -> Draft:
    op, k = c.operation, c.first
    return Draft(
        f"Sum each of {xs} {op.phrase} {k}.",
        ("total = 0", f"for v in {xs}:", f"    total += v {op.symbol} {k}", "return total"),
        lambda vs: sum(op.function(v, k) for v in vs),
    )


TEMPLATES: dict[str, tuple[Callable[[_Choices, str], Draft], bool]] = {
    "calculation": (_calculation, False),
    "predicate": (_predicate, False),
    "limit": (_limit, False),
    "branch": (_branch, False),
    "mapping": (_mapping, True),
    "selection": (_selection, True),
    "count": (_count, True),
    "total": (_total, True),
}
"""Per kind: the template, and whether its argument is a list."""


def make_problem(rng: random.Random) -> Problem:
    """Draw a function; its test cases surround the constants in use, so that ``>`` and ``>=`` come apart."""
    kind = rng.choice(tuple(TEMPLATES))
    template, takes_list = TEMPLATES[kind]
    name, argument = rng.choice(FUNCTIONS), rng.choice(SEQUENCES if takes_list else SCALARS)
    choices = _Choices(rng)
    draft = template(choices, argument)
    inputs = _inputs(rng, choices.bound, takes_list)
    return Problem(
        corpus="programs",
        kind=kind,
        prompt=f'def {name}({argument}):\n    """{draft.documentation}"""',
        answer="\n".join(f"    {line}" for line in draft.lines),
        separator="\n",
        check=json.dumps({"name": name, "arguments": inputs, "results": [draft.function(*args) for args in inputs]}),
    )


def _inputs(rng: random.Random, bound: int, takes_list: bool) -> list[list[Any]]:
    """Positional arguments of every test case."""
    numbers = [bound - 1, bound, bound + 1, *(rng.randint(-20, 99) for _ in range(CASES - 3))]
    if not takes_list:
        return [[number] for number in numbers]
    extras = [[rng.randint(-20, 99) for _ in range(rng.randint(0, 4))] for _ in numbers]
    return [[[number, *extra]] for number, extra in zip(numbers, extras, strict=True)]
