"""What was varied in a study: options as columns, the line that repeats a configuration, accuracy under parallelism."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

from s2d2_lmeval.studies.report.results import Row
from s2d2_lmeval.studies.report.statistics import accuracy_under_parallelism


def varied_options(rows: Sequence[Row]) -> list[str]:
    """The options that differ among rows of the same decoder, in the order of the study."""
    values: dict[str, dict[str, set[str]]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.options if name != "decoder"):
        of_decoders = values.setdefault(name, {})
        for row in rows:
            of_decoders.setdefault(row.decoder, set()).add(json.dumps(row.options.get(name)))
    return [name for name, of_decoders in values.items() if any(len(of) > 1 for of in of_decoders.values())]


def option_columns(rows: Sequence[Row], *, unsaid: bool = False) -> dict[str, Callable[[Row], str]]:
    """A column for each of the varied options of ``rows``; empty where a row leaves the option alone.

    Args:
        unsaid: only options that are not in the names of the rows, as a grid writes them.
    """
    names = varied_options(rows)
    if unsaid:
        told = {name for name in names if any(f"{name}=" in row.decoding for row in rows)}
        names = [name for name in names if name not in told]
    return {name: lambda row, name=name: as_written(row.options.get(name)) for name in names}  # type: ignore[misc]


def as_written(value: Any) -> str:
    """An option's value as ``--model_args`` takes it; empty for None."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def model_args(row: Row, models: Mapping[str, Mapping[str, Any]]) -> str:
    """The ``--model_args`` of a row, quoted for a shell; ``models`` are the model arguments by name."""
    given = {**models.get(row.model, {"pretrained": row.model}), **row.options}
    return shlex.quote(",".join(f"{name}={as_written(value)}" for name, value in given.items() if value is not None))


AUP_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "decoder": lambda entry: str(entry["decoder"]),
    "AUP": lambda entry: f"{entry['aup']:.1f}",
    "settings": lambda entry: str(entry["settings"]),
    "left out": lambda entry: str(entry["left_out"] or ""),
    "best tokens/forward": lambda entry: f"{entry['most_parallel']:.2f}",
}


def aup_by_decoder(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Accuracy under parallelism of each decoder over its settings, the best first; ``rows`` are of one model and task.

    Tokens per forward count every forward, of prompts too, and accuracy is in per cent of the same documents. Rows
    without either are left out, and so are settings more than 5 points below the decoder's slowest.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if not (isnan(row.tokens_per_forward) or isnan(row.accuracy)):
            points.setdefault(row.decoder, []).append((row.tokens_per_forward, 100 * row.accuracy))
    best = max((accuracy for several in points.values() for _, accuracy in several), default=0.0)
    entries = []
    for decoder, several in points.items():
        aup, kept = accuracy_under_parallelism(several, best)
        counts = {"settings": len(several), "left_out": len(several) - len(kept)}
        entries.append({"decoder": decoder, "aup": aup, **counts, "most_parallel": max(speed for speed, _ in kept)})
    return sorted(entries, key=lambda entry: -entry["aup"])
