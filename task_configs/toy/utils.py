"""Data, prompts and scoring of the toy tasks; everything comes from :mod:`s2d2_lmeval.toy`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from datasets import Dataset, DatasetDict

from s2d2_lmeval.harness.filters import with_decoding_metrics
from s2d2_lmeval.tasks import sandbox
from s2d2_lmeval.toy import Problem, held_out, score


def _load(name: str) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list([asdict(problem) for problem in held_out(name)])})


def load_arithmetic(**_: Any) -> DatasetDict:
    """Held-out arithmetic stories as the split ``test``."""
    return _load("arithmetic")


def load_programs(**_: Any) -> DatasetDict:
    """Held-out functions to complete as the split ``test``; refused where programs cannot be run."""
    sandbox.prepare()
    return _load("programs")


def load_instructions(**_: Any) -> DatasetDict:
    """Held-out instructions as the split ``test``."""
    return _load("instructions")


@with_decoding_metrics
def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Whether the response solves the problem."""
    problem = Problem(**{name: doc[name] for name in Problem.__dataclass_fields__})
    return {"accuracy": score(problem, results[0])}
