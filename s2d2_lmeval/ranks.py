"""The processes that hold one model together (tensor parallelism), in lock step.

Every rank runs the same engine on the same requests, with its part of every layer. The head's logits are gathered, so
all ranks see the same bits and take the same decisions; draws are keyed. What could differ between processes is asked
here: free memory, clocks, measured costs, and functions of the caller.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")


class Ranks:
    """This process among ``size``; ``group`` is one of processes that talk host to host (None: it is alone)."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self.group = rank, size, group

    @property
    def alone(self) -> bool:
        """Whether this process holds the whole model."""
        return self.size == 1

    def least(self, number: int) -> int:
        """The smallest of what the ranks say."""
        if self.alone:
            return number
        said = torch.tensor(number)
        distributed.all_reduce(said, distributed.ReduceOp.MIN, group=self.group)
        return int(said)

    def of_first(self, number: float) -> float:
        """What the first rank says."""
        if self.alone:
            return number
        said = torch.tensor(number, dtype=torch.float64)
        distributed.broadcast(said, 0, group=self.group)
        return float(said)

    def tell(self, message: Value) -> Value:
        """The first rank's ``message``, any object."""
        if self.alone:
            return message
        said = [message]
        distributed.broadcast_object_list(said, 0, group=self.group)
        return said[0]

    def ask_first(self, stop: Callable[[int, list[int]], int | None]) -> Callable[[int, list[int]], int | None]:
        """``stop`` as the first rank answers it, wherever it is called."""

        def asked(index: int, tokens: list[int]) -> int | None:
            kept = stop(index, tokens) if self.rank == 0 else None
            said = int(self.of_first(-1 if kept is None else kept))
            return None if said < 0 else said

        return stop if self.alone else asked


ALONE = Ranks()


def launched() -> int:
    """Processes that ``torchrun`` or ``accelerate launch`` has started together; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shards_of(model: Any) -> int:
    """Ranks that each layer of a loaded model is divided among."""
    return getattr(model, "_tp_size", None) or 1


def ranks_of(model: Any) -> Ranks:
    """The ranks that hold ``model`` together, which all ask."""
    return ALONE if shards_of(model) == 1 else _together()


def split_rows(fused: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """The parts of ``fused``, of so many rows; where each rank has read its share of all rows, its share of each."""
    ranks = sum(sizes) // len(fused)
    if ranks == 1:
        return list(fused.split(sizes))
    shares = [torch.empty_like(fused) for _ in range(ranks)]
    distributed.all_gather(shares, fused.contiguous())
    return [part.chunk(ranks)[distributed.get_rank()] for part in torch.cat(shares).split(sizes)]


@cache
def _together() -> Ranks:
    on_host = None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
    return Ranks(distributed.get_rank(), distributed.get_world_size(), on_host)
