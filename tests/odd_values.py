"""Values that nobody means: what a fuzzer gives to every option."""

from __future__ import annotations

import math
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

DEEP: list[Any] = reduce(lambda inner, _: [inner], range(3000), [])

TEXTS = (
    *(
        "",
        " ",
        "x",
        "auto",
        "none",
        "true",
        "1",
        "-1",
        "0",
        "1e-5",
        "1e400",
        "nan",
        "-inf",
        "0x10",
        "1_0",
        "½",
        "日本",
    ),
    *(
        "\x00",
        "9" * 5000,
        "x" * 100_000,
        "[1]",
        "{}",
        "{'a': 1}",
        "[" * 3000,
        "/dev/zero",
        "/",
        "..",
        "-",
        "--x",
        "a,b=c",
    ),
)
"""As they come from a command line."""

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 64, 10**9, 10**18, -(10**18), 10**400, 10**5000),
    *(0.5, -0.5, 1.0, 1.5, 1e-300, 1e308, 1e400, -1e400, math.nan),
)

VALUES: tuple[Any, ...] = (
    *(None, True, False, *NUMBERS, *TEXTS),
    *([], [1], [1, 2], [[1]], [None], ["a"], [10**18], (), DEEP, {1, 2}, range(3)),
    *({}, {"a": 1}, {1: 0.5}, {1: math.nan}, {"[1]": 2}, {(1,): 1.0}),
    *(object(), b"x", len, type, 2j, Path("/dev/zero")),
    *(torch.tensor(1), torch.tensor([1.0, 2.0]), np.int64(3), np.float32(0.5), np.array([1, 2])),
)


def label(name: str, value: Any) -> str:
    """A try in a message; some values cannot be written."""
    try:
        return f"{name}={value!r:.60}"
    except (ValueError, TypeError, RecursionError):
        return f"{name}: {type(value).__name__} number {next(n for n, one in enumerate(VALUES) if one is value)}"
