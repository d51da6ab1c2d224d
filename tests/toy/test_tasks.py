"""The toy task files: data, prompts and scoring, without running the harness."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from s2d2_lmeval.toy import CORPORA, held_out

FOLDER = Path(__file__).parents[2] / "task_configs" / "toy"


@pytest.fixture(scope="module")
def utils():
    spec = importlib.util.spec_from_file_location("toy_task_utils", FOLDER / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> dict:
    """A task file, with ``!function`` tags as plain strings."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load((FOLDER / name).read_text(encoding="utf-8"), Loader)


@pytest.mark.parametrize("name", tuple(CORPORA))
def test_task_file_and_data(utils, name: str) -> None:
    task = read(f"s2d2_toy_{name}.yaml")
    assert task["task"] == f"s2d2_toy_{name}"
    assert task.get("unsafe_code", False) == (name == "programs")
    assert not task["generation_kwargs"]["do_sample"]
    split = getattr(utils, task["custom_dataset"].removeprefix("utils."))(pretrained="ignored")["test"]
    assert [doc["prompt"] for doc in split] == [problem.prompt for problem in held_out(name)]
    for doc in split.select(range(5)):
        assert not any(stop in doc["separator"] + doc["answer"] for stop in task["generation_kwargs"]["until"])
        assert utils.process_results(doc, [doc["separator"] + doc["answer"]]) == {"accuracy": 1.0}
        assert utils.process_results(doc, [""]) == {"accuracy": 0.0}


def test_statistics_become_metrics_that_the_task_lists(utils) -> None:
    stats = {"nfe": 4, "new_tokens": 20, "tokens_per_forward": 5.0, "acceptance": 0.9, "seconds": 0.1}
    metrics = utils.process_results({}, [stats])
    assert metrics["tokens_per_forward"] == 5.0
    assert set(metrics) <= {entry["metric"] for entry in read("_base.yaml")["metric_list"]}
    assert utils.process_results({}, [{}]) == {}
