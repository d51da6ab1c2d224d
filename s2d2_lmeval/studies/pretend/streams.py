"""What ``torch.cuda`` has to order work by: events, streams, graphs. Streams run in the order of the host's calls."""

from __future__ import annotations

from typing import Any

from s2d2_lmeval.studies.pretend.capture import Capture
from s2d2_lmeval.studies.pretend.machine import Machine


class OfAMachine:
    """Made on a machine: the classes are subclassed for each."""

    machine: Machine


class Event(OfAMachine):
    """A point in the order of work."""

    def __init__(self, *_: object, **__: object) -> None:
        self.number = 0

    def record(self, stream: object = None) -> None:
        """Everything issued so far comes before it."""
        self.number = self.machine.issued

    def wait(self, stream: object = None) -> None:
        """A stream waits; the host does not."""

    def synchronize(self) -> None:
        """The host waits."""
        self.machine.wait(self.number, "an event")

    def query(self) -> bool:
        """Whether it was reached: here the host that asks waits."""
        self.synchronize()
        return True

    def elapsed_time(self, _: Event) -> float:
        """Milliseconds; they mean nothing here."""
        return 1.0


class Stream(OfAMachine):
    """A queue of work."""

    def __init__(self, device: Any = None, priority: int = 0, **_: object) -> None:
        self.device = device

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Work goes on in the order of the host's calls."""

    def wait_event(self, event: object) -> None:
        """Work goes on in the order of the host's calls."""

    def record_event(self, event: Event | None = None) -> Event:
        """An event after everything issued so far."""
        event = event or type("Event", (Event,), {"machine": self.machine})()
        event.record()
        return event

    def synchronize(self) -> None:
        """The host waits."""
        self.machine.wait(self.machine.issued, "a stream")

    def query(self) -> bool:
        """Whether all is done: here the host that asks waits."""
        self.synchronize()
        return True


class CUDAGraph(OfAMachine):
    """A captured graph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.captured: Capture | None = None

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        """From here on nothing runs: it is recorded, on the current device."""
        if self.machine.capture is not None:
            raise RuntimeError("a capture is in progress already")
        self.machine.counts.captures += 1
        self.machine.capture = Capture(self.machine.current)

    def capture_end(self) -> None:
        """The end of what is recorded."""
        self.captured, self.machine.capture = self.machine.capture, None
        assert self.captured is not None
        self.captured.end()
        if not self.captured.kernels:
            self.machine.fault("an empty graph")

    def replay(self) -> None:
        """Run what was recorded, on the same addresses."""
        if self.captured is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.machine.replay(self.captured)

    def reset(self) -> None:
        """Let go of it."""
        self.captured = None

    def pool(self) -> tuple[int, int]:
        """Of memory: there is one."""
        return 0, 0

    def instantiate(self) -> None:
        """It is."""


class graph(OfAMachine):
    """Captures what runs inside it."""

    def __init__(self, cuda_graph: CUDAGraph, pool: object = None, stream: object = None, **_: object) -> None:
        self.cuda_graph = cuda_graph

    def __enter__(self) -> None:
        self.cuda_graph.capture_begin()

    def __exit__(self, *_: object) -> None:
        self.cuda_graph.capture_end()
