"""Loaded models on pretend devices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.runtime.drafting.dflash import DFlash, DraftingRunner
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.studies.pretend.machine import machine_in_place
from s2d2_lmeval.studies.pretend.tensors import PretendTensor, named_device

Module = TypeVar("Module", bound=torch.nn.Module)
Place = Callable[[str], str]
"""Name of a parameter or buffer -> device."""


def move(model: BlockDiffusionModel, place: Place = lambda name: "cuda:0", **options: Any) -> BlockDiffusionModel:
    """``model`` on pretend devices, beside the one on the CPU: they share their weights' memory.

    Args:
        place: which parameter goes to which device; a drafter's have ``drafter.`` in front of their names.
        options: further arguments of the runner, such as ``static_shapes``.
    """
    runner = model._runner
    target = move_module(runner.model, place)
    if isinstance(runner, DraftingRunner):
        drafter = runner.drafter.model
        assert isinstance(drafter, DFlash)
        moved = move_module(drafter, lambda name: place(f"drafter.{name}")).attach(target)
        fresh: Runner = DraftingRunner(target, moved, **options)
    else:
        fresh = type(runner)(target, **options)
    return BlockDiffusionModel(
        target, model.facts, max_batch=model.max_batch, max_context=model.max_context, runner=fresh
    )


def move_module(module: Module, place: Place = lambda name: "cuda:0") -> Module:
    """A copy of ``module`` whose parameters and buffers are pretend ones over the same memory.

    Where they lie on several devices, inputs of the parts follow them, as accelerate's hooks do it.
    """
    machine = machine_in_place()
    tensors = [*module.parameters(), *module.buffers()]
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    if isinstance(module, DFlash):
        shared[id(module._shared)] = []  # of its target, which is moved by itself
    moved = copy.deepcopy(module, shared)
    pretend: dict[int, PretendTensor] = {}
    for prefix, part in moved.named_modules():
        part._forward_hooks.clear()  # those of a runner
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in pretend:
                    device = named_device(machine, place(f"{prefix}.{name}" if prefix else name))
                    # As models run in inference mode; otherwise a view of a weight would not be allowed there.
                    with torch.inference_mode():
                        made = PretendTensor(tensor.detach(), device)
                    made._is_param = isinstance(tensor, torch.nn.Parameter)
                    pretend[id(tensor)] = made
                store[name] = pretend[id(tensor)]
    _follow(moved)
    return moved


def _follow(module: torch.nn.Module) -> None:
    """Where a part of ``module`` lies on one device and the whole does not, bring the part's inputs there."""
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(devices) < 2:
        return
    for part in module.children():
        own = {tensor.device for tensor in (*part.parameters(), *part.buffers())}
        if len(own) == 1:
            part.register_forward_pre_hook(_bring(own.pop()), with_kwargs=True)
        _follow(part)


def _bring(device: torch.device) -> Callable[..., Any]:
    def before(module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return _to(args, device), _to(kwargs, device)

    return before


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_to(one, device) for one in value)
    if isinstance(value, dict):
        return {name: _to(one, device) for name, one in value.items()}
    return value.to(device) if hasattr(value, "to") else value
