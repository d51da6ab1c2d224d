"""One rank leads, the others follow: a program runs on the first rank alone, and its model's calls on all of them.

Without this, every process of a divided model runs the whole program (as scripts for ``torchrun`` do), and must call
the same methods with the same arguments. Here only the leader reads data, prints and writes.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

from torch import distributed

from s2d2_lmeval.errors import CapacityError, S2D2Error
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.ranks import Ranks
from s2d2_lmeval.runtime.memory import RowLimit

logger = logging.getLogger("s2d2_lmeval")

LED = ("generate", "score", "release")
"""Methods of a model that take all of its ranks."""


class Call(NamedTuple):
    """A call of a method, without functions among its arguments but for whether there is one that stops answers."""

    method: str
    positional: tuple[Any, ...]
    named: dict[str, Any]
    stops: bool
    max_batch: int | str


def join(model: BlockDiffusionModel) -> None:
    """Lead the ranks that hold ``model``, or follow until the leader's program ends, and exit then."""
    ranks = model.ranks
    if ranks.alone:
        return
    if ranks.rank:
        _follow(model, ranks)
    _Leader(model, ranks)


def _follow(model: BlockDiffusionModel, ranks: Ranks) -> NoReturn:
    call: Call | None = None
    while (call := ranks.tell(call)) is not None:
        model.rows = RowLimit(call.max_batch, model.rows.at_most)
        stop = {"stop": _nobody_asks} if call.stops else {}
        try:
            getattr(model, call.method)(*call.positional, **call.named, **stop)
        except CapacityError:
            raise
        except S2D2Error:  # the leader raises it too, and says so
            pass
    _part(ranks)
    raise SystemExit(0)


def _part(ranks: Ranks) -> None:
    """Close the connections when every rank is done with them."""
    distributed.barrier(group=ranks.group)
    distributed.destroy_process_group()


def _nobody_asks(index: int, tokens: list[int]) -> int | None:
    raise AssertionError("the first rank is asked")


class _Leader:
    """Tells the other ranks of every call, and of the end."""

    def __init__(self, model: BlockDiffusionModel, ranks: Ranks) -> None:
        self.model, self.ranks, self.apart = model, ranks, False
        for name in LED:
            setattr(model, name, partial(self._call, name, getattr(model, name)))
        atexit.register(self._end)

    def _call(self, name: str, method: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        told = tuple(one for one in positional if not callable(one))
        plain = {key: value for key, value in named.items() if not callable(value)}
        stops = plain.pop("stop", named.get("stop")) is not None
        self.ranks.tell(Call(name, told, plain, stops, self.model.rows.asked))
        try:
            return method(*map(self._watched, positional), **{key: self._watched(one) for key, one in named.items()})
        except CapacityError:
            self.apart = True
            raise
        except S2D2Error:
            raise
        except BaseException:
            self.apart = True
            raise

    def _watched(self, value: Any) -> Any:
        """``value``; a function of the leader alone, whose errors the other ranks do not have."""
        if not callable(value):
            return value

        def called(*given: Any) -> Any:
            try:
                return value(*given)
            except BaseException:
                self.apart = True
                raise

        return called

    def _end(self) -> None:
        if not self.apart:
            self.ranks.tell(None)
            _part(self.ranks)
            return
        # The others wait inside of a forward: whoever started the processes ends them when this one fails.
        logger.error("a call failed on the first rank only; the others are stopped with it.")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
