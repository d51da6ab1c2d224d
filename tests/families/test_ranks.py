"""A model that several processes hold together answers as in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from s2d2_lmeval import load
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.ranks import Ranks
from s2d2_lmeval.runtime import clock, runner
from s2d2_lmeval.runtime.drafting import dflash
from s2d2_lmeval.runtime.drafting.dflash import DraftingRunner
from s2d2_lmeval.runtime.runner import Runner

from . import of_ranks
from .conftest import Published

FAMILIES = ("sdar", "sdar_moe", "llada2")


def launch(*command: str, ranks: int = 2, seconds: int = 240) -> subprocess.CompletedProcess[str]:
    """Run a script, or ``-m`` a module, in so many processes, which find each other by themselves."""
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(started, capture_output=True, text=True, timeout=seconds, env=environment, check=False)


def test_two_ranks_answer_as_one_process(publish: Callable[..., Published], tmp_path: Path) -> None:
    """Dense, with experts, and with a fused projection; the head its own or the embedding."""
    folders = [str(publish(name, tie_word_embeddings=name == "sdar_moe").folder) for name in FAMILIES]
    done = launch(of_ranks.__file__, str(tmp_path), *folders)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for folder, got in zip(folders, ranks[0], strict=True):
        expected = json.loads(json.dumps(of_ranks.everything(folder)))
        # Each rank holds half of the key heads, and half of their memory.
        assert [2 * heads for heads in got.pop("heads")] == expected.pop("heads")
        assert 2 * got.pop("memory") == expected.pop("memory")
        assert got == expected


@pytest.mark.parametrize(
    ("world", "given", "message"),
    [
        ("1", {}, "start one for each GPU with torchrun"),
        ("2", {"tp_plan": "colwise"}, "only auto is known here"),
        ("3", {}, "num_attention_heads=4, which 3 processes cannot divide evenly"),
        ("4", {}, "num_key_value_heads=2, which 4 processes cannot divide evenly"),
        ("2", {"device": "cpu"}, "tp_plan and device: give one of them"),
        ("2", {"device_map": "auto"}, "tp_plan and device_map: give one of them"),
        ("2", {"adapter": "somewhere"}, "tp_plan and adapter: give one of them"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    world: str, given: dict[str, str], message: str, publish: Callable[..., Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=message):
        load(publish("sdar").folder, **{"tp_plan": "auto", **given})


def test_what_several_ranks_cannot_have_is_refused(
    publish: Callable[..., Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs, a drafter beside the target, draws from a generator of each process."""
    model = load(publish("sdar").folder, device="cpu")
    monkeypatch.setattr(clock, "_ranks", clock._ranks)
    monkeypatch.setattr(runner, "ranks_of", lambda model: Ranks(rank=0, size=2))
    monkeypatch.setattr(dflash, "ranks_of", lambda model: Ranks(rank=0, size=2))
    with pytest.raises(ConfigError, match="static_shapes: forwards of several ranks are not captured"):
        Runner(model.hf_model, static_shapes=True)
    with pytest.raises(ConfigError, match="leave out draft or tp_plan"):
        DraftingRunner(model.hf_model, model.hf_model)
    model._runner.ranks = Ranks(rank=0, size=2)
    with pytest.raises(ConfigError, match="several ranks draw alike from keyed or fixed only"):
        model.generate([[5, 6]], {"random_source": "torch", "do_sample": True})
