"""A small study on the embedded model, and what must come out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2d2_lmeval.studies.store import PointRecord, read_point

STUDY: dict[str, Any] = {
    "name": "small",
    "models": {"toy": {"pretrained": "toy"}},
    "tasks": ["s2d2_toy_arithmetic"],
    "limit": 6,
    "batch_size": 4,
    "decoding": {
        "ar": {"decoder": "ar"},
        "s2d2": {"decoder": "s2d2", "block_length": 16},
    },
    "seeds": [0],
    "gen_kwargs": {"max_gen_toks": 40, "do_sample": True, "temperature": 3.0},
}
"""Everything is sampled, so that the keys of requests matter."""


def outcome_of(record: PointRecord) -> dict[str, Any]:
    """What must not depend on interruptions: everything but times."""
    assert record.result is not None
    samples = {}
    for name, sample in record.samples.items():
        stats = {key: value for key, value in sample["stats"].items() if key != "seconds"}
        samples[name] = (sample["text"], sample["accepted"], sample.get("order"), stats)
    metrics = {name: value for name, value in record.result["metrics"].items() if not name.startswith("seconds")}
    documents = {name: value for name, value in record.result["documents"].items() if not name.startswith("seconds")}
    return {"samples": samples, "metrics": metrics, "documents": documents}


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """By the name of the point."""
    return {path.stem: outcome_of(read_point(path)) for path in sorted((folder / "points").glob("*.jsonl"))}
