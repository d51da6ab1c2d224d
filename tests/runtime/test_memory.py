"""How many rows fit into memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from s2d2_lmeval import load
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime import memory
from s2d2_lmeval.runtime.memory import (
    RowLimit,
    RowNeeds,
    bytes_per_position,
    bytes_per_token,
    free_bytes,
    out_of_memory,
)
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.runner import Runner

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def test_a_number_is_taken_as_it_is_and_auto_has_a_bound() -> None:
    assert RowLimit(200).most(CPU) == 200
    assert RowLimit(200, at_most=3).most(CUDA) == 3
    assert RowLimit("auto").most(CPU) == memory.MOST_ROWS_ON_CPU
    assert RowLimit("auto").most(CUDA) == memory.MOST_ROWS
    assert RowLimit("auto", at_most=5).most(CUDA) == 5


@pytest.mark.parametrize("wrong", [0, -1, "many", 1.5, None, True])
def test_anything_else_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="give auto, or the number of rows"):
        RowLimit(wrong)  # type: ignore[arg-type]


def test_bytes_of_a_position_are_those_that_the_cache_takes() -> None:
    model = tiny()
    assert bytes_per_position(model) == 2 * 3 * 2 * 8 * 2
    machine = Runner(model)
    machine.reserve(2, 32)
    machine.measure_costs(2, 1)  # the first forward allocates
    assert machine.cache.bytes_on == {
        CPU: 3 * 32 * bytes_per_position(model)
    }  # one slot more takes what stands for nothing


def test_rows_follow_from_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Runner(tiny())
    row, token = 32 * bytes_per_position(machine.model) + 24 * 50 * 4, bytes_per_token(machine.model, 32)
    needs = RowNeeds(capacity=32, logits=24, tokens=5)

    def fit(needs: RowNeeds, free: int) -> int:
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(free * 1.001 / memory.SHARE))
        return machine.rows_that_fit(needs)

    for rows in (1, 2, 7):
        assert fit(needs, rows * (row + 5 * token)) == rows
        # A forward takes no more tokens than of three rows.
        assert fit(replace(needs, together=15), rows * row + min(rows, 3) * 5 * token) == rows
    assert fit(needs, 0) == 1


def test_the_fullest_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device holds the cache of its layers; the logits lie where the tables and the head are."""
    model, held = tiny(), {CPU: 0}
    last, meta = model.model.layers[2], torch.device("meta")
    last._hf_hook = SimpleNamespace(execution_device="meta")  # as accelerate places layers
    needs = RowNeeds(capacity=32, logits=24, tokens=0)
    layer = 32 * bytes_per_position(model) // 3
    free = {CPU: 7 * (2 * layer + 24 * 50 * 4), meta: 5 * layer}
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free[device] * 1.001 / memory.SHARE))
    assert memory.rows_that_fit(model, CPU, needs, held) == 5
    free[meta] *= 2
    assert memory.rows_that_fit(model, CPU, needs, held) == 7


def test_this_machine_has_memory() -> None:
    assert free_bytes(CPU) > 1 << 20


def test_what_counts_as_out_of_memory() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_costs_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Runner(tiny())
    machine.reserve(2, 32)
    curve = machine.measure_costs(2, 8)
    assert list(curve.queries) == [2, 4, 6, 8, 12, 16]
    assert not machine.cache.lengths.any()
    monkeypatch.setattr(machine, "run", None)
    assert machine.measure_costs(2, 8) is curve
    with pytest.raises(TypeError):  # another batch is another matter
        machine.measure_costs(1, 8)


def test_a_new_cache_does_not_live_beside_the_old_one() -> None:
    """Captured graphs hold the cache that they write to."""
    held = Runner(tiny(), static_shapes=True)
    held.reserve(1, 64)
    place = torch.zeros(1, dtype=torch.long)
    visible = torch.ones(1, 1, 1, dtype=torch.bool)
    held.forward(Pass(Layout(np.arange(1), np.ones(1, dtype=int)), place, place, visible, place, np.ones(1, dtype=int)))
    old = weakref.ref(held.cache)
    held.reserve(1, 640)
    assert old() is None


def test_logits_go_to_where_tokens_came_in() -> None:
    """The head of a model that is spread over devices may lie on another one. Here that is ``meta``, which can be
    copied from nowhere: that it is tried shows that the logits move.
    """
    spread = Runner(tiny())
    spread.reserve(1, 64)
    spread.head.to("meta")
    spread.backbone = lambda **_: SimpleNamespace(last_hidden_state=torch.zeros(1, 1, 32, device="meta"))
    place = torch.zeros(1, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="out of meta tensor"):
        spread._answer(place, place, place, SimpleNamespace(destinations=place))


def test_a_run_makes_its_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = [CPU]

    @contextmanager
    def device(where: torch.device) -> Iterator[None]:
        current.append(where)
        yield
        current.pop()

    second = Runner(tiny())
    monkeypatch.setattr(torch.cuda, "device", device)
    with second.as_current_device():
        assert current == [CPU]
    second.device = torch.device("cuda", 1)
    with second.as_current_device():
        assert current[-1] == second.device
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert current == [CPU]


@pytest.mark.parametrize("run", ["generate", "score"])
def test_runs_are_inside_of_it(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("toy", max_batch=1)
    inside: list[bool] = []
    run_pass = Runner.run

    @contextmanager
    def entered(runner: Runner) -> Iterator[None]:
        runner.entered = True
        yield
        runner.entered = False

    def noted(runner: Runner, *arguments: Any) -> torch.Tensor:
        inside.append(runner.entered)
        return run_pass(runner, *arguments)

    monkeypatch.setattr(Runner, "entered", False, raising=False)
    monkeypatch.setattr(Runner, "as_current_device", entered)
    monkeypatch.setattr(Runner, "run", noted)
    if run == "generate":
        model.generate([[5, 6, 7]], {"decoder": "ar", "max_new_tokens": 2})
    else:
        model.score([([5, 6], [7])])
    assert inside
    assert all(inside)
