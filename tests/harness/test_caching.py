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
from s2d2_lmeval.harness import caching
from s2d2_lmeval.harness.responses import TracedResponse


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


def test_the_store_separates_runs(tmp_path: Path) -> None:
    with SqliteDict(str(tmp_path / "x.db"), autocommit=True) as store:
        store["key"] = "of another model"
        hook = CacheHook(None)
        hook.dbdict = store
        assert caching.separate(hook, "one") is hook
        assert "key" not in store
        store["key"] = TracedResponse("text", {"nfe": 3, "seconds": 1.0})
        assert store["key"] == "text"
        assert store["key"].stats == {"nfe": 3, "cached": 1}
        assert caching.hits(hook) == 2
        caching.separate(hook, "two")
        assert "key" not in store
        caching.separate(hook, "one")
        assert "key" in store


def test_no_cache_and_an_unknown_kind_of_cache() -> None:
    assert caching.separate(CacheHook(None), "run").dbdict is None
    assert caching.hits(CacheHook(None)) == 0
    hook = CacheHook(None)
    hook.dbdict = {}
    with pytest.raises(ConfigError, match="run without it"):
        caching.separate(hook, "run")


def test_fingerprints_depend_on_every_fact() -> None:
    facts = {"checkpoint": ["a", "main"], "decoding": {"threshold": 0.9}}
    assert caching.fingerprint(facts) == caching.fingerprint(dict(reversed(facts.items())))
    assert caching.fingerprint(facts) != caching.fingerprint({**facts, "decoding": {"threshold": 0.8}})


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
