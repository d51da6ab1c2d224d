"""Tensors on a pretend device, and what each operation on them means there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s2d2_lmeval.studies.pretend.counts import READ, place
from s2d2_lmeval.studies.pretend.machine import Machine, machine_in_place
from s2d2_lmeval.studies.pretend.nested import mapped, tensors_in

_WITHOUT_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_", "is_same_size"),
    *("detach", "alias", "lift", "lift_fresh", "_unsafe_view", "_reshape_alias", "_neg_view"),
    *("view_as_real", "view_as_complex"),
}
"""Operations that launch nothing, beside views."""

_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
"""Operations whose result the host is."""

_SIZED_BY_VALUES = {
    *("nonzero", "masked_select", "bincount", "_unique", "_unique2"),
    *("unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
"""Operations that the host waits for to know how large their result is."""

_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}

_WHOLE = {"scaled_dot_product_attention"}
"""Composite operations that are a kernel of their own on CUDA."""


def _counted(x: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
    """``histc``, which on a CPU counts floating point numbers only."""
    return torch.histc(x.float(), *given, **more).to(x.dtype)


_ON_CUDA_ONLY = {"histc": _counted}
"""Operations with less support on a CPU -> what stands in for them."""


class PretendTensor(torch.Tensor):
    """Says that it lies on ``cuda:N``; its numbers are those of :attr:`elem`, on the CPU."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor, device: torch.device) -> PretendTensor:
        """``elem`` as a tensor on ``device``; they share their memory."""
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=device,
            requires_grad=False,
        )
        made.elem = elem
        return made

    @property
    def machine(self) -> Machine:
        """The one in place now."""
        return machine_in_place()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return operate(machine_in_place(), func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.elem!r}, device={self.device})"

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def _read(self) -> torch.Tensor:
        self.machine.read(torch.empty_like(self.elem), self.elem, asked_not_to_wait=False)
        return self.elem

    def tolist(self) -> Any:
        return self._read().tolist()

    def item(self) -> Any:
        return self._read().item()

    def __bool__(self) -> bool:
        return bool(self._read())

    def __int__(self) -> int:
        return int(self._read())

    def __float__(self) -> float:
        return float(self._read())

    def __index__(self) -> int:
        return self._read().__index__()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self._read().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: object, **__: object) -> Any:
        return self.numpy()

    # The C++ methods of these ask for torch's own support of CUDA before they dispatch.

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> PretendTensor:
        operate(self.machine, torch.ops.aten.copy_.default, (self, source, non_blocking), {})
        return self

    def __invert__(self) -> Any:
        return operate(self.machine, torch.ops.aten.bitwise_not.default, (self,), {})

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        found = operate(self.machine, torch.ops.aten.nonzero.default, (self,), {})
        return found.unbind(1) if as_tuple else found

    def record_stream(self, stream: object) -> None:
        """Nothing is freed early here."""

    def new_tensor(self, data: Any, **given: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **given})

    def __getitem__(self, index: Any) -> torch.Tensor:
        inner, advanced = self._inside(index)
        if not advanced:
            return self._made(self.elem[inner])
        self.machine.launch("index", self.device)
        return self._made(_run(self.machine, _get, (self.elem, inner), {}))

    def __setitem__(self, index: Any, value: Any) -> None:
        inner, advanced = self._inside(index)
        if isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor) and value.dim():
            self.machine.upload(value, asked_not_to_wait=False)
        elif isinstance(value, PretendTensor) and advanced:
            _same_device(self.machine, "index_put_", [self, value])
        content = value.elem if isinstance(value, PretendTensor) else value
        moves = "copy_" if isinstance(value, torch.Tensor) else "fill_"
        self.machine.launch("index_put_" if advanced else moves, self.device)
        _run(self.machine, _put, (self.elem, inner, content), {}, writes=[self.elem])

    def _made(self, elem: torch.Tensor) -> PretendTensor:
        return PretendTensor(elem, self.device)

    def _inside(self, index: Any) -> tuple[Any, bool]:
        """The index on :attr:`elem`, and whether it takes a kernel; indices from the host are uploads."""
        several = index if isinstance(index, tuple) else (index,)
        tables = [one for one in several if isinstance(one, (torch.Tensor, np.ndarray, list))]
        for one in tables:
            if not isinstance(one, PretendTensor):
                self.machine.upload(one if isinstance(one, torch.Tensor) else None, asked_not_to_wait=False)
            elif one.dim():
                _same_device(self.machine, "index", [self, one])
            if isinstance(one, torch.Tensor) and one.dtype in (torch.bool, torch.uint8):
                self.machine.needs_values("index by a mask")
        inner = tuple(one.elem if isinstance(one, PretendTensor) else one for one in several)
        return inner if isinstance(index, tuple) else inner[0], bool(tables)


