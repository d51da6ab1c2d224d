"""The packaged benchmarks: files, prompts, scoring; and the harness on a grid of them, from a local folder."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.task_sweeps import BENCHMARKS, files, read_task
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.harness.filters import METRICS
from s2d2_lmeval.harness.responses import TracedResponse
from s2d2_lmeval.tasks.data import load_documents

CONFIGS = Path(__file__).parents[2] / "task_configs"
FOLDERS = [CONFIGS / name for name in dict.fromkeys(BENCHMARKS.values())]
TASKS = [path for folder in FOLDERS for path in sorted(folder.glob("s2d2_*.yaml"))]
POINTS = [path for folder in FOLDERS for path in sorted((folder / "sweep").glob("*.yaml"))]


def utils(benchmark: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{benchmark}_utils", CONFIGS / benchmark / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_grids_are_what_the_generator_writes() -> None:
    wanted = files(CONFIGS)
    assert set(POINTS) == set(wanted)
    assert [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text] == []


def merged(path: Path) -> dict[str, Any]:
    """A task with what it includes."""
    task = read_task(path)
    return {**(merged(path.parent / task["include"]) if "include" in task else {}), **task}


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_tasks(path: Path) -> None:
    task = merged(path)
    assert task["task"] == path.stem
    assert task.get("unsafe_code", False) == (path.parent.name in ("humaneval", "mbpp"))
    assert "do_sample" not in task["generation_kwargs"]  # the family's published setting, or the run's
    assert METRICS.keys() < {entry["metric"] for entry in task["metric_list"]}


@pytest.mark.parametrize("path", POINTS, ids=lambda path: path.stem)
def test_points_are_valid_and_their_own(path: Path) -> None:
    task = read_task(path)
    base = merged(path.parent / task["include"])
    options = {
        name: value for name, value in task["generation_kwargs"].items() if name not in base["generation_kwargs"]
    }
    assert {name: task["generation_kwargs"][name] for name in base["generation_kwargs"]} == base["generation_kwargs"]
    DecodingConfig.from_options(options)
    assert task["task"] == path.stem
    assert f"{base['task']}_sweep" in task["tag"]


def write(folder: Path) -> Path:
    """A little of each benchmark, in the layouts that their authors publish."""
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k/test.jsonl": [{"question": f"{n} and 1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(3)],
        "ifeval/input_data.jsonl": [
            {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            {
                "key": 2,
                "prompt": "Two bullets.",
                "instruction_id_list": ["detectable_format:number_bullet_lists"],
                "kwargs": [{"num_bullets": 2}],
            },
        ],
    }
    rows["gsm8k/train.jsonl"] = rows["gsm8k/test.jsonl"] * 2
    for name, several in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in several))
    (folder / "humaneval").mkdir()
    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        for name in ("one", "two"):
            test = f"def check(candidate):\n    assert candidate() == '{name}'\n"
            prompt = f'def {name}():\n    """Return the name."""\n'
            file.write(json.dumps({"task_id": name, "prompt": prompt, "test": test, "entry_point": name}) + "\n")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data")


def test_gsm8k_documents_and_scores(data: Path) -> None:
    gsm8k = utils("gsm8k")
    doc = gsm8k.load(s2d2_data_dir=str(data), pretrained="ignored")["test"][2]
    assert gsm8k.load(s2d2_data_dir=str(data / "gsm8k"))["train"].num_rows == 6
    assert gsm8k.process_results(doc, [r"so \boxed{3}."]) == {"exact_match": 1.0, "exact_match_strict": 1.0}
    assert gsm8k.process_results(doc, ["2"]) == {"exact_match": 0.0, "exact_match_strict": 0.0}
    extracted = {"exact_match": 1.0, "exact_match_strict": 0.0}
    assert gsm8k.process_results(doc, [TracedResponse("it is 3", {"nfe": 2})]) == {**extracted, "nfe": 2.0}
    assert gsm8k.process_results(doc, [{"nfe": 3, "new_tokens": 6}]) == {"nfe": 3.0, "new_tokens": 6.0}


def test_math500_documents_and_scores(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    math500 = utils("math500")
    rows = [
        {"problem": "Solve it.", "answer": answer} for answer in (r"\frac{14}{3}", r"\left( 3, \frac{\pi}{2} \right)")
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fraction, pair = math500.load(s2d2_data_dir=str(tmp_path))["test"]
    for doc, reply, extracted, strict in (
        (fraction, r"so \boxed{14/3}", 1, 1),
        (fraction, r"the answer is $\frac{28}{6}$.", 1, 0),
        (fraction, r"<think>\boxed{14/3}</think> It is \boxed{14}.", 0, 0),
        (fraction, "", 0, 0),
        (pair, r"\boxed{(3,\pi/2)}", 1, 1),
        (pair, r"\boxed{(\pi/2, 3)}", 0, 0),
    ):
        assert math500.process_results(doc, [reply]) == {"exact_match": extracted, "exact_match_strict": strict}


def test_math500_refuses_to_start_without_what_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 's2d2-lmeval\[sweep\]'"):
        utils("math500").load()


def test_humaneval_documents_and_scores(data: Path) -> None:
    humaneval = utils("humaneval")
    doc = humaneval.load(s2d2_data_dir=str(data))["test"][0]
    right, wrong = "```python\ndef one():\n    return 'one'\n```", "    return 'two'"
    assert humaneval.every_response([[right, wrong]], [doc]) == [[right, wrong]]
    assert humaneval.process_results(doc, [[right, wrong]]) == {"pass@1": 0.5, "pass@1_strict": 0.5}
    assert humaneval.process_results(doc, [["    return 'one'"]]) == {"pass@1": 1.0, "pass@1_strict": 1.0}
    assert humaneval.process_results(doc, [["    import os; os._exit(0)"]])["pass@1"] == 0.0
    told = [TracedResponse(f"```python\none()\n```\n{right}", {"nfe": nfe}) for nfe in (2, 4)]
    assert humaneval.process_results(doc, [told]) == {"pass@1": 1.0, "pass@1_strict": 0.0, "nfe": 3.0}


PLUS = """import numpy as np

