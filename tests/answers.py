"""Answers of the engine, to be compared."""

from typing import Any

from s2d2_lmeval.decoding.generation import Generation


def told(generation: Generation) -> dict[str, Any]:
    """Everything but the clock."""
    names = ("token_ids", "finish_reason", "canvas", "text", "steps", "decoding_order")
    stats = {name: value for name, value in generation.stats.items() if name != "seconds"}
    return {"stats": stats, **{name: getattr(generation, name) for name in names}}
