"""``--model s2d2`` with ``decoder=ar`` on a plain causal checkpoint is the harness' ``--model hf``: the same texts,
scores, log-likelihoods, windows and truncation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .stock import TASKS, evaluated, write_plain, write_tasks

CHAT: dict[str, Any] = {"apply_chat_template": True}
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "batched": {"batch_size": 3},
    "few-shot": {"num_fewshot": 2},
    "chat": CHAT,
    "system": {**CHAT, "system_instruction": "Be brief."},
    "few-shot chat": {**CHAT, "num_fewshot": 2},
    "multi-turn": {**CHAT, "num_fewshot": 2, "fewshot_as_multiturn": True, "system_instruction": "Be brief."},
    "limited": {"limit": 2},
    "shorter": {"model_args": {"max_length": 96}},
    "bos": {"model_args": {"add_bos_token": True}},
    "no bos": {"model_args": {"add_bos_token": False}},
    "truncation": {"model_args": {"truncation": True, "max_length": 64}},
    "thinking": {"model_args": {"think_end_token": "a"}},
    "thinking by id": {"model_args": {"think_end_token": 65}},
    "thinking in a chat": {**CHAT, "model_args": {"think_end_token": 260, "enable_thinking": True}},
}
GENERATING = ("gen", "gen_no_stop", "gen_many_stops", "gen_prefixed")
SOME = ("gen", "gen_prefixed", "gen_repeated", "choose_letters", "choose_words", "score", "score_no_context", "roll")


@pytest.fixture(scope="session")
def stock_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("stock") / "tasks")


@pytest.fixture(scope="session")
def plain_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {kind: write_plain(folder / kind, kind) for kind in ("qwen3", "llama")}


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("how", HOW)
def test_the_same_as_hf(how: str, kind: str, stock_tasks: Path, plain_checkpoints: dict[str, Path]) -> None:
    """Texts to the letter; log-likelihoods to what sums of float32 in another order differ by."""
    options = dict(HOW[how])
    tasks = tuple(TASKS) if how == "plain" else GENERATING if how.startswith("thinking") else SOME
    given = {"pretrained": str(plain_checkpoints[kind]), "dtype": "float32", **options.pop("model_args", {})}
    theirs = evaluated("hf", given, tasks, stock_tasks, **{**options, "batch_size": 1})
    ours = evaluated("s2d2", {**given, "decoder": "ar"}, tasks, stock_tasks, **options)
    for task in tasks:
        assert theirs[task]["texts"] or theirs[task]["numbers"]
        assert ours[task]["texts"] == theirs[task]["texts"], task
        assert ours[task]["numbers"] == pytest.approx(theirs[task]["numbers"], rel=1e-5, abs=1e-4), task


def test_the_same_with_the_harness_caches(
    stock_tasks: Path, plain_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of requests and of responses, filled and read."""
    given = {"pretrained": str(plain_checkpoints["qwen3"]), "dtype": "float32"}
    theirs = evaluated("hf", given, SOME, stock_tasks, batch_size=1)
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    for _ in range(2):
        caches = {"cache_requests": True, "use_cache": str(tmp_path / "responses")}
        ours = evaluated("s2d2", {**given, "decoder": "ar"}, SOME, stock_tasks, **caches)
        for task in SOME:
            assert ours[task]["texts"] == theirs[task]["texts"], task
            assert ours[task]["numbers"] == pytest.approx(theirs[task]["numbers"], rel=1e-5, abs=1e-4), task
    assert list(tmp_path.glob("*.pickle")), "requests were cached"
