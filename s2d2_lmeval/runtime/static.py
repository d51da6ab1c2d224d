"""Forwards of fixed shapes, so that a GPU can replay them as captured graphs.

Launching the kernels of an eager forward takes the host several times longer than a GPU takes to run them for a few
rows. A captured graph is one launch, but it is tied to shapes and addresses. So a pass is padded to a *bucket*: row i
is slot i, every row has as many queries as the bucket is wide, and all read the same number of cache positions. Padding
writes to the cache's scratch slot and sees itself only; nobody sees it.

We capture graphs ourselves rather than go through transformers' compiled path (``torch.compile`` with CUDA graphs over
a ``StaticCache``): that traces the model again for every shape, tens of seconds each at 8B, for a cache and a mask of
its own; a capture takes the time of one or two forwards, runs the very kernels of the eager path, and so changes no
logit.

* A bucket is captured when it is met the second time; the first time runs it eagerly, which also warms it up.
* All graphs share one memory pool (only one runs at a time, and its logits are copied out), so their activations cost
  as much as the largest one's. The least recently used beyond :data:`MOST_GRAPHS` is dropped.
* A graph writes to the cache it was captured with: when the cache is replaced, all are dropped.
* Prefill and anything wider than :data:`WIDTHS` runs eagerly: there the GPU computes long enough to hide the launches.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from s2d2_lmeval.errors import first_line
from s2d2_lmeval.runtime.attention import AttentionContext, prefix_mask
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.memory import out_of_memory
from s2d2_lmeval.runtime.passes import Pass

logger = logging.getLogger("s2d2_lmeval")

WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Queries per row that buckets come in."""

SHORTEST_SPAN = 256
"""A bucket reads at least so many cache positions; beyond, powers of two."""

FLAT = 256
"""Queries up to which a forward costs a GPU no more than reading its weights; beyond, padding is kept below half."""

MOST_GRAPHS = 64


@dataclass(frozen=True)
class Bucket:
    """A shape: ``rows`` slots of ``width`` queries, ``span`` cache positions, ``wanted`` logits."""

    rows: int
    width: int
    span: int
    wanted: int

    @classmethod
    def of(cls, request: Pass, cache: SlotCache) -> Bucket | None:
        """The smallest bucket that holds ``request``; None where padding would cost more than it saves."""
        layout = request.layout
        if layout.widest > WIDTHS[-1]:
            return None
        rows = min(_power(int(layout.slots.max()) + 1), cache.slots)
        width = next(width for width in WIDTHS if width >= layout.widest)
        if rows * width > max(FLAT, 2 * layout.queries):
            return None
        span = int((cache.lengths[layout.slots] + layout.widths).max())
        return cls(
            rows,
            width,
            min(max(_power(span), SHORTEST_SPAN), cache.capacity),
            min(_power(len(request.wanted)), rows * width),
        )


def _power(least: int) -> int:
    """The smallest power of two that is at least ``least``."""
    return 1 << max(least - 1, 0).bit_length()


Run = Callable[[torch.Tensor, torch.Tensor, AttentionContext, torch.Tensor], torch.Tensor]
"""(tokens (N,), positions (N,), attention, wanted (M,)) -> logits (M, V): a forward of a model."""


class StaticForward:
    """The buffers of one bucket and the forward over them, captured or not."""

    def __init__(self, bucket: Bucket, cache: SlotCache, backend: str, run: Run, device: torch.device) -> None:
        self.bucket, self.cache, self.run = bucket, cache, run
        self.tokens = torch.zeros(bucket.rows * bucket.width, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.wanted = torch.zeros(bucket.wanted, dtype=torch.long, device=device)
        self.itself = torch.eye(bucket.width, dtype=torch.bool, device=device)
        self.context = AttentionContext(
            rows=bucket.rows,
            widest=bucket.width,
            span=bucket.span,
            visible=self.itself.repeat(bucket.rows, 1, 1),
            lengths=torch.zeros(bucket.rows, dtype=torch.long, device=device),
            destinations=torch.full_like(self.tokens, cache.scratch),
            backend=backend,
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0, device=device)

    def fill(self, request: Pass) -> None:
        """Put ``request`` into the buffers; what it leaves free stands for nothing."""
        layout, width = request.layout, self.bucket.width
        lengths = np.zeros(self.bucket.rows, dtype=np.int64)
        lengths[layout.slots] = self.cache.lengths[layout.slots]
        place = layout.slots[layout.row_of] * width + layout.local
        parts = [place, self.cache.destinations(layout), lengths, layout.slots]
        sent = torch.from_numpy(np.concatenate(parts)).to(self.tokens.device, non_blocking=True)
        at, destinations, prefix, slots = sent.split([len(part) for part in parts])
        self.tokens.zero_().index_copy_(0, at, request.tokens)
        self.positions.zero_().index_copy_(0, at, request.positions)
        self.context.destinations.fill_(self.cache.scratch).index_copy_(0, at, destinations)
        self.context.lengths.copy_(prefix)
        free = width - layout.widest
        self.context.visible.zero_().index_copy_(0, slots, pad(request.visible, (0, free, 0, free)))
        self.context.visible.logical_or_(self.itself)
        self.wanted.zero_()[: len(request.wanted)] = at.index_select(0, request.wanted)

    def forward(self) -> torch.Tensor:
        """Run the buffers' contents: logits (bucket's wanted, V). Nothing here depends on the contents' values."""
        known = self.context
        mask = prefix_mask(known.visible, known.lengths, known.span) if known.backend == "sdpa" else None
        return self.run(self.tokens, self.positions, replace(known, mask=mask), self.wanted)

    def capture(self, pool: Any) -> None:
        """Record the forward as a graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.logits = self.forward()
        self.graph = graph

    def __call__(self, wanted: int) -> torch.Tensor:
        """Logits (wanted, V) of what was filled in, for the caller to keep."""
        if self.graph is None:
            return self.forward()[:wanted]
        self.graph.replay()
        return self.logits[:wanted].clone()


class StaticShapes:
    """The static forwards of a runner, by bucket. ``captures`` says whether they become graphs."""

    def __init__(self, run: Run, backend: str, device: torch.device, captures: bool) -> None:
        self.run, self.backend, self.device, self.captures = run, backend, device, captures
        self.forwards: OrderedDict[Bucket, StaticForward] = OrderedDict()
        self._cache: SlotCache | None = None
        self._pool: Any = None

    def clear(self) -> None:
        """Let go of all buffers and graphs."""
        self.forwards.clear()
        self._cache = self._pool = None

    def forward(self, request: Pass, cache: SlotCache) -> torch.Tensor | None:
        """The wanted logits (M, V) of ``request``; None where no bucket holds it."""
        bucket = Bucket.of(request, cache)
        if bucket is None:
            return None
        if cache is not self._cache:
            self.clear()
            self._cache = cache
        again = bucket in self.forwards
        if not again:
            self.forwards[bucket] = StaticForward(bucket, cache, self.backend, self.run, self.device)
            if len(self.forwards) > MOST_GRAPHS:
                self.forwards.popitem(last=False)
        self.forwards.move_to_end(bucket)
        static = self.forwards[bucket]
        static.fill(request)
        if again and self.captures and static.graph is None:
            self._capture(static)
        return static(len(request.wanted))

    def _capture(self, static: StaticForward) -> None:
        """Capture ``static``, or say why this model cannot be captured and go on without."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            static.capture(self._pool)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            self.captures = False
            said = first_line(error)
            logger.warning("this model cannot be captured as a graph (%s); it runs without, more slowly.", said)
