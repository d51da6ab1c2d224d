"""The memory that tensors take while some code runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """As a context manager: counts the ``bytes`` of tensors that are made inside and alive, and the ``most`` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._alive: set[int] = set()

    def begin(self) -> None:
        """Count the most from what is alive now."""
        self.most = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._alive and key not in given:
                self._alive.add(key)
                self.bytes += size
                weakref.finalize(storage, self._drop, key, size)
        self.most = max(self.most, self.bytes)
        return out

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.bytes -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
