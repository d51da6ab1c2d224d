"""Data and scoring of HumanEval."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict

from s2d2_lmeval.harness.filters import with_decoding_metrics
from s2d2_lmeval.tasks import sandbox
from s2d2_lmeval.tasks.answers import is_plainly_code, preamble, whole_program
from s2d2_lmeval.tasks.data import load_documents

FILES = {"test": ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl", "HumanEval.jsonl.gz", "HumanEval.jsonl")}
PLUS = {"test": tuple(f"{folder}HumanEvalPlus.jsonl{end}" for folder in ("humaneval/", "") for end in (".gz", ""))}
LIMITS = sandbox.Limits(cpu_seconds=10, wall_seconds=20.0, memory_bytes=2**30)


def load(s2d2_data_dir: Any = None, **_: Any) -> DatasetDict:
    """The split ``test``, with ``prompt``, ``test`` and ``entry_point``; refused where programs cannot be run."""
    sandbox.prepare()
    return load_documents(("openai/openai_humaneval",), FILES, s2d2_data_dir)


def load_plus(s2d2_data_dir: Any = None, **_: Any) -> DatasetDict:
    """The same of HumanEval+, whose tests are more (EvalPlus, arXiv 2305.01210)."""
    sandbox.prepare()
    return load_documents(("evalplus/humanevalplus",), PLUS, s2d2_data_dir)


def every_response(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """All responses to a document: pass@1 is their mean where a task has ``repeats``."""
    return [list(responses) for responses in resps]


@with_decoding_metrics
def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """The share of responses whose program passes the document's tests; strictly, of those that are plainly code."""
    passed = [response for response in results[0] if passes(doc, response)]
    plain = [response for response in passed if is_plainly_code(response, doc["entry_point"])]
    return {"pass@1": len(passed) / len(results[0]), "pass@1_strict": len(plain) / len(results[0])}


def passes(doc: dict[str, Any], response: str) -> bool:
    """Whether the program of a response passes. It never sees the tests: they call its function from outside."""
    prompt, name = doc["prompt"], doc["entry_point"]
    tests = f"{preamble(prompt, name)}\n{doc['test']}\ncheck({name})\n"
    return sandbox.run_tests(whole_program(prompt, response, name), name, tests, LIMITS).passed
