"""Which implementation of a kernel runs: Triton's on CUDA tensors, where Triton works on their device, else torch's.

A kernel is declared by its reference, and its Triton implementation has the same name and signature in another file::

    @kernel(_triton)
    def silu_mul(gate_up: torch.Tensor) -> torch.Tensor: ...

The seam: everything about Triton goes through one :class:`Launcher`. To count launches, or to run on a device that only
pretends to be CUDA, put another one there for a while with :func:`launched_by`. Its :meth:`Launcher.works` says for
which devices it answers, its :meth:`Launcher.run` gets the kernel and its arguments; what it needs to know is public on
:class:`Kernel`: ``name``, ``reference``, ``launches`` (GPU kernels per call) and ``writes`` (arguments written to).
Nobody else looks behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, update_wrapper
from importlib.util import find_spec
from types import ModuleType
from typing import Generic, ParamSpec, TypeVar

import torch

from s2d2_lmeval.errors import first_line

logger = logging.getLogger("s2d2_lmeval")

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Generic[P, R]):
    """A torch ``reference`` and the function of the same name in the module that ``triton`` imports.

    ``launches`` is the number of GPU kernels of a call; ``writes`` names the arguments that a call writes to.
    """

    def __init__(
        self, reference: Callable[P, R], triton: Callable[[], ModuleType], launches: int, writes: tuple[str, ...]
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.launches, self.writes = launches, writes
        self._module = triton
        update_wrapper(self, reference)

    @cached_property
    def implementation(self) -> Callable[P, R]:
        """The Triton implementation."""
        found: Callable[P, R] = getattr(self._module(), self.name)
        return found

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu":
            return self.reference(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        device = tensors[0].device
        if not runs_triton(device) or any(tensor.dtype == torch.float64 for tensor in tensors):
            return self.reference(*args, **kwargs)
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its tensors lie on
            return _launcher.run(self, *args, **kwargs)


def kernel(
    triton: Callable[[], ModuleType], *, launches: int = 1, writes: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Declares a function of tensors as the reference of a :class:`Kernel`. Its first tensor says on which device it
    runs; float64 always stays in torch.
    """
    return lambda reference: Kernel(reference, triton, launches, writes)


class Launcher:
    """Runs Triton implementations on real devices."""

    def works(self, device: torch.device) -> bool:
        """Whether kernels run on ``device``, a CUDA device."""
        return _compiles(device)

    def run(self, kernel: Kernel[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What ``kernel`` makes of the arguments, whose device is the current one."""
        return kernel.implementation(*args, **kwargs)


_launcher = Launcher()


@contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """Lets ``launcher`` run the kernels meanwhile."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before


def runs_triton(device: torch.device) -> bool:
    """Whether kernels on ``device`` run their Triton implementation."""
    return device.type == "cuda" and _launcher.works(device)


@cache
def _compiles(device: torch.device) -> bool:
    """Triton needs a C compiler and Python's headers when it first compiles, and a GPU that it knows."""
    if find_spec("triton") is None:
        return False
    try:
        from s2d2_lmeval.runtime.kernels.probe_triton import counted

        with torch.cuda.device(device):
            works = counted(device).tolist() == list(range(16))
            said = "wrong numbers"
    except Exception as error:
        works, said = False, first_line(error)
    if not works:
        logger.warning("Triton is installed but does not run here (%s); torch stands in for it.", said)
    return works
