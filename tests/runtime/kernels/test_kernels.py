"""Kernels: both sides agree, the Triton side compiles for GPUs that are not here, and either runs where it should."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s2d2_lmeval.runtime.kernels import dispatch
from s2d2_lmeval.runtime.kernels.attention import attend, attends
from s2d2_lmeval.runtime.kernels.dispatch import Kernel, Launcher, kernel, launched_by, runs_triton

from . import compiling, drawn

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
PROGRAM = Path(__file__).with_name("interpreted.py")
CUDA = torch.device("cuda", 0)
SMALLEST_SHARED = 99 * 1024
"""Bytes of shared memory that a program can have on GPUs for desktops of these architectures."""


@needs_triton
@pytest.mark.parametrize("part", ["attention", "layer", "statistics", "draws"])
def test_triton_computes_what_torch_does(part: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM), part], env=environment, capture_output=True, text=True)
    assert not done.returncode, f"{done.stdout}\n{done.stderr}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", ["attention", "layer", "statistics", "draws"])
def test_triton_computes_what_torch_does_on_a_gpu(part: str) -> None:
    specification = spec_from_file_location("interpreted", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    program = module_from_spec(specification)
    specification.loader.exec_module(program)
    program.PARTS[part]("cuda")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_a_gpu(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    too_large = {}
    for name, case in compiling.cases():
        made = compiling.compiled(case, capability)
        assert made.asm["cubin"], name
        if made.metadata.shared > SMALLEST_SHARED:
            too_large[name] = made.metadata.shared
    assert not too_large


# ---- attention's reference ----


@pytest.mark.parametrize("name", drawn.ATTENTION)
def test_attention_of_each_query_by_itself(name: str) -> None:
    given = drawn.attention(**drawn.ATTENTION[name], dtype=torch.float64)
    got = attend(**given)
    queries, keys, values, visible = (given[key] for key in ("queries", "keys", "values", "visible"))
    groups = queries.shape[1] // keys.shape[2]
    done = 0
    for row, (slot, length, offset, width) in enumerate(
        zip(*(given[key].tolist() for key in ("slots", "lengths", "offsets", "widths")), strict=True)
    ):
        for local in range(width):
            place = torch.arange(length + width)
            sees = (place < length) | visible[row, local, (place - length).clamp_min(0)]
            if given["positions"] is not None:
                own = given["positions"][offset + local]
                sees &= (place - own).abs() < given["window"]
                sees &= (place <= own) | torch.tensor(not given["causal"])
            k, v = (storage[slot, place[sees]].repeat_interleave(groups, 1) for storage in (keys, values))
            weights = (torch.einsum("hd,chd->hc", queries[offset + local], k) * given["scale"]).softmax(-1)
            torch.testing.assert_close(got[offset + local], torch.einsum("hc,chd->hd", weights, v))
            done += 1
    assert done == len(queries) - 2
    assert not got[-2:].any()


# ---- which side runs ----


class Pretender(Launcher):
    """Says that Triton works, runs the reference and counts."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def works(self, device: torch.device) -> bool:
        return True

    def run(self, kernel: Kernel[Any, Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(kernel.name)
        return kernel.reference(*args, **kwargs)


class OnCuda(torch.Tensor):
    """A tensor that says it is somewhere else."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


def _sides() -> Any:
    return SimpleNamespace(doubled=lambda x, by=2: f"triton {len(x)}")


@kernel(_sides, launches=3, writes=("x",))
def doubled(x: torch.Tensor, by: float = 2) -> Any:
    """Twice the first."""
    return f"torch {len(x)}"


def test_the_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    x = torch.zeros(4).as_subclass(OnCuda)
    assert (doubled.name, doubled.launches, doubled.writes, doubled.__doc__) == (
        "doubled",
        3,
        ("x",),
        "Twice the first.",
    )
    assert doubled(x) == "torch 4", "there is no such device"
    pretender = Pretender()
    with launched_by(pretender):
        assert runs_triton(CUDA)
        assert not runs_triton(torch.device("cpu"))
        assert doubled(x, by=3) == "torch 4"
        assert doubled(torch.zeros(4)) == doubled(x.double()) == "torch 4"
    assert pretender.calls == ["doubled"]
    assert not runs_triton(CUDA)
    assert doubled.implementation(x) == "triton 4"


@pytest.mark.parametrize("fault", ["Failed to find C compiler.", None])
def test_a_triton_that_cannot_compile_is_not_used(
    fault: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def counted(device: torch.device) -> torch.Tensor:
        if fault:
            raise RuntimeError(fault)
        return torch.arange(16)

    monkeypatch.setitem(sys.modules, "s2d2_lmeval.runtime.kernels.probe_triton", SimpleNamespace(counted=counted))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert dispatch._compiles.__wrapped__(CUDA) is (fault is None)
    assert ((fault or "Triton") in caplog.text) is bool(fault)


def test_attention_is_used_where_it_fits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    heads, here = (4, 2, 16), torch.device("cpu")
    assert attends(heads, here, torch.float64), "its reference takes anything"
    assert not attends(heads, CUDA, torch.float32), "there is no Triton on such a device"
    with launched_by(Pretender()):
        assert not attends((4, 2, 24), CUDA, torch.float32)
        assert not attends((130, 2, 16), CUDA, torch.float32)
        assert not attends(heads, CUDA, torch.float64)
    assert not caplog.text
