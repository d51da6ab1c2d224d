"""A draft adapter: a LoRA that only draft queries go through, so that all others run the base model, bit for bit.

y = W x + s B A x [x is a draft query]. Keys and values of draft queries are never kept: the cache is the base model's.
Eager forwards gather the draft queries; captured ones, whose shapes must not depend on them, compute all and choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from s2d2_lmeval.families.adapters import Factors, draft_factors


class Gate:
    """The draft adapter of a model, attached to its projections; without effect but inside :meth:`opened`."""

    def __init__(self, model: PreTrainedModel, factors: dict[str, Factors]) -> None:
        self._queries: torch.Tensor | None = None
        self._index: torch.Tensor | None = None
        for name, of_module in factors.items():
            module = model.get_submodule(name)
            weight = module.get_parameter("weight")
            low, high = (one.to(weight.device, weight.dtype) for one in (of_module.low, of_module.high))
            module.register_forward_hook(partial(self._add, low=low, high=high * of_module.scale))

    @classmethod
    def of(cls, model: PreTrainedModel) -> Gate | None:
        """The gate of the adapter that was loaded with ``model``, if one was."""
        factors = draft_factors(model)
        return cls(model, factors) if factors else None

    @contextmanager
    def opened(self, queries: torch.Tensor, captured: bool) -> Iterator[None]:
        """While the model runs, let the adapter act on those of its ``queries`` (N,) that are not zero."""
        draft = queries.bool()
        self._queries, self._index = (draft, None) if captured else (None, draft.nonzero().squeeze(1))
        try:
            yield
        finally:
            self._queries = self._index = None

    def _add(
        self,
        module: nn.Module,
        inputs: tuple[torch.Tensor, ...],
        output: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
    ) -> torch.Tensor:
        """``output`` (1, N, out) of a projection with the adapter's part added for draft queries."""
        (x,) = inputs
        if self._queries is not None:
            queries = self._queries.to(x.device).view(1, -1, 1)
            return torch.where(queries, output + x @ low.T @ high.T, output)
        if self._index is None or not len(self._index):
            return output
        index = self._index.to(x.device)
        return output.index_add(1, index, x.index_select(1, index) @ low.T @ high.T)
