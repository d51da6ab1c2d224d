"""Kernels: both sides agree, the Triton side compiles for GPUs that are not here, and either runs where it should."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s2d2_lmeval.runtime.kernels import dispatch
from s2d2_lmeval.runtime.kernels.dispatch import Kernel, Launcher, kernel, launched_by, runs_triton

from . import compiling

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
PROGRAM = Path(__file__).with_name("interpreted.py")
CUDA = torch.device("cuda", 0)
SMALLEST_SHARED = 99 * 1024
"""Bytes of shared memory that a program can have on GPUs for desktops of these architectures."""


@needs_triton
@pytest.mark.parametrize("part", ["statistics", "draws"])
def test_triton_computes_what_torch_does(part: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM), part], env=environment, capture_output=True, text=True)
    assert not done.returncode, f"{done.stdout}\n{done.stderr}"


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
