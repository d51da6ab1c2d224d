"""A draft adapter: a LoRA that only draft queries go through, so that all others run the base model, bit for bit.

y = W x + s B A x [x is a draft query]. Keys and values of draft queries are never kept: the cache is the base model's.
Some adapters have vectors in place of the masks' embedding, one for each place in a draft window. Eager forwards gather
the draft queries; captured ones, whose shapes must not depend on them, compute all and choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from s2d2_lmeval.families.adapters import draft_weights


class Gate:
    """The draft adapter of a model, attached to its projections; without effect but inside :meth:`opened`.

    Args:
        factors: module name -> A (r, in) and B (out, r), which holds the scale.
        vectors: (places, hidden size) what masks are embedded as; those after the last place as that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        vectors: torch.Tensor | None = None,
    ) -> None:
        self._draft: torch.Tensor | None = None
        self._index: torch.Tensor | None = None
        self._places = torch.zeros(0, dtype=torch.long)
        self._hooks = [
            model.get_submodule(name).register_forward_hook(partial(self._add, low=low, high=high))
            for name, (low, high) in factors.items()
        ]
        if vectors is not None:
            embedding = model.get_input_embeddings()
            self._hooks.append(embedding.register_forward_hook(partial(self._embed, vectors=vectors)))

    @classmethod
    def of(cls, model: PreTrainedModel) -> Gate | None:
        """The gate of the adapter that was loaded with ``model``, if one was."""
        weights = draft_weights(model)
        if weights is None:
            return None

        def beside(name: str, values: torch.Tensor) -> torch.Tensor:
            weight = model.get_submodule(name).get_parameter("weight")
            return values.to(weight.device, weight.dtype)

        factors = {
            name: (beside(name, one.low), beside(name, one.high * one.scale)) for name, one in weights.factors.items()
        }
        weight = model.get_input_embeddings().weight
        vectors = None if weights.vectors is None else weights.vectors.to(weight.device, weight.dtype)
        return cls(model, factors, vectors)

    def detach(self) -> None:
        """Leave the model as it was without the gate."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def opened(self, queries: torch.Tensor, captured: bool) -> Iterator[None]:
        """While the model runs, let the adapter act on its draft ``queries`` (N,): 0, or 1 + the place in a window."""
        if captured:
            self._draft, self._places = (queries > 0).view(1, -1, 1), queries - 1
        else:
            self._index = queries.nonzero().squeeze(1)
            self._places = queries[self._index] - 1
        try:
            yield
        finally:
            self._draft = self._index = None

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
        low, high = low.to(x.dtype).T, high.to(x.dtype).T
        if self._draft is not None:
            more = torch.addmm(output[0], x[0] @ low, high)
            return torch.where(self._draft.to(x.device), more, output)
        if self._index is None or not len(self._index):
            return output
        index = self._index.to(x.device)
        return output.index_add(1, index, x.index_select(1, index) @ low @ high)

    def _embed(
        self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, vectors: torch.Tensor
    ) -> torch.Tensor:
        """``output`` (1, N, hidden size) of the embedding with the vectors of masks in their place."""
        if self._draft is None and (self._index is None or not len(self._index)):
            return output
        own = vectors[self._places.clamp(0, len(vectors) - 1)].to(output.dtype)
        if self._index is not None:
            return output.index_copy(1, self._index, own.unsqueeze(0))
        assert self._draft is not None
        return torch.where(self._draft, own, output)
