"""A captured graph: operations on fixed addresses, to be run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from s2d2_lmeval.studies.pretend.nested import mapped, tensors_in

GARBAGE = 0xFF
"""The byte that memory holds which nothing meaningful was written to: NaN, and -1 in whole numbers."""


class _Step(NamedTuple):
    run: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    results: list[torch.Tensor | None]
    """None where the result is memory from outside, which the operation itself writes to."""
    where: str


class _Outside:
    """Memory that a graph uses and does not own: it may be freed while the graph still has its address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.shape = tensor.storage_offset(), tensor.shape, tensor.stride()
        self.like = tensor.new_empty(0)

    def tensor(self) -> torch.Tensor | None:
        """The tensor at this address; None if its memory was freed."""
        if self.storage.expired():
            return None
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return None if storage is None else self.like.new_empty(0).set_(storage, *self.shape)

    def garbage(self) -> torch.Tensor:
        """What a device may find at an address that was freed."""
        _, shape, stride = self.shape
        found = self.like.new_empty(0)
        found.set_(torch.zeros(_bytes(found, shape, stride), dtype=torch.uint8).untyped_storage(), 0, shape, stride)
        return found


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All memory that a tensor shares, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _bytes(like: torch.Tensor, shape: Sequence[int], stride: Sequence[int]) -> int:
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else -1
    return (last + 1) * like.element_size()


def without_values(run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What ``run(*args, **kwargs)`` gives, but for its numbers: a capture runs nothing, so all of them are in range."""
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def shape_of(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return torch.device("meta") if isinstance(value, torch.device) else value
        given.append((value.to("meta"), value))
        return given[-1][0]

    def memory_for(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        known = [tensor for shape, tensor in given if shape is value]
        return known[0] if known else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

    return mapped(memory_for, run(*mapped(shape_of, args), **mapped(shape_of, kwargs)))


class Capture:
    """What was launched on a device between the begin and the end of a capture, and can be replayed after it.

    A real capture runs nothing. Here everything runs, so that shapes are known; :meth:`end` undoes it.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.kernels = 0
        self._steps: list[_Step] = []
        self._own: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._outside: list[_Outside] = []

    def ran(
        self,
        run: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        where: str,
        writes: Sequence[torch.Tensor] = (),
    ) -> Any:
        """``run(*args, **kwargs)``, which writes to memory of ``writes``, as part of the graph."""
        for tensor in writes:
            self.writes(tensor)
        try:
            found = run(*args, **kwargs)
        except (IndexError, RuntimeError) as error:
            try:
                found = without_values(run, args, kwargs)
            except Exception:
                raise error from None  # it is not the values that are wrong
        self.owns(found, of=(args, kwargs))
        self.record(run, args, kwargs, found, where)
        return found

    def owns(self, made: Any, of: Any = ()) -> None:
        """What of ``made`` does not lie in the memory of ``of`` was allocated in this capture."""
        before = {tensor.untyped_storage()._cdata for tensor in tensors_in(of)}
        for tensor in tensors_in(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self._own.setdefault(storage._cdata, storage)

    def writes(self, tensor: torch.Tensor) -> None:
        """Before an operation that writes to ``tensor``."""
        storage = tensor.untyped_storage()
        if not self._is_own(tensor) and storage._cdata not in self._before:
            self._before[storage._cdata] = storage, storage.clone()

    def record(
        self, run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, where: str
    ) -> None:
        """``run(*args, **kwargs)`` gave ``result``."""
        self._steps.append(_Step(run, args, kwargs, list(tensors_in(result)), where))

    def end(self) -> None:
        """Undo what the capture wrote, and let go of memory that is not the graph's own."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()
        known: dict[int, _Outside] = {}

        def released(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or self._is_own(value):
                return value
            if id(value) not in known:
                known[id(value)] = _Outside(value)
            return known[id(value)]

        # Until all are released the tensors live, so that ids stay apart.
        steps = [
            step._replace(
                args=mapped(released, step.args),
                kwargs=mapped(released, step.kwargs),
                results=[one if one is not None and self._is_own(one) else None for one in step.results],
            )
            for step in self._steps
        ]
        self._steps = steps
        self._outside = list(known.values())
        for step in steps:
            for made in step.results:
                if made is not None and made.dtype != torch.bool:
                    _bytes_of(made).fill_(GARBAGE)

    def _is_own(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._own

    def replay(self) -> list[str]:
        """Run it all again, onto the same addresses. Returns where it met memory that was freed."""
        stale = []
        with _disable_current_modes(), torch.inference_mode():
            found = {id(one): one.tensor() for one in self._outside}
            for step in self._steps:
                freed = False

                def present(value: Any) -> Any:
                    nonlocal freed
                    if not isinstance(value, _Outside):
                        return value
                    tensor = found[id(value)]
                    freed = freed or tensor is None
                    return value.garbage() if tensor is None else tensor

                results = step.run(*mapped(present, step.args), **mapped(present, step.kwargs))
                if freed:
                    stale.append(step.where)
                for made, new in zip(step.results, tensors_in(results), strict=True):
                    if made is not None and made.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        made.copy_(new)
        return stale
