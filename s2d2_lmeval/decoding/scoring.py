"""Exact autoregressive scoring of given text in the model's block-size-one mode.

The model is asked what it would say at each position given the true tokens before it: the text runs token-causally, and
beside it a mask token for every scored position sees the text before that position and itself (S2D2's verifier; arXiv
2603.25702). Where logits are shifted by one token no masks are needed: the text's own row t-1 says it. For a
block-diffusion model this is the likelihood of its autoregressive mode, not of its diffusion mode,
which has no tractable one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.errors import CapacityError
from s2d2_lmeval.families.facts import NO_MASK
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.memory import RowLimit, out_of_memory
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.runtime.trace import ForwardRecord, Trace
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, by_reach

CHUNK = 256
"""Most tokens that one row brings to a forward; each scored one brings a mask besides."""


@dataclass
class _Item:
    tokens: np.ndarray
    """Context and continuation."""
    scored_from: int
    done: int = 0
    log_likelihood: float = 0.0
    greedy: bool = True


class Scorer:
    """Scores (context, continuation) pairs on a :class:`~s2d2_lmeval.runtime.runner.Runner`."""

    def __init__(self, runner: Runner, mask_token_id: int, token_shift: bool, trace: Trace, limit: RowLimit) -> None:
        self.runner = runner
        self.mask_token_id = mask_token_id
        self.ahead = int(token_shift)
        """How far ahead of its own position a query speaks."""
        self.trace = trace
        self.limit = limit

    @torch.inference_mode()
    def run(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each pair: log p(continuation | context), and whether every token of it is the model's arg-max."""
        items = [_Item(np.array([*context, *target], dtype=np.int64), len(context)) for context, target in pairs]
        # Rows of like length share forwards.
        order = sorted(range(len(items)), key=lambda index: len(items[index].tokens))
        left = [items[index] for index in order]
        while left:
            capacity = len(left[-1].tokens) + 2 * CHUNK
            rows = self.limit.most(self.runner.device)
            if self.limit.automatic and rows > 1:
                rows = min(rows, self.runner.rows_that_fit(capacity, CHUNK))
            if self._run_batch(left[:rows]):
                left = left[rows:]
            else:
                self._back_off(left[:rows])
        return [(item.log_likelihood, item.greedy) for item in items]

    def _run_batch(self, items: list[_Item]) -> bool:
        """Score ``items`` side by side; False if memory ran out."""
        try:
            self.runner.reserve(len(items), max(len(item.tokens) for item in items) + 2 * CHUNK)
            while True:
                slots = np.array([slot for slot, item in enumerate(items) if item.done < len(item.tokens)])
                if not len(slots):
                    return True
                self._step([items[slot] for slot in slots], slots)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False

    def _back_off(self, items: list[_Item]) -> None:
        """Memory ran out with ``items`` in flight: they begin again, half as many at a time."""
        self.runner.release()
        if len(items) == 1:
            raise CapacityError("Memory ran out on a single text. Shorten it, or load the weights in a smaller type.")
        self.limit.at_most = len(items) // 2
        self.trace.batch_halvings += 1
        for item in items:
            item.done, item.log_likelihood, item.greedy = 0, 0.0, True

    def _step(self, items: list[_Item], slots: np.ndarray) -> None:
        """One forward: the next chunk of every row, scored where it is to be."""
        started, model_seconds = clock.now(), self.runner.model_seconds
        done = np.array([item.done for item in items])
        take = np.array([min(CHUNK, len(item.tokens) - item.done) for item in items])
        length = np.array([len(item.tokens) for item in items])
        scored_from = np.maximum(np.array([item.scored_from for item in items]), done + self.ahead)
        scored = (np.minimum(done + take + self.ahead, length) - scored_from).clip(0)
        layout = Layout(slots, take if self.ahead else take + scored)
        r, local = layout.row_of, layout.local
        masks = local >= take[r]
        positions = np.where(masks, scored_from[r] + local - take[r], done[r] + local)
        about = positions + self.ahead
        speaks = masks | ((self.ahead > 0) & (about >= scored_from[r]) & (about < (scored_from + scored)[r]))
        truth = np.concatenate(
            [item.tokens[item.done : item.done + int(n)] for item, n in zip(items, take, strict=True)]
        )
        tokens = np.full(layout.queries, self.mask_token_id)
        tokens[~masks] = truth
        rank = layout.padded(np.where(masks, NOBODY, positions), NOBODY)
        reach = layout.padded(np.where(masks, positions - 1, positions), NOTHING)
        device = self.runner.device

        def upload(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)

        logits = self.runner.forward(
            Pass(
                layout=layout,
                tokens=upload(tokens),
                positions=upload(positions),
                visible=by_reach(upload(rank), upload(reach)),
                wanted=upload(np.flatnonzero(speaks)),
                keep=take,
            )
        )
        targets = upload(
            np.concatenate(
                [item.tokens[start : start + n] for item, start, n in zip(items, scored_from, scored, strict=True)]
            )
        )
        if self.mask_token_id != NO_MASK:
            logits[:, self.mask_token_id] = -torch.inf
        chosen = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).double()
        best = logits.argmax(-1) == targets
        values = torch.stack([chosen, best.double()]).cpu().numpy()
        self.runner.settle()
        for item, part in zip(items, np.split(values, np.cumsum(scored)[:-1], axis=1), strict=True):
            item.log_likelihood += float(part[0].sum())
            item.greedy &= bool(part[1].all())
        for item, n in zip(items, take, strict=True):
            item.done += int(n)
        self._record(layout, scored, take, clock.since(started), self.runner.model_seconds - model_seconds)

    def _record(
        self, layout: Layout, scored: np.ndarray, take: np.ndarray, seconds: float, model_seconds: float
    ) -> None:
        self.trace.forwarded(
            ForwardRecord(
                kinds=("score",) * len(scored),
                widths=layout.widths,
                wanted=scored,
                kept=take,
                seconds=seconds,
                model_seconds=model_seconds,
            )
        )
