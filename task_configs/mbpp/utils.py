"""Data and scoring of MBPP."""

from __future__ import annotations

import re
from typing import Any

from datasets import DatasetDict

from s2d2_lmeval.harness.filters import with_decoding_metrics
from s2d2_lmeval.tasks import sandbox
from s2d2_lmeval.tasks.answers import answered_code
from s2d2_lmeval.tasks.data import load_documents

FILES = {"test": ("mbpp/mbpp.jsonl", "mbpp.jsonl")}
TESTED = range(11, 511)
"""Numbers of the documents that are for testing; the file holds examples and training documents too."""
LIMITS = sandbox.Limits(cpu_seconds=10, wall_seconds=20.0, memory_bytes=2**30)


def load(s2d2_data_dir: Any = None, **_: Any) -> DatasetDict:
    """The split ``test``, with ``text``, ``code`` and ``test_list``; refused where programs cannot be run."""
    sandbox.prepare()
    splits = load_documents(("google-research-datasets/mbpp", "full"), FILES, s2d2_data_dir)
    return splits.filter(lambda doc: doc["task_id"] in TESTED)


@with_decoding_metrics
def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """The share of responses whose program passes the document's tests."""
    return {"pass@1": sum(map(float, (passes(doc, response) for response in results[0]))) / len(results[0])}


def passes(doc: dict[str, Any], response: str) -> bool:
    """Whether the program of a response passes. It never sees the tests: they call its function from outside. Document
    367 therefore never passes: its tests build objects of a class that the program would have to define.
    """
    name = function_of(doc)
    tests = "\n".join((doc["test_setup_code"], *doc["test_list"]))
    return sandbox.run_tests(answered_code(response, name), name, tests, LIMITS).passed


def function_of(doc: dict[str, Any]) -> str:
    """The function that the tests call: the one of the published solution's that they name."""
    tests = "\n".join(doc["test_list"])
    defined = re.findall(r"^def\s+(\w+)", doc["code"], re.MULTILINE)
    return next(name for name in defined if re.search(rf"\b{name}\s*\(", tests))
