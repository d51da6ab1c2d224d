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
    yield from of_layers()
    yield from of_decisions()


def of_layers() -> Iterator[tuple[str, Case]]:
    from s2d2_lmeval.runtime.kernels import attention_triton, layer_triton

    heads, key_heads, dim, split, splits = 32, 8, 128, 256, 16
    rows = dict.fromkeys(("slots", "lengths", "offsets", "widths", "positions"), LONG)
    numbers = dict.fromkeys(("rows", "capacity", "window", "visible_row", "visible_query"), "i32")
    spaces = {"parts": WHOLE, "stats": WHOLE, "scale": "fp32", "visible": BYTES}
    shape = {"HEADS": heads, "DIM": dim, "SPLIT": split, "SPLITS": splits}
    for widest, apart, narrows, type_ in ((1, True, False, HALF), (64, False, False, HALF), (8, True, True, WHOLE)):
        tile = attention_triton.tile_of(heads // key_heads, widest, dim, 2 if type_ == HALF else 4)
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
        kinds = {"APART": apart, "WINDOWED": narrows, "CAUSAL": narrows, "UP": False, "KEY_HEADS": key_heads, **tile}
        tensors = dict.fromkeys(("queries", "keys", "values", "out"), type_)
        case = Case(
            attention_triton._attend_kernel, {**rows, **numbers, **spaces, **shape, **kinds, **tensors}, options
        )
        yield f"attention, {widest} queries of {type_}", case
    merged = {"parts": WHOLE, "stats": WHOLE, "out": HALF, "rows": "i32", "AT_ONCE": 8, **shape}
    merged |= dict.fromkeys(("lengths", "offsets", "widths"), LONG)
    yield "merge", Case(attention_triton._merge_kernel, merged, {})

    stream = dict.fromkeys(("stream", "added", "weight", "total", "normed"), HALF)
    sizes = {"eps": "fp32", "SIZE": 4096, "BLOCK": 4096, "ADDS": True}
    yield "add_norm", Case(layer_triton._add_norm_kernel, {**stream, **sizes}, {"num_warps": 8})
    half = ("projected", "query_norm", "key_norm", "cos", "sin", "keys", "values", "queries")
    rope = {**dict.fromkeys(half, HALF), "eps": "fp32", "destinations": LONG, "HALF": dim // 2, "BLOCK": dim // 2}
    rope |= {"HEADS": heads, "KEY_HEADS": key_heads, "NORMS": True}
    yield "rope_write", Case(layer_triton._rope_write_kernel, rope, {"num_warps": 1})
    gates = {"gate_up": HALF, "out": HALF, "SIZE": 12288, "BLOCK": layer_triton.COLUMNS}
    yield "silu_mul", Case(layer_triton._silu_mul_kernel, gates, {})


def of_decisions() -> Iterator[tuple[str, Case]]:
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
