"""Data and scoring of GSM8K."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict

from s2d2_lmeval.harness.filters import with_decoding_metrics
from s2d2_lmeval.tasks.answers import answered_number, marked_number, same_number
from s2d2_lmeval.tasks.data import load_documents

FILES = {split: (f"gsm8k/{split}.jsonl", f"{split}.jsonl") for split in ("train", "test")}


def load(s2d2_data_dir: Any = None, **_: Any) -> DatasetDict:
    """Splits ``train`` and ``test``, with ``question`` and ``answer``."""
    return load_documents(("openai/gsm8k", "main"), FILES, s2d2_data_dir)


@with_decoding_metrics
def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Whether the answer ends in the number after the reference's ``####``; strictly, whether it marks that number (in
    a box, or after ``####``).
    """
    reference = answered_number(doc["answer"])
    found = answered_number(results[0]), marked_number(results[0])
    extracted, strict = (float(same_number(number, reference)) for number in found)
    return {"exact_match": extracted, "exact_match_strict": strict}