def is_floats(x):
    return isinstance(x, float) or (isinstance(x, list) and x and all(isinstance(one, float) for one in x))

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        np.testing.assert_allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"

"""
"""How the tests of EvalPlus begin, in their words."""
LOOP = "inputs = [[2], [0.1], [-3]]\nresults = [4, 0.2, -6]\nfor inp, exp in zip(inputs, results):\n"


def test_plus_documents_and_scores(tmp_path: Path) -> None:
    humaneval, mbpp = utils("humaneval"), utils("mbpp")
    loop = "    ".join(("", *LOOP.splitlines(keepends=True)))
    test = f"{PLUS}def check(candidate):\n{loop}        assertion(candidate(*inp), exp, 0)\n"
    prompt = 'def twice(x):\n    """Double it."""\n'
    humaneval_doc = {"task_id": "HumanEval/0", "prompt": prompt, "entry_point": "twice", "test": test}
    code, tests = "def twice(x):\n    return 2 * x", ["assert twice(2) == 4"]
    mbpp_doc = {"task_id": 2, "prompt": "Double it.", "code": code, "test_imports": [], "test_list": tests}
    mbpp_doc["test"] = f"{PLUS}{LOOP}    assertion(twice(*inp), exp, 0)\n"
    (tmp_path / "MbppPlus.jsonl").write_text(json.dumps(mbpp_doc))
    with gzip.open(tmp_path / "HumanEvalPlus.jsonl.gz", "wt") as file:
        file.write(json.dumps(humaneval_doc))
    right, wrong = code, "def twice(x):\n    return 4 if x == 2 else x"
    for benchmark in (humaneval, mbpp):
        doc = benchmark.load_plus(s2d2_data_dir=str(tmp_path))["test"][0]
        assert benchmark.process_results(doc, [[right, wrong]]) == {"pass@1": 0.5, "pass@1_strict": 0.5}
    assert doc["text"] == "Double it."


def test_mbpp_documents_and_scores(tmp_path: Path) -> None:
    mbpp = utils("mbpp")
    code = "def helper(x):\n    return x\ndef twice(x):\n    return helper(2 * x)"
    doc = {"text": "Double it.", "code": code, "test_setup_code": "", "test_list": ["assert twice(2) == 4"]}
    lines = [json.dumps({**doc, "task_id": number}) for number in (2, 11, 510, 511)]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(lines))
    docs = mbpp.load(s2d2_data_dir=str(tmp_path))["test"]
    assert docs["task_id"] == [11, 510]
    assert mbpp.function_of(docs[0]) == "twice"
    right, wrong = "Sure:\n```python\ndef twice(x):\n    return x + x\n```", "def twice(x):\n    return x"
    passed = pytest.approx(2 / 3)
    assert mbpp.process_results(docs[0], [[right, wrong, code]]) == {"pass@1": passed, "pass@1_strict": passed}
    assert mbpp.process_results(docs[0], [["def twice(x): raise SystemExit(0)"]])["pass@1"] == 0.0


def test_ifeval_documents_and_scores(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.find", lambda name: name)
    monkeypatch.setattr("nltk.download", lambda name: True)
    ifeval = utils("ifeval")
    comma, bullets = ifeval.load(s2d2_data_dir=str(data))["train"]
    scores = ifeval.process_results(comma, ["Yes, commas."])
    assert (scores["prompt_level_strict_acc"], scores["inst_level_loose_acc"]) == (False, [False])
    assert ifeval.process_results(bullets, ["* a\n* b"])["prompt_level_strict_acc"]
    assert ifeval.agg_inst_level_acc([[True, False], [True, True]]) == 0.75


def test_ifeval_refuses_to_start_without_its_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise LookupError(name)

    monkeypatch.setattr("nltk.download", lambda name: False)
    monkeypatch.setattr("nltk.data.find", missing)
    with pytest.raises(ConfigError, match="NLTK_DATA=DIR"):
        utils("ifeval").load(s2d2_data_dir=str(data))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds none of"), ("", "is empty"), ("{", "cannot be read"), ("[1]\n", "line 1 is not an object")],
)
def test_unusable_files(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_documents(("nowhere",), {"test": ("x.jsonl",)}, tmp_path)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """``lm_eval`` on the embedded model."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("nltk.data.find", lambda name: name)
    monkeypatch.setattr("nltk.download", lambda name: True)

    def evaluate(tasks: list[str], data: Path, **options: Any) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(CONFIGS), include_defaults=False, metadata={"s2d2_data_dir": str(data)})
        return simple_evaluate(
            model="s2d2",
            model_args="pretrained=toy,truncation=True",
            tasks=tasks,
            task_manager=manager,
            batch_size=8,
            gen_kwargs="max_gen_toks=8",
            bootstrap_iters=0,
            **options,
        )

    return evaluate


