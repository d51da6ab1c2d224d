"""Plain data between the processes of the sandbox: what arrives, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from s2d2_lmeval.tasks import sandbox
from s2d2_lmeval.tasks.sandbox import Limits, Outcome
from s2d2_lmeval.tasks.sandbox.jail import values

ROOMY = Limits(cpu_seconds=20, wall_seconds=60.0, memory_bytes=2**31)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 10**5000, -(10**30), 0.1, -0.0, float("inf"), 1e-320, 1 + 2j, "", "aé\n\0", "\ud83d\ude00",
        b"\xff\0", [], [1, [2, [3]]], (), (1,), ((), []), set(), {1, "a"}, frozenset({(1, 2)}), {}, range(3),
        {"b": 1, "a": {(1, 2): None}},
    ],
    ids=lambda value: type(value).__name__,  # a set is written in any order, so its text names no test
)  # fmt: skip
def test_plain_data_arrives_as_it_was(value: Any) -> None:
    copy = values.decode(values.encode(value, 1 << 20))
    assert type(copy) is type(value)
    assert copy == value
    assert repr(copy) == repr(value) if not isinstance(value, int) else True


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"i", b"i2;zz", b"izz;", b"s5;ab", b"s-1;ab", b"l3;n0;", b"l-1;", b"lffffffffff;", b"e1;l0;", b"x0;",
     b"n0;n0;", b"D1;x", b"q0;", b"r0;", b"m1;n0;", b"s1;\xff", b"d3;123", b"o0;", b"l1;" * 5000 + b"n0;"],
)  # fmt: skip
def test_bytes_that_are_no_value_are_malformed(data: bytes) -> None:
    with pytest.raises(values.Malformed):
        values.decode(data)


def test_random_bytes_are_values_or_malformed() -> None:
    rng, good = random.Random(1), values.encode([{"a": (1, 2.0, b"x")}, {1, 2}, range(3), None, "text"], 1000)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.choice(b"nticdsbluezmrqDo;-0123456789abcdef\xff")
        try:
            values.decode(bytes(data[: rng.randint(0, len(data))]))
        except values.Malformed:
            continue


def test_what_is_not_data_equals_nothing_and_can_be_listed() -> None:
    tests = "assert f(0) != [0, 1]\nassert list(f(0)) == [0, 1]\nassert list(f(1)) == [1, 2]\nassert f(2) != f(2)"
    source = "import numpy\ndef f(x): return [map(abs, [0, -1]), numpy.array([1, 2]), object()][x]"
    assert sandbox.run_tests(source, "f", tests, ROOMY) == Outcome(True, "passed")
    assert sandbox.call("def f(): return object()", "f", [[]]) is None


def test_arguments_are_copies() -> None:
    tests = "x = [1]\nassert f(x) == [1, 2]\nassert x == [1]"
    assert sandbox.run_tests("def f(x):\n    x.append(2)\n    return x", "f", tests).passed
