"""The harness's ``--seed`` is the seed of the samples, unless an option says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from s2d2_lmeval.harness.model import S2D2LM
from s2d2_lmeval.studies.tasks import load_tasks

from .conftest import write_task


@pytest.fixture
def manager(task_folder: Path, tmp_path: Path) -> TaskManager:
    (tmp_path / "code.py").write_text((task_folder / "code.py").read_text())
    write_task(tmp_path, "sampled", until=[], max_gen_toks=12, do_sample=True, temperature=1.5)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


Run = Callable[..., tuple[list[str], Any]]


@pytest.fixture
def run(manager: TaskManager, checkpoint: Path) -> Run:
    def run(model: Any = "s2d2", seed: Any = "default", **model_args: Any) -> tuple[list[str], Any]:
        seeds = {} if seed == "default" else {"torch_random_seed": seed}
        options = {"device": "cpu", "model_args": {"pretrained": str(checkpoint), "decoder": "ar", **model_args}}
        results = simple_evaluate(
            model=model,
            tasks=["sampled"],
            task_manager=manager,
            limit=3,
            batch_size=4,
            bootstrap_iters=0,
            **(options if model == "s2d2" else {}),
            **seeds,
        )
        return answers(results), results["config"]["s2d2"]

    return run


def answers(results: Any) -> list[str]:
    return [str(one["resps"][0][0]) for one in results["samples"]["sampled"] if one["filter"] == "text"]


def test_seeds_are_other_samples_and_are_recorded(run: Run) -> None:
    found = {seed: run(seed=seed) for seed in (1, 2, 3)}
    assert len({tuple(texts) for texts, _ in found.values()}) == 3
    assert found[1][0] == run(seed=1)[0]
    for seed, (_, about) in found.items():
        assert (about["seed"], about["configurations"][0]["decoding"]["seed"]) == (seed, seed)


def test_the_harness_s_default_is_a_seed_like_any_other(run: Run) -> None:
    texts, about = run()
    assert about["seed"] == 1234
    assert texts == run(seed=1234)[0]


def test_no_seed_is_ours_and_an_option_wins(run: Run, manager: TaskManager, checkpoint: Path) -> None:
    texts, about = run(seed=None)
    assert about["seed"] == 0
    for place in ("model_args", "gen_kwargs"):
        options: dict[str, Any] = {"model_args": {"pretrained": str(checkpoint), "decoder": "ar"}}
        options.setdefault(place, {})["seed"] = 0
        results = simple_evaluate(
            model="s2d2", tasks=["sampled"], task_manager=manager, limit=3, device="cpu", torch_random_seed=9, **options
        )
        assert answers(results) == texts
        assert results["config"]["s2d2"]["configurations"][0]["decoding"]["seed"] == 0


def test_a_ready_model_takes_the_seed_of_each_evaluation(run: Run, make: Callable[..., S2D2LM]) -> None:
    lm = make(batch_size=4, decoder="ar")
    assert lm.seed is None
    for seed in (1, 2, None, 1):
        texts, about = run(lm, seed=seed)
        assert texts == run(seed=seed)[0]
        assert about["seed"] == (seed or 0)


def test_an_evaluation_without_seeds(run: Run, manager: TaskManager, make: Callable[..., S2D2LM]) -> None:
    """``evaluate`` is given none, and ones of earlier evaluations are over."""
    lm = make(batch_size=4, decoder="ar")
    run(lm, seed=5)
    results = evaluate(lm=lm, task_dict=load_tasks(manager, "sampled"), limit=3, bootstrap_iters=0)
    assert answers(results) == run(seed=None)[0]


DRAWING = """
import torch

def draw(model, input_ids, max_gen_toks=4):
    return torch.cat([input_ids, torch.randint(64, 90, (1, max_gen_toks))], dim=1)
"""


def test_a_function_of_ones_own_draws_by_the_seed(tmp_path: Path, manager: TaskManager, checkpoint: Path) -> None:
    (tmp_path / "draw.py").write_text(DRAWING)
    model_args = {"pretrained": str(checkpoint), "custom_generate": f"{tmp_path / 'draw.py'}:draw"}

    def drawn(seed: Any) -> tuple[tuple[str, ...], Any]:
        results = simple_evaluate(
            model="s2d2",
            model_args=model_args,
            tasks=["sampled"],
            task_manager=manager,
            limit=3,
            device="cpu",
            torch_random_seed=seed,
        )
        return tuple(answers(results)), results["config"]["s2d2"]["seed"]

    found = [drawn(seed) for seed in (1, 2, None)]
    assert len({texts for texts, _ in found}) == 3
    assert [seed for _, seed in found] == [1, 2, 0]
    assert drawn(2) == found[1]
