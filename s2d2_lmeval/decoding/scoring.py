"""Exact autoregressive scoring of given text in the model's block-size-one mode.

The model predicts each position from the true tokens before it: the text runs token-causally, together with a mask
token for every scored position that sees the text before that position and itself (S2D2's verifier; arXiv 2603.25702).
Shifted logits need no masks: the text's own row t-1 gives the prediction. For a block-diffusion model this is the
likelihood of its autoregressive mode; that of its diffusion mode is intractable.

Continuations of one context share it: the context runs once, and each continuation is a branch after it that sees the
context and itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from s2d2_lmeval.decoding.passes import PassBuilder, Plan
from s2d2_lmeval.errors import CapacityError
from s2d2_lmeval.families.facts import NO_MASK
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.graphs import upload
from s2d2_lmeval.runtime.memory import RowLimit, RowNeeds, out_of_memory
from s2d2_lmeval.runtime.runner import Runner, refuse_to_halve
from s2d2_lmeval.runtime.shapes import Frame, Shape
from s2d2_lmeval.runtime.trace import ForwardRecord, Trace
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, by_reach, in_branches

CHUNK = 256
"""Maximum text tokens per row and forward, and maximum tokens of a branch; each scored token may add a mask."""

TABLES = 4
"""Tables of the size of a forward's logits that are alive at once (measured by ``tests/decoding/test_memory_plan.py``).
"""

Tokenwise = tuple[list[float], bool]
"""The log-probability of every token, and whether all are the model's argmax."""
Pair = tuple[Sequence[int], Sequence[int]]


