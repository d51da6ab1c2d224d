"""Data and scoring of GSM8K."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict

from s2d2_lmeval.harness.filters import with_decoding_metrics
from s2d2_lmeval.tasks.answers import answered_number, same_number
from s2d2_lmeval.tasks.data import load_documents

FILES = {split: (f"gsm8k/{split}.jsonl", f"{split}.jsonl") for split in ("train", "test")}


def load(s2d2_data_dir: Any = None, **_: Any) -> DatasetDict:
    """Splits ``train`` and ``test``, with ``question`` and ``answer``."""
    return load_documents(("openai/gsm8k", "main"), FILES, s2d2_data_dir)


@with_decoding_metrics
def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Whether the answer ends in the number after the reference's ``####``."""
    return {"exact_match": float(same_number(answered_number(results[0]), answered_number(doc["answer"])))}
