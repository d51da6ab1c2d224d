"""The harness's caches: responses of one configuration are never another's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import CacheHook
from lm_eval.tasks import TaskManager
from sqlitedict import SqliteDict

from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.harness import responses
from s2d2_lmeval.harness.identity import of_plain
from s2d2_lmeval.harness.prompts import Prompt, request_key
from s2d2_lmeval.harness.responses import TracedResponse

from .conftest import write_checkpoint


@pytest.fixture
def evaluate(checkpoint: Path, task_folder: Path) -> Callable[..., Any]:
    def run(task: str = "tiny_free", *, include: Path = task_folder, **options: Any) -> Any:
        model_args = {"pretrained": str(checkpoint), **options.pop("model_args", {})}
        return simple_evaluate(
            model="s2d2",
            model_args=model_args,
            tasks=[task],
            task_manager=TaskManager(include_path=str(include), include_defaults=False),
            device="cpu",
            batch_size=4,
            limit=2,
            bootstrap_iters=0,
            **options,
        )

    return run


def answers(results: Any) -> list[Any]:
    return [sample["resps"] for sample in results["samples"]["tiny_free"] if sample["filter"] == "text"]


def test_two_configurations_in_one_response_cache(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    sampled = {"do_sample": True, "confidence_threshold": 0.1}
    first = evaluate(use_cache=cache, model_args={"decoder": "ar"})
    other = evaluate(use_cache=cache, model_args=sampled)
    plain = evaluate(model_args=sampled)
    assert answers(other) == answers(plain) != answers(first)
    assert other["config"]["s2d2"]["cached_responses"] == 0
    again = evaluate(use_cache=cache, model_args={"decoder": "ar"})
    assert answers(again) == answers(first)
    assert again["config"]["s2d2"]["cached_responses"] == 2
    assert "totals" not in again["config"]["s2d2"]
    # Counts survive the cache, but times would be those of the run that filled it.
    row = again["results"]["tiny_free"]
    assert row["nfe,decode"] == first["results"]["tiny_free"]["nfe,decode"]
    assert "seconds,decode" not in row


def prompt(occurrence: int = 0, **gen_kwargs: Any) -> Prompt:
    return Prompt(0, "text", gen_kwargs, [1, 2], request_key([1, 2], occurrence), "task", 0, occurrence)


def test_the_store_separates_runs_and_occurrences(tmp_path: Path) -> None:
    with SqliteDict(str(tmp_path / "x.db"), autocommit=True) as store:
        store["key"] = 1.5  # of another model
        hook = CacheHook(None)
        hook.dbdict = store
        cache = responses.separate(hook, "one")
        assert cache is not None
        assert "key" not in store
        store["key"] = 2.5
        assert store["key"] == 2.5
        store["answer"] = TracedResponse("the harness knows too little to keep this")
        assert "answer" not in store
        cache.add(prompt(), TracedResponse("text", {"nfe": 3, "seconds": 1.0}), ())
        found = cache.find(prompt())
        assert found == "text"
        assert found is not None
        assert found.stats == {"nfe": 3, "cached": 1}
        assert [cache.find(other) for other in (prompt(1), prompt(top_k=5))] == [None, None]
        assert responses.hits(hook) == 2
        other = responses.separate(hook, "two")
        assert other is not None
        assert other.find(prompt()) is None
        assert "key" not in store
        responses.separate(hook, "one")
        assert "key" in store


def test_repeats_come_back_as_they_were(evaluate: Callable[..., Any], task_folder: Path, tmp_path: Path) -> None:
    """Sampled repeats of a document: all of them, in order, also where a part of them is in the cache."""
    text = (task_folder / "tiny_free.yaml").read_text().replace("task: tiny_free", "task: often\nrepeats: 4")
    (tmp_path / "code.py").write_text((task_folder / "code.py").read_text())
    (tmp_path / "often.yaml").write_text(text.replace("max_gen_toks: 12", "max_gen_toks: 12\n  temperature: 1.5"))

    def texts(**options: Any) -> tuple[list[list[str]], int]:
        found = evaluate("often", include=tmp_path, **options)
        samples = [sample for sample in found["samples"]["often"] if sample["filter"] == "text"]
        return [list(map(str, sample["resps"][0])) for sample in samples], found["config"]["s2d2"]["cached_responses"]

    plain, _ = texts()
    assert min(len(set(answers)) for answers in plain) > 1
    cache = str(tmp_path / "cache")
    assert texts(use_cache=cache) == (plain, 0)
    assert texts(use_cache=cache) == (plain, 8)
    with SqliteDict(f"{cache}_rank0.db", autocommit=True) as store:
        for key in list(store)[1::3]:
            del store[key]
    found, hits = texts(use_cache=cache)
    assert found == plain
    assert 0 < hits < 8


def test_weights_that_changed_in_place_are_another_model(
    evaluate: Callable[..., Any], task_folder: Path, tmp_path: Path
) -> None:
    """Also its tokenizer, its seed and a function of the user's; not its place."""
    cache = str(tmp_path / "cache")

    def cached(folder: Path, args: Any = None, **options: Any) -> int:
        results = evaluate(use_cache=cache, model_args={"pretrained": str(folder), **(args or {})}, **options)
        return results["config"]["s2d2"]["cached_responses"]

    folder = write_checkpoint(tmp_path / "model", seed=1)
    assert [cached(folder), cached(folder)] == [0, 2]
    assert cached(folder, torch_random_seed=5) == 0
    write_checkpoint(folder, seed=2)
    assert [cached(folder), cached(folder)] == [0, 2]
    settings = folder / "tokenizer.json"
    settings.write_text(settings.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert [cached(folder), cached(folder)] == [0, 2]
    (tmp_path / "mine.py").write_text(OWN_FUNCTION)
    own = {"custom_generate": f"{tmp_path / 'mine.py'}:write"}
    assert [cached(folder, args=own), cached(folder, args=own)] == [0, 2]
    (tmp_path / "mine.py").write_text(OWN_FUNCTION.replace("+ 65", "+ 66"))
    assert cached(folder, args=own) == 0


OWN_FUNCTION = """
import torch

def write(model, input_ids, max_gen_toks=4):
    return torch.cat([input_ids, torch.zeros_like(input_ids[:, :1]) + 65], dim=1)
"""


def test_another_evaluation_of_the_model_without_a_cache_reads_none(
    make: Callable[..., Any], task_folder: Path, tmp_path: Path
) -> None:
    lm, manager = make(batch_size=4), TaskManager(include_path=str(task_folder), include_defaults=False)
    found = []
    for cache in (str(tmp_path / "cache"), str(tmp_path / "cache"), None):
        options = {"tasks": ["tiny_free"], "task_manager": manager, "limit": 2, "bootstrap_iters": 0}
        results = simple_evaluate(model=lm, use_cache=cache, **options)
        found.append(results["config"]["s2d2"]["cached_responses"])
    assert found == [0, 2, 0]


def test_no_cache_and_an_unknown_kind_of_cache() -> None:
    assert responses.separate(CacheHook(None), "run") is None
    assert responses.hits(CacheHook(None)) == 0
    hook = CacheHook(None)
    hook.dbdict = {}
    with pytest.raises(ConfigError, match="run without it"):
        responses.separate(hook, "run")


def test_digests_depend_on_every_fact() -> None:
    facts = {"checkpoint": ["a", "main"], "decoding": {"threshold": 0.9}}
    assert of_plain(facts) == of_plain(dict(reversed(facts.items())))
    assert of_plain(facts) != of_plain({**facts, "decoding": {"threshold": 0.8}})


def test_requests_cached_by_another_run(
    evaluate: Callable[..., Any], task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    for name in ("code.py", "tiny_free.yaml"):
        (tmp_path / name).write_text((task_folder / name).read_text())
    first = evaluate(include=tmp_path, cache_requests=True)
    assert answers(evaluate(include=tmp_path, cache_requests=True)) == answers(first)
    yaml = tmp_path / "tiny_free.yaml"
    yaml.write_text(re.sub("max_gen_toks: 12", "max_gen_toks: 3", yaml.read_text()))
    message = r"max_gen_toks': 12.*but this run has.*max_gen_toks': 3.*--cache_requests refresh"
    with pytest.raises(RequestError, match=message):
        evaluate(include=tmp_path, cache_requests=True)
    fresh = evaluate(include=tmp_path, cache_requests=True, rewrite_requests_cache=True)
    assert fresh["results"]["tiny_free"]["new_tokens,decode"] == 3
