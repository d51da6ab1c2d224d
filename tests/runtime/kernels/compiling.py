"""Arguments with which kernels are compiled for GPUs that are not here, at the shapes of an 8B model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

HALF, WHOLE, LONG, INT, BYTES = "*bf16", "*fp32", "*i64", "*i32", "*u8"
"""Types of pointers."""


class Case(NamedTuple):
    """A kernel with its arguments: a string names a type, anything else is a constant; and options of the compiler."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def cases() -> Iterator[tuple[str, Case]]:
    """All kernels, by name."""
    from s2d2_lmeval.decoding.sampling import random_triton, row_statistics_triton

    chunks = {"CHUNK": 4096, "CHUNKS": 38}
    logits = {"logits": WHOLE, "stride": "i32", "vocabulary": "i32", "parts": WHOLE, "tokens": INT}
    for full in (True, False):
        name = "a chunk's statistics" if full else "a chunk's arg-max"
        yield name, Case(row_statistics_triton._chunk_kernel, {**logits, **chunks, "FULL": full}, {"num_warps": 8})
    of_row = {"parts": WHOLE, "tokens": INT, "numbers": WHOLE, "CHUNKS": 38, "BLOCK": 64}
    of_best, of_token = {"token_out": LONG}, {"logits": WHOLE, "stride": "i32", "wanted": LONG}
    yield "statistics", Case(row_statistics_triton._statistics_kernel, {**of_row, **of_best}, {"num_warps": 1})
    yield "arg-max", Case(row_statistics_triton._likeliest_kernel, {**of_row, **of_best}, {"num_warps": 1})
    yield "probability", Case(row_statistics_triton._probability_kernel, {**of_row, **of_token}, {"num_warps": 1})

    keys = {"words": LONG, "seed": "i64", "purpose": "i64"}
    yield "uniform", Case(random_triton._uniform_kernel, {**keys, "out": WHOLE, "count": "i32", "BLOCK": 128}, {})
    noise = {**keys, "out": WHOLE, "vocabulary": "i32", "CHUNK": 2048}
    yield "noise", Case(random_triton._gumbel_kernel, noise, {})
    for of_logits in (True, False):
        sizes = {"CHUNKS": 75, "LOGITS": of_logits}
        values = {"values": WHOLE, "stride": "i32", "temperature": "fp32", "parts": WHOLE, "tokens": INT}
        race = {**keys, **values, **sizes, "vocabulary": "i32", "CHUNK": 2048}
        yield f"a chunk's race, logits {of_logits}", Case(random_triton._race_kernel, race, {})
        finish = {**values, **sizes, "token_out": LONG, "p_out": WHOLE, "BLOCK": 128}
        yield f"race, logits {of_logits}", Case(random_triton._finish_kernel, finish, {"num_warps": 1})


def compiled(case: Case, capability: int) -> Any:
    """What Triton makes of ``case`` for GPUs of that compute capability."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    names = case.kernel.arg_names
    types = {name: value for name, value in case.arguments.items() if isinstance(value, str)}
    source = ASTSource(
        fn=case.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.arguments.items() if name not in types},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name].startswith("*")},
    )
    return build(source, target=GPUTarget("cuda", capability, 32), options=case.options)