class _Queries:
    """What one row brings to a forward: queries (token, position, rank, reach, branch), of which ``keep`` leading ones
    become prefix, and reads (query, pair, token): where the probability of a token is said. ``branch`` is 0 for the
    text and its masks.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.queries: list[tuple[int, int, int, int, int]] = []
        self.reads: list[tuple[int, int, int]] = []

    def add_text(self, tokens: Sequence[int], start: int, branch: int = 0) -> None:
        """Token-causal ``tokens`` from position ``start`` on."""
        self.queries += [(token, position, position, position, branch) for position, token in enumerate(tokens, start)]

    def add_mask(self, mask: int, position: int, branch: int = 0) -> None:
        """A mask that sees what lies before ``position``."""
        self.queries.append((mask, position, NOBODY, position - 1 if position else NOTHING, branch))


class _Row:
    """Pairs that are scored in one row: a single one, whose continuation is part of the ``text`` (whatever its length),
    or several with one context, which is the text; their continuations are branches.
    """

    def __init__(self, pairs: Sequence[tuple[int, Pair]]) -> None:
        self.pairs = [number for number, _ in pairs]
        context, target = pairs[0][1]
        alone = len(pairs) == 1
        self.scored = [int(token) for token in target] if alone else []
        self.text = [int(token) for token in context] + self.scored[:-1]
        self.first = len(context)
        self.branches = [] if alone else [(number, [int(token) for token in pair[1]]) for number, pair in pairs]
        self.begin()

    def begin(self) -> None:
        """Nothing has run yet."""
        self.done = self.spoken = self.branched = 0
        self.logprobs: dict[int, list[float]] = {number: [] for number in self.pairs}
        self.greedy = dict.fromkeys(self.pairs, True)

    @property
    def reads(self) -> int:
        """Logits that it takes in all."""
        return len(self.scored) + sum(len(target) for _, target in self.branches)

    @property
    def complete(self) -> bool:
        """Whether everything is scored."""
        return self.spoken == len(self.scored) and self.branched == len(self.branches)

    def next(self, shifted: bool, mask: int) -> _Queries:
        """The queries of the next forward; the row moves on past them."""
        brought = _Queries(min(CHUNK, len(self.text) - self.done))
        end = self.done + brought.keep
        brought.add_text(self.text[self.done : end], self.done)
        while self.spoken < len(self.scored) and self.first + self.spoken <= end:
            position = self.first + self.spoken
            if not shifted:
                brought.add_mask(mask, position)
            at = position - 1 - self.done if shifted else len(brought.queries) - 1
            brought.reads.append((at, self.pairs[0], self.scored[self.spoken]))
            self.spoken += 1
        if end == len(self.text):
            if shifted and brought.keep:  # the context's last row says the first token of every branch
                brought.reads += [(brought.keep - 1, number, target[0]) for number, target in self.branches]
            self._branch_off(brought, shifted, mask)
        self.done = end
        return brought

    def _branch_off(self, brought: _Queries, shifted: bool, mask: int) -> None:
        """Add as many branches as a forward may take, or one."""
        while self.branched < len(self.branches):
            number, target = self.branches[self.branched]
            if len(brought.queries) and len(brought.queries) + (1 if shifted else 2) * len(target) > 2 * CHUNK:
                return
            self.branched += 1
            begin = len(brought.queries)
            brought.add_text(target[:-1], self.first, self.branched)
            if shifted:
                brought.reads += [(begin + place, number, token) for place, token in enumerate(target[1:])]
                continue
            for place, token in enumerate(target):
                brought.add_mask(mask, self.first + place, self.branched)
                brought.reads.append((len(brought.queries) - 1, number, token))


def rows_of(pairs: Sequence[Pair]) -> list[_Row]:
    """``pairs`` sorted into rows, longest first. A continuation that is too long for a branch has a row of its own."""
    together: dict[tuple[object, ...], list[tuple[int, Pair]]] = {}
    for number, (context, target) in enumerate(pairs):
        key = (number,) if len(target) > CHUNK else (None, *context)
        together.setdefault(key, []).append((number, (context, target)))
    return sorted(map(_Row, together.values()), key=lambda row: -len(row.text))


class Scorer:
    """Scores (context, continuation) pairs on a :class:`~s2d2_lmeval.runtime.runner.Runner`."""

    def __init__(self, runner: Runner, mask_token_id: int, token_shift: bool, trace: Trace, limit: RowLimit) -> None:
        self.runner = runner
        self.mask_token_id = mask_token_id
        self.shifted = token_shift
        self.trace = trace
        self.limit = limit

    @torch.inference_mode()
    def run(self, pairs: Sequence[Pair], on_scored: Callable[[int, Tokenwise], None] | None = None) -> list[Tokenwise]:
        """For each pair: log p of the continuation's tokens after the context, and whether each is the model's argmax.

        ``on_scored`` is called for each one as it completes.
        """
        scores: list[Tokenwise] = [([], True)] * len(pairs)
        left = rows_of(pairs)
        while left:
            capacity = len(left[0].text) + 2 * CHUNK
            most = self._rows_at_once(left, capacity)
            if not self._run_batch(left[:most], capacity):
                self._back_off(left[:most])
                continue
            for row in left[:most]:
                for number in row.pairs:
                    scores[number] = row.logprobs[number], row.greedy[number]
                    if on_scored is not None:
                        on_scored(number, scores[number])
            left = left[most:]
        return scores

    def _rows_at_once(self, left: list[_Row], capacity: int) -> int:
        """How many of the rows ``left`` to score next. A batch has the room of the one before unless twice as many fit:
        texts fall in length, so that is seldom, and with new room everything begins cold.
        """
        most = self.limit.most(self.runner.device)
        if not self.limit.automatic or most == 1:
            return most
        reads = min(max(row.reads for row in left), (1 + self.shifted) * CHUNK)
        most = min(most, self.runner.rows_that_fit(RowNeeds(capacity, TABLES * reads, 2 * CHUNK)))
        room = self.runner.cache
        return room.slots if room.capacity >= capacity and room.slots <= most < 2 * room.slots else most

    def _run_batch(self, rows: list[_Row], capacity: int) -> bool:
        """Score ``rows`` in a batch; False if memory ran out."""
        try:
            self.runner.reserve(len(rows), capacity)
            while slots := [slot for slot, row in enumerate(rows) if not row.complete]:
                self._step([rows[slot] for slot in slots], np.array(slots))
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _back_off(self, rows: list[_Row]) -> None:
        """Memory ran out with ``rows`` in flight: they begin again, half as many at a time."""
        refuse_to_halve(self.runner, len(rows))
        self.runner.release()
        if len(rows) == 1:
            raise CapacityError("Memory ran out on a single text. Shorten it, or load the weights in a smaller type.")
        self.limit.at_most = len(rows) // 2
        self.trace.batch_halvings += 1
        for row in rows:
            row.begin()

    def _step(self, rows: list[_Row], slots: np.ndarray) -> None:
        """One forward: the next queries of every row, and the scores that they give."""
        started, model_seconds = clock.now(), self.runner.model_seconds
        brought = [row.next(self.shifted, self.mask_token_id) for row in rows]
        plan = self._plan(brought, slots)
        frame = Frame(plan.layout, Shape.tight(plan.layout, len(plan.query), self.runner.cache, self.runner.grain))
        told = upload(self.runner.device, {**plan.lay(frame, len(rows)), **frame.attention(self.runner.cache)})
        visible = in_branches(by_reach(told["rank"], told["reach"]), told["branch"])
        logits = self.runner.run(told["tokens"], told["positions"], told["read"], visible, told, frame)
        self.runner.commit(slots, plan.keep)
        if self.mask_token_id != NO_MASK:
            logits[:, self.mask_token_id] = -torch.inf
        targets = told["targets"]
        chosen = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).double()
        best = logits.argmax(-1) == targets
        values = torch.stack([chosen, best.double()]).cpu().numpy()
        self.runner.synchronize()
        read = [(row, pair) for row, one in zip(rows, brought, strict=True) for _, pair, _ in one.reads]
        for (row, pair), log_p, is_best in zip(read, *values.tolist(), strict=True):
            row.logprobs[pair].append(log_p)
            row.greedy[pair] &= bool(is_best)
        self.trace.forwarded(
            ForwardRecord(
                kinds=("score",) * len(rows),
                widths=plan.layout.widths,
                wanted=plan.wanted_counts,
                kept=plan.keep,
                seconds=clock.since(started),
                model_seconds=self.runner.model_seconds - model_seconds,
            )
        )

    def _plan(self, brought: list[_Queries], slots: np.ndarray) -> Plan:
        """The pass, with the tokens (M,) whose probability its wanted logits say as ``targets``."""
        builder = PassBuilder(slots)
        row = np.repeat(np.arange(len(slots)), [len(one.queries) for one in brought])
        token, position, rank, reach, branch = np.array([query for one in brought for query in one.queries]).T
        builder.each(row, position).set(token=token, rank=rank, reach=reach, branch=branch)
        offsets = builder.lay_out().offsets
        reads = [(number, at, token) for number, one in enumerate(brought) for at, _, token in one.reads]
        read_row, at, targets = np.array(reads, dtype=np.int64).reshape(-1, 3).T
        builder.read("scored", read_row, np.zeros_like(at), offsets[read_row] + at, targets=targets)
        return builder.plan(
            phases=np.zeros_like(slots),
            keep=np.array([one.keep for one in brought]),
            places=1,
            queries={"tokens": builder.column("token")},
            tables={"rank": (0, NOBODY), "reach": (0, NOTHING), "branch": (0, 0)},
        )