def test_a_grid_runs_in_one_process(harness: Callable[..., dict[str, Any]], data: Path) -> None:
    evaluated = harness(["s2d2_gsm8k_routing_score", "s2d2_gsm8k_fewshot"], data, limit=2)
    found, samples = evaluated["results"], evaluated["samples"]["s2d2_gsm8k_fewshot"]
    assert [sample["doc_id"] for sample in samples] == [0, 1]
    assert all(sample["nfe"] > 0 and sample["exact_match_strict"] <= sample["exact_match"] for sample in samples)
    points = [f"s2d2_gsm8k_routing_score_{score}" for score in ("-1", "0", "1", "2")]
    assert set(found) == {*points, "s2d2_gsm8k_fewshot"}
    assert all(found[name]["nfe,none"] > 0 for name in found)
    assert all("exact_match,none" in found[name] for name in found)


def test_programs_run_only_where_that_was_confirmed(harness: Callable[..., dict[str, Any]], data: Path) -> None:
    with pytest.raises(ValueError, match="unsafe"):
        harness(["s2d2_humaneval"], data)
    found = harness(["s2d2_humaneval", "s2d2_ifeval"], data, confirm_run_unsafe_code=True, apply_chat_template=True)
    assert found["results"]["s2d2_humaneval"]["pass@1,none"] == 0.0
    assert found["config"]["s2d2"]["environment"]["sandbox"].startswith(("process: ", "bwrap: "))
    assert "inst_level_strict_acc,none" in found["results"]["s2d2_ifeval"]
