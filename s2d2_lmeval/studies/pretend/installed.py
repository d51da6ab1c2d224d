"""Puts a pretend device in the place of torch's CUDA, and takes it away again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from s2d2_lmeval.runtime.kernels.dispatch import Kernel, Launcher, launched_by
from s2d2_lmeval.studies.pretend import streams
from s2d2_lmeval.studies.pretend.counts import Counts
from s2d2_lmeval.studies.pretend.machine import Machine, put_in_place
from s2d2_lmeval.studies.pretend.nested import mapped
from s2d2_lmeval.studies.pretend.tensors import PretendMode, PretendTensor, named_device

MEMORY, FREE = 24 << 30, 20 << 30


@contextmanager
def pretend_cuda(devices: int = 1) -> Iterator[Counts]:
    """``devices`` pretend GPUs in place of ``torch.cuda``, whether or not there are real ones; counts what they do.

    Everything is as before at the end. Load models before: transformers initialises some buffers by moving them about.

    Raises:
        RuntimeError: inside another one.
    """
    torch._C._ensureCUDADeviceGuardSet()
    if torch.cuda.is_available():
        torch.cuda.init()
    machine = Machine(devices)
    with ExitStack() as stack:
        stack.enter_context(put_in_place(machine))
        for owner, replacements in ((torch.cuda, _of_cuda(machine)), (torch, _of_torch(machine))):
            stack.enter_context(_replaced(owner, replacements))
        stack.enter_context(_replaced(torch.Tensor, _of_tensors(machine)))
        stack.enter_context(launched_by(_PretendLauncher(machine)))
        stack.enter_context(PretendMode(machine))
        yield machine.counts


@contextmanager
def _replaced(owner: Any, replacements: dict[str, Any]) -> Iterator[None]:
    before = {name: vars(owner)[name] for name in replacements if name in vars(owner)}
    try:
        for name, value in replacements.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in replacements:
            setattr(owner, name, before[name]) if name in before else delattr(owner, name)


def _of_cuda(machine: Machine) -> dict[str, Any]:
    """``torch.cuda``."""

    def exchange(device: int) -> int:
        before = machine.current
        if device >= machine.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal (cuda:{device} of {machine.devices})")
        machine.current = device if device >= 0 else before
        return before

    def of_machine(base: type) -> type:
        return type(base.__name__, (base,), {"machine": machine})

    stream = of_machine(streams.Stream)
    default = stream()
    return {
        "_lazy_init": lambda: None,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "set_device": lambda device: exchange(named_device(machine, _as_device(device)).index) and None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: machine.devices,
        "current_device": lambda: machine.current,
        "Event": of_machine(streams.Event),
        "Stream": stream,
        "stream": lambda one: one or default,
        "current_stream": lambda device=None: default,
        "default_stream": lambda device=None: default,
        "set_stream": lambda one: None,
        "CUDAGraph": of_machine(streams.CUDAGraph),
        "graph": of_machine(streams.graph),
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: machine.capture is not None,
        "synchronize": lambda device=None: machine.wait(machine.issued, "a device"),
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (FREE, MEMORY),
        "get_device_name": lambda device=None: "a pretend GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="a pretend GPU", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132
        ),
    }


def _as_device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _of_torch(machine: Machine) -> dict[str, Any]:
    """Functions of ``torch`` that dispatch only with torch's own support of CUDA, or not at all."""
    real_tensor, real_as_tensor, real_nonzero = torch.tensor, torch.as_tensor, torch.nonzero

    def tensor(data: Any, *, device: Any = None, **given: Any) -> torch.Tensor:
        device = None if device is None else named_device(machine, _as_device(device))
        pins = given.pop("pin_memory", False)
        if device is None or device.type != "cuda":
            made = real_tensor(data, device=device, **given)
            return machine.pin(made) if pins else made
        return real_tensor(data, **given).to(device)

    def as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        if isinstance(data, torch.Tensor):
            return data.to(device=device, dtype=dtype)
        made = real_as_tensor(data, dtype=dtype)
        return made if device is None else made.to(_as_device(device))

    def nonzero(x: torch.Tensor, **given: Any) -> Any:
        return x.nonzero(**given) if isinstance(x, PretendTensor) else real_nonzero(x, **given)

    return {"tensor": tensor, "as_tensor": as_tensor, "nonzero": nonzero}


def _of_tensors(machine: Machine) -> dict[str, Any]:
    """Methods of all tensors that ask for pinned memory."""

    def pin_memory(self: torch.Tensor, device: object = None) -> torch.Tensor:
        return self if machine.is_pinned(self) else machine.pin(self.clone())

    def is_pinned(self: torch.Tensor, device: object = None) -> bool:
        return not isinstance(self, PretendTensor) and machine.is_pinned(self)

    return {"pin_memory": pin_memory, "is_pinned": is_pinned}


class _PretendLauncher(Launcher):
    """Counts what a Triton kernel launches, with its torch version's result."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def works(self, device: torch.device) -> bool:
        return True

    def run(self, kernel: Kernel[Any, Any], *args: Any, **kwargs: Any) -> Any:
        machine, given = self.machine, inspect.signature(kernel.reference).bind(*args, **kwargs).arguments
        device = next(value.device for value in given.values() if isinstance(value, torch.Tensor))
        inner = {name: value.elem if isinstance(value, PretendTensor) else value for name, value in given.items()}
        for _ in range(kernel.launches):
            machine.by_triton(kernel.name, device)
        if machine.capture is None:
            found = kernel.reference(**inner)
        else:
            changed = [inner[name] for name in kernel.writes]
            found = machine.capture.ran(kernel.reference, (), inner, kernel.name, changed)
        return mapped(lambda one: PretendTensor(one, device) if isinstance(one, torch.Tensor) else one, found)
