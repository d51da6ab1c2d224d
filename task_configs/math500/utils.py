"""Data and scoring of MATH-500."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.harness.filters import with_decoding_metrics
from s2d2_lmeval.tasks.answers import boxed_answer, without_thoughts
from s2d2_lmeval.tasks.data import load_documents

FILES = {"test": ("math500/test.jsonl", "MATH-500/test.jsonl", "test.jsonl")}


def load(s2d2_data_dir: Any = None, **_: Any) -> DatasetDict:
    """The split ``test``, with ``problem`` and ``answer``; refused where answers could not be compared."""
    _comparison()
    return load_documents(("HuggingFaceH4/MATH-500",), FILES, s2d2_data_dir)


def _comparison() -> Any:
    """The module that reads and compares mathematical answers.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ConfigError(
            f"MATH-500 compares answers by another package ({error}): pip install 's2d2-lmeval[sweep]'."
        ) from None
    return math_verify


@with_decoding_metrics
def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Whether the answer equals the reference, as math_verify reads and compares both; strictly, the content of the
    last box only.
    """
    boxed = boxed_answer(results[0])
    return {
        "exact_match": same(doc["answer"], without_thoughts(results[0])),
        "exact_match_strict": 0.0 if boxed is None else same(doc["answer"], f"\\boxed{{{boxed}}}"),
    }


def same(reference: str, text: str) -> float:
    """Whether the answer that ``text`` ends in is ``reference``, both LaTeX."""
    compare = _comparison()
    gold = compare.parse(f"\\boxed{{{reference}}}")
    return float(compare.verify(gold, compare.parse(text)))