class PretendMode(TorchDispatchMode):
    """Sees the operations that make tensors, or bring them to a device."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return operate(self.machine, func, args, kwargs or {})


def operate(machine: Machine, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation of torch on what its tensors stand for, and count what a device would have done."""
    name = func._schema.name.removeprefix("aten::")
    args = [named_device(machine, value) if isinstance(value, torch.device) else value for value in args]
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": named_device(machine, kwargs["device"])}
    if _is_composite(func) and name not in _WHOLE:
        with PretendMode(machine):
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    given = list(tensors_in((args, kwargs)))
    ours = [value for value in given if isinstance(value, PretendTensor)]
    device = kwargs.get("device")
    if not ours and (device is None or device.type != "cuda"):
        return _on_the_host(machine, func, args, dict(kwargs))
    if name == "_to_copy":
        return _moved(machine, func, args, dict(kwargs), device)
    if name == "copy_" and args[0].device.type != args[1].device.type:
        return _transferred(machine, args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
    on_host = [value for value in given if not isinstance(value, PretendTensor) and value.dim()]
    if name in _INDEXING:
        for table in on_host:
            machine.upload(table, asked_not_to_wait=False)
        if any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]):
            machine.needs_values("index by a mask")
        on_host = []
    if name != "copy_":
        _same_device(machine, name, [*ours, *on_host])
    if name in _READS:
        machine.wait(machine.issued, READ, always=True)
        machine.counts.reads["blocking", place()] += machine.capture is None
    elif name in _SIZED_BY_VALUES or (name, func._overloadname) == ("repeat_interleave", "Tensor"):
        machine.needs_values(name)
    inner_args, inner_kwargs = mapped(partial(_inner, machine), (tuple(args), kwargs))
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    return _on_a_device(machine, func, name, (inner_args, inner_kwargs), ours, device or ours[0].device)


def _on_a_device(
    machine: Machine, func: Any, name: str, inner: tuple[Any, Any], ours: list[PretendTensor], device: torch.device
) -> Any:
    """A kernel, or a view."""
    args, kwargs = inner
    if func.is_view or name in _WITHOUT_KERNEL:
        found = func(*args, **kwargs)
        if machine.capture is not None:
            machine.capture.owns(found, of=inner)
    else:
        changed = [
            value
            for value, declared in zip(args, func._schema.arguments, strict=False)
            if isinstance(value, torch.Tensor) and declared.alias_info is not None and declared.alias_info.is_write
        ]
        found = _run(machine, _ON_CUDA_ONLY.get(name, func), args, kwargs, changed)
        if device.type == "cuda" and next(tensors_in(found), None) is not None:
            machine.launch(name, device)
    if device.type != "cuda":
        return found
    known = {id(one.elem): one for one in ours}

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else PretendTensor(value, device)

    return mapped(outer, found)


def _on_the_host(machine: Machine, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU's tensors; the only thing of interest is who asks for pinned memory."""
    pins = kwargs.pop("pin_memory", None)
    found = func(*args, **kwargs)
    return machine.pin(found) if pins else found


def _moved(
    machine: Machine, func: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device | None
) -> torch.Tensor:
    """A copy of a tensor: of another type, on another device, or both."""
    source = args[0]
    device = source.device if device is None else device
    asked = bool(kwargs.pop("non_blocking", False))
    kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    another_type = kwargs.get("dtype", source.dtype) != source.dtype
    if source.device.type == "cpu":
        # Another type is made where the tensor comes from, so what goes up is not its own memory.
        content = func(source, **kwargs) if another_type else source
        made = PretendTensor(torch.empty_like(content), device)
        if machine.capture is not None:
            machine.capture.owns(made.elem)
        return _transferred(machine, made, content, asked)
    if device.type == "cpu":
        there: Any = _moved(machine, func, args, kwargs, None) if another_type else source
        target = torch.empty_like(there.elem)
        # What is not waited for goes to pinned memory, as torch has it.
        return _transferred(machine, machine.pin(target) if asked else target, there, asked)
    machine.launch("_to_copy" if device == source.device else "copy between devices", source.device)
    return PretendTensor(_run(machine, func, (source.elem,), kwargs), device)


def _transferred(machine: Machine, target: torch.Tensor, source: torch.Tensor, asked_not_to_wait: bool) -> torch.Tensor:
    """``target`` after a transfer between host and device."""
    where, capture = place(), machine.capture
    if isinstance(target, PretendTensor):

        def upload(to: torch.Tensor, content: torch.Tensor) -> None:
            machine.upload(content, asked_not_to_wait, where)
            to.copy_(content)

        if capture is not None:
            capture.writes(target.elem)
            capture.record(upload, (target.elem, source), {}, None, where)
        upload(target.elem, source)
        return target
    assert isinstance(source, PretendTensor)

    def read(to: torch.Tensor, content: torch.Tensor) -> None:
        machine.read(to, content, asked_not_to_wait, where)

    if capture is not None:
        capture.record(read, (target, source.elem), {}, None, where)
    read(target, source.elem)
    return target


def _inner(machine: Machine, value: Any) -> Any:
    """What an operation gets in place of one of its arguments."""
    if isinstance(value, PretendTensor):
        return value.elem
    if isinstance(value, torch.Tensor) and machine.capture is not None and not value.dim():
        value = value.clone()  # a number of the host is part of the launch
        machine.capture.owns(value)
    return value


def _run(
    machine: Machine, run: Any, args: Sequence[Any], kwargs: Mapping[str, Any], writes: Sequence[torch.Tensor] = ()
) -> Any:
    """``run(*args, **kwargs)``, now or as part of a graph."""
    if machine.capture is None:
        return run(*args, **kwargs)
    return machine.capture.ran(run, args, kwargs, place(), writes)


def _get(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    return tensor[index]


def _put(tensor: torch.Tensor, index: Any, content: Any) -> None:
    tensor[index] = content


def _same_device(machine: Machine, name: str, tensors: Sequence[torch.Tensor]) -> None:
    """Refuse what torch refuses; numbers of the host without dimensions are not among ``tensors``."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        machine.counts.mismatches[f"{name} of {' and '.join(devices)}", place()] += 1
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(devices)}! "
            f"(when checking arguments for {name})"
        )


def named_device(machine: Machine, device: Any) -> torch.device:
    """``device`` with its index; the current one if it has none."""
    found = torch.device(device)
    return torch.device("cuda", machine.current) if found.type == "cuda" and found.index is None else found


@cache
def _is_composite(func: Any) -> bool:
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return bool(composite) and not func.name().startswith("aten::is_")
