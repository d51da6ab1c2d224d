"""Arguments and results of torch's operations, which nest; torch's own pytrees are slower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of every value in ``value``, in the same containers."""
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(function, one) for one in value])
    if isinstance(value, dict):
        return {name: mapped(function, one) for name, one in value.items()}
    return function(value)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in ``value``, from left to right."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
