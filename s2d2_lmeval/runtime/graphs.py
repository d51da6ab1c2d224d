"""Steps as captured graphs: what a step runs on the device, from the facts that the host sends to the table that it
reads, is one launch.

Launching the kernels of a forward takes the host several times longer than a GPU takes to run them for a few rows. A
captured graph is one launch, but it is tied to shapes and addresses. So a step is padded to a bucket
(:mod:`~s2d2_lmeval.runtime.shapes`), its facts arrive in a :class:`Mailbox`, and what it
leaves for the next one lies in :class:`Tables`, which keep their addresses from run to run.

We capture graphs ourselves rather than go through transformers' compiled path (``torch.compile`` with CUDA graphs over
a ``StaticCache``): that traces the model again for every shape, tens of seconds each at 8B, for a cache and a mask of
its own; a capture takes the time of one or two forwards, runs the very kernels of the eager path, and so changes no
logit.

* A bucket is captured when it is first met, after its step has run eagerly, which also warms it up.
* All graphs share one memory pool: only one runs at a time, and what it leaves lies in tables. The least recently used
  beyond :data:`MOST_GRAPHS` is dropped.
* A graph writes to the cache and the tables that it was captured with: when either is replaced, all are dropped.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch

from s2d2_lmeval.errors import first_line
from s2d2_lmeval.runtime.memory import out_of_memory

logger = logging.getLogger("s2d2_lmeval")

MOST_GRAPHS = 128

Arrays = Mapping[str, np.ndarray]


def upload(device: torch.device, arrays: Arrays) -> dict[str, torch.Tensor]:
    """``arrays`` as int64 tensors on ``device``, shapes kept, in one transfer; on a CPU they are the same memory,
    and what says yes or no stays bool.
    """
    if device.type == "cpu":
        return dict(zip(arrays, map(torch.from_numpy, arrays.values()), strict=True))
    flat = torch.from_numpy(np.concatenate([values.ravel() for values in arrays.values()], dtype=np.int64))
    return _views(flat.to(device, non_blocking=True), arrays)


def _views(flat: torch.Tensor, arrays: Arrays) -> dict[str, torch.Tensor]:
    """The parts of ``flat``, under the names and in the shapes of ``arrays``."""
    pieces = flat.split([values.size for values in arrays.values()])
    return {
        name: piece if values.ndim == 1 else piece.view(values.shape)
        for (name, values), piece in zip(arrays.items(), pieces, strict=True)
    }


_constants: dict[Hashable, torch.Tensor] = {}


def constant(name: Hashable, device: torch.device, make: Callable[[torch.device], torch.Tensor]) -> torch.Tensor:
    """What ``make`` makes on ``device``, not to be written to: it is made once, and is no work of any step."""
    found = _constants.get((name, device))
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make(device)  # what is made there belongs to the graph
    return _constants.setdefault((name, device), make(device))


def numbers(count: int, device: torch.device) -> torch.Tensor:
    """0, 1, ... (count,) on ``device``, as :func:`constant`."""
    most = 1 << max(count - 1, 0).bit_length()
    return constant(most, device, lambda where: torch.arange(most, device=where))[:count]


class Mailbox:
    """Buffers at fixed addresses on host (pinned) and ``device`` for arrays of the shapes of ``arrays``."""

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        size = sum(values.size for values in arrays.values())
        self.host = torch.zeros(size, dtype=torch.long, pin_memory=device.type == "cuda")
        self.device = torch.zeros(size, dtype=torch.long, device=device)
        self.told = _views(self.device, arrays)
        self.answer = torch.empty(0, dtype=torch.long)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, arrays: Arrays) -> None:
        """Put the contents of ``arrays`` into :attr:`told`, in one transfer. After a step that nobody read, this waits
        until the last contents have left.
        """
        if self._sent is not None:
            self._sent.synchronize()
        np.concatenate([values.ravel() for values in arrays.values()], out=self.host.numpy(), casting="unsafe")
        self.device.copy_(self.host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def read(self, table: torch.Tensor) -> np.ndarray:
        """The contents of ``table`` on the host, valid until the next read. Here the host waits for the device."""
        if table.device.type != "cuda":
            return table.numpy()
        if self.answer.shape != table.shape:
            self.answer = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
        self.answer.copy_(table, non_blocking=True)
        read = torch.cuda.Event()
        read.record()
        read.synchronize()
        return self.answer.numpy()


Program = Callable[[dict[str, torch.Tensor]], "torch.Tensor | None"]
"""What a step does on the device with what it was told: the table that the host reads, or None."""


class Tables:
    """Tensors that outlive a step, by name, on ``device``. With ``keep`` a run finds those of the run before, emptied,
    at their addresses.
    """

    def __init__(self, device: torch.device, keep: bool = False) -> None:
        self.device, self.keep = device, keep
        self.version = 0
        """Rises when a table gets another address."""
        self._made: dict[str, torch.Tensor] = {}

    def full(self, name: str, shape: tuple[int, ...], value: Any = 0, dtype: torch.dtype = torch.long) -> torch.Tensor:
        """A table of ``value``."""
        return self.put(name, torch.full(shape, value, dtype=dtype, device=self.device))

    def found(self, name: str, otherwise: torch.Tensor) -> torch.Tensor:
        """The table of this name, as the run before left it."""
        return self._made.get(name, otherwise)

    def room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A table of ``shape``, or longer if it is there already; it holds anything."""
        found = self._made.get(name)
        if found is not None and found.dtype == dtype and len(found) >= shape[0] and found.shape[1:] == shape[1:]:
            return found
        return self.full(name, shape, 0, dtype)

    def put(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """A table of these ``values``."""
        found = self._made.get(name)
        if found is not None and (found.shape, found.dtype) == (values.shape, values.dtype):
            return found.copy_(values)
        self.version += 1
        self._made[name] = values.to(self.device)
        return self._made[name]


class Step:
    """The buffers of one bucket, and its graph."""

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        self.mail = Mailbox(arrays, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.table: torch.Tensor | None = None

    def run(self, arrays: Arrays, program: Program) -> np.ndarray | None:
        """Replay the graph, or run the ``program`` where there is none; returns what it has for the host."""
        self.mail.send(arrays)
        if self.graph is None:
            self.table = program(self.mail.told)
        else:
            self.graph.replay()
        return None if self.table is None else self.mail.read(self.table)

    def capture(self, program: Program, pool: Any) -> None:
        """Record the ``program`` over the buffers as a graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.table = program(self.mail.told)
        self.graph = graph


class Graphs:
    """The steps of a run, by bucket; ``captures`` says whether they become graphs."""

    def __init__(self, device: torch.device, captures: bool) -> None:
        self.device, self.captures = device, captures
        self.tables = Tables(device, keep=True)
        self.steps: OrderedDict[Hashable, Step] = OrderedDict()
        self.rehearsed: set[Hashable] = set()
        """What was run on purpose before the first request, so that its graphs are there."""
        self.on_captured: Callable[[], None] | None = None
        """Called after each capture."""
        self._version = 0
        self._pool: Any = None

    def clear(self) -> None:
        """Let go of all buffers and graphs."""
        self.steps.clear()
        self.rehearsed.clear()
        self._pool = None

    def forget(self, bucket: Hashable) -> None:
        """Let go of what was captured of one bucket."""
        self.steps.pop(bucket, None)

    def run(self, bucket: Hashable, arrays: Arrays, program: Program) -> np.ndarray | None:
        """Run the ``program`` on ``arrays``, which have the shapes of ``bucket``; what it has for the host."""
        if self._version != self.tables.version:
            self.clear()
            self._version = self.tables.version
        step = self.steps.get(bucket)
        if step is not None:
            self.steps.move_to_end(bucket)
            return step.run(arrays, program)
        step = self.steps[bucket] = Step(arrays, self.device)
        if len(self.steps) > MOST_GRAPHS:
            self.steps.popitem(last=False)
        read = step.run(arrays, program)
        if self.captures:
            read = None if read is None else read.copy()
            self._capture(step, program)
        return read

    def _capture(self, step: Step, program: Program) -> None:
        """Capture ``step``, or say why this model cannot be captured and go on without."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            step.capture(program, self._pool)
            if self.on_captured is not None:
                self.on_captured()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            self.captures = False
            said = first_line(error)
            logger.warning("this model cannot be captured as a graph (%s); it runs without, more slowly.", said)
