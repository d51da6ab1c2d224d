"""A host and its pretend devices: what was issued, what is known to be over, what lies in pinned memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from s2d2_lmeval.studies.pretend.capture import Capture
from s2d2_lmeval.studies.pretend.counts import ASYNCHRONOUS, BLOCKING, READ, STAGED, Counts, place


class _Arriving(NamedTuple):
    """An asynchronous read: ``content`` reaches ``target`` once the host has waited for it."""

    number: int
    target: torch.Tensor
    content: torch.Tensor


class _Leaving(NamedTuple):
    """An asynchronous upload: ``source`` has to stay ``content`` until the host has waited for it."""

    number: int
    source: torch.Tensor
    content: torch.Tensor
    where: str


class Machine:
    """Everything issued to the devices has a number; the host knows that all up to :attr:`over` is through."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.counts = Counts()
        self.current = 0
        self.capture: Capture | None = None
        self.issued = self.over = 0
        self._pinned: list[tuple[range, StorageWeakRef]] = []
        self._arriving: deque[_Arriving] = deque()
        self._leaving: deque[_Leaving] = deque()

    # ---- memory ----

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Say that the memory of a CPU tensor is pinned."""
        storage = tensor.untyped_storage()
        first = storage.data_ptr()
        self._pinned = [(span, alive) for span, alive in self._pinned if not alive.expired()]
        self._pinned.append((range(first, first + max(storage.nbytes(), 1)), StorageWeakRef(storage)))
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a CPU tensor lies in pinned memory, whoever made it a tensor."""
        at = tensor.data_ptr()
        return any(at in span and not alive.expired() for span, alive in self._pinned)

    # ---- work ----

    def launch(self, kernel: str, device: torch.device) -> None:
        """A kernel on ``device``."""
        if self.capture is None:
            self.counts.launches[kernel, place()] += 1
            self.issued += 1
            return
        self.counts.captured[kernel, place()] += 1
        self.capture.kernels += 1
        if device.index != self.capture.device:
            self.fault(f"{kernel} on {device} in a capture on cuda:{self.capture.device}")

    def by_triton(self, kernel: str, device: torch.device) -> None:
        """A Triton kernel on tensors of ``device``; it goes to the current device, whatever its tensors' is."""
        self.launch(kernel, device)
        if device.index != self.current:
            self.counts.mismatches[f"{kernel} on {device}, launched on cuda:{self.current}", place()] += 1

    def upload(self, source: torch.Tensor | None, asked_not_to_wait: bool, where: str = "") -> None:
        """A transfer to a device, of ``source``, or of what is not a tensor yet."""
        pinned = source is not None and self.is_pinned(source)
        kind = BLOCKING if not asked_not_to_wait else ASYNCHRONOUS if pinned else STAGED
        if self.capture is not None:
            if kind != ASYNCHRONOUS:
                self.fault(f"{kind} upload")
            return
        where = where or place()
        self.counts.uploads[kind, where] += 1
        self.issued += 1
        if kind == ASYNCHRONOUS and source is not None:
            self._leaving.append(_Leaving(self.issued, source, source.clone(), where))

    def read(self, target: torch.Tensor, content: torch.Tensor, asked_not_to_wait: bool, where: str = "") -> None:
        """A transfer of ``content`` into the CPU tensor ``target``."""
        asynchronous = asked_not_to_wait and self.is_pinned(target)
        if self.capture is not None:
            if not asynchronous:
                self.fault("blocking read")
            return
        self.counts.reads[ASYNCHRONOUS if asynchronous else BLOCKING, where or place()] += 1
        self.issued += 1
        if asynchronous:
            self._arriving.append(_Arriving(self.issued, target, content.clone()))
            target.fill_(torch.nan if target.is_floating_point() else False if target.dtype == torch.bool else -1)
        else:
            target.copy_(content)
            self.wait(self.issued, READ, always=True)

    def wait(self, number: int, why: str, always: bool = False) -> None:
        """The host stands still until what has ``number`` is over, if it is not known to be."""
        if self.capture is not None:
            self.fault(f"wait for {why}")
            return
        if number <= self.over and not always:
            return
        self.over = max(self.over, number)
        while self._arriving and self._arriving[0].number <= self.over:
            arrived = self._arriving.popleft()
            arrived.target.copy_(arrived.content)
            why = READ
        while self._leaving and self._leaving[0].number <= self.over:
            left = self._leaving.popleft()
            if not torch.equal(left.source, left.content):
                self.counts.races["pinned memory changed in flight", left.where] += 1
        self.counts.waits[why, place()] += 1

    def needs_values(self, operation: str) -> None:
        """An operation whose result the host must know before it can go on."""
        self.wait(self.issued, operation, always=True)

    def fault(self, what: str) -> None:
        """Something that a capture does not allow."""
        self.counts.capture_faults[what, place()] += 1

    # ---- graphs ----

    def replay(self, capture: Capture) -> None:
        """Run a captured graph."""
        if self.capture is not None:
            self.fault("a replay")
        if capture.device != self.current:
            self.counts.mismatches[f"graph of cuda:{capture.device}, replayed on cuda:{self.current}", place()] += 1
        self.counts.replays += 1
        self.counts.replayed += capture.kernels
        self.issued += 1
        for freed in capture.replay():
            self.counts.capture_faults["replays on memory that was freed", freed] += 1


_in_place: list[Machine] = []


@contextmanager
def put_in_place(machine: Machine) -> Iterator[None]:
    """Lets all pretend tensors be on ``machine`` meanwhile, also those of an earlier one that somebody kept.

    Raises:
        RuntimeError: inside another one.
    """
    if _in_place:
        raise RuntimeError("a pretend device is in place already")
    _in_place.append(machine)
    try:
        yield
    finally:
        _in_place.clear()


def machine_in_place() -> Machine:
    """The machine of the :func:`~s2d2_lmeval.studies.pretend.pretend_cuda` that this is called in.

    Raises:
        RuntimeError: there is none.
    """
    if not _in_place:
        raise RuntimeError("no pretend device is in place: this works inside pretend_cuda() only")
    return _in_place[0]
