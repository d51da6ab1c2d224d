"""Data and scoring of MBPP."""

from __future__ import annotations

import re
from typing import Any

from datasets import DatasetDict

from s2d2_lmeval.harness.filters import with_decoding_metrics
from s2d2_lmeval.tasks import sandbox
from s2d2_lmeval.tasks.answers import answered_code, is_plainly_code
from s2d2_lmeval.tasks.data import load_documents

FILES = {"test": ("mbpp/mbpp.jsonl", "mbpp.jsonl")}
PLUS = {"test": tuple(f"{folder}MbppPlus.jsonl{end}" for folder in ("mbpp/", "") for end in (".gz", ""))}
TESTED = range(11, 511)
"""Numbers of the documents that are for testing; the file holds examples and training documents too."""
LIMITS = sandbox.Limits(cpu_seconds=10, wall_seconds=20.0, memory_bytes=2**30)


def load(s2d2_data_dir: Any = None, **_: Any) -> DatasetDict:
    """The split ``test``, with ``text``, ``code`` and ``test_list``; refused where programs cannot be run."""
    sandbox.prepare()
    splits = load_documents(("google-research-datasets/mbpp", "full"), FILES, s2d2_data_dir)
    return splits.filter(lambda doc: doc["task_id"] in TESTED)


def load_plus(s2d2_data_dir: Any = None, **_: Any) -> DatasetDict:
    """The split ``test`` of MBPP+ in the fields of MBPP; ``tests`` are many more (EvalPlus, arXiv 2305.01210)."""
    sandbox.prepare()
    splits = load_documents(("evalplus/mbppplus",), PLUS, s2d2_data_dir)
    return splits.map(lambda doc: {"text": doc["prompt"], "tests": doc["test"]})


@with_decoding_metrics
def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """The share of responses whose program passes the document's tests; strictly, of those that are plainly code."""
    passed = [response for response in results[0] if passes(doc, response)]
    plain = [response for response in passed if is_plainly_code(response, function_of(doc))]
    return {"pass@1": len(passed) / len(results[0]), "pass@1_strict": len(plain) / len(results[0])}


def passes(doc: dict[str, Any], response: str) -> bool:
    """Whether the program of a response passes. It never sees the tests: they call its function from outside. Document
    367 therefore never passes: its tests build objects of a class that the program would have to define.
    """
    name = function_of(doc)
    tests = doc.get("tests") or "\n".join((doc["test_setup_code"], *doc["test_list"]))
    return sandbox.run_tests(answered_code(response, name), name, tests, LIMITS).passed


def function_of(doc: dict[str, Any]) -> str:
    """The function that the tests call: the one of the published solution's that they name."""
    tests = "\n".join(doc["test_list"])
    defined = re.findall(r"^def\s+(\w+)", doc["code"], re.MULTILINE)
    return next(name for name in defined if re.search(rf"\b{name}\s*\(", tests))
