"""What a step is given: a device, or a pretence of one, and a file for what it finds."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s2d2_lmeval.model import BlockDiffusionModel, load
from s2d2_lmeval.studies.pretend import move, pretend_cuda


@dataclass
class Setting:
    """Where a step runs, and its results so far, which are written whenever something is added."""

    step: str
    out: Path
    rehearse: bool
    found: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """The GPU; when rehearsing, the CPU."""
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def half(self) -> torch.dtype:
        """What is measured."""
        return torch.float32 if self.rehearse else torch.bfloat16

    def note(self, **found: Any) -> None:
        """Keep results, and write all of this step."""
        self.found |= found
        self.out.mkdir(parents=True, exist_ok=True)
        content = {"step": self.step, "rehearsed": self.rehearse, **self.found}
        (self.out / f"{self.step}.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")

    def say(self, line: str) -> None:
        """The line of this step in the table; the last one counts."""
        self.note(summary=line)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part whose failure is noted, and does not stop the step."""
        try:
            yield
        except Exception as error:
            self.failed.append(name)
            where = traceback.format_exc(limit=-4)
            self.note(**{f"{name} failed": f"{type(error).__name__}: {error}", f"{name} traceback": where})

    @contextmanager
    def on_gpu(self, model: BlockDiffusionModel, **options: Any) -> Iterator[BlockDiffusionModel]:
        """``model``, loaded on the CPU, on the GPU; when rehearsing, on a pretend one. ``options`` of the runner."""
        if self.rehearse:
            with pretend_cuda():
                yield move(model, **options)
        else:
            yield moved_for_real(model, **options)

    def median_us(self, work: Callable[[], object], repeats: int = 20) -> float:
        """Median microseconds of ``work``, warmed up, each run waited for."""
        taken = []
        for _ in range(3 + repeats):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return 1e6 * sorted(taken[3:])[repeats // 2]

    def wait(self) -> None:
        """Until the device is through."""
        if not self.rehearse:
            torch.cuda.synchronize()


def moved_for_real(model: BlockDiffusionModel, **options: Any) -> BlockDiffusionModel:
    """The toy again, on the GPU, in the type of ``model``."""
    drafter = "toy" if model.facts.drafter is not None else None
    return load("toy", device="cuda", dtype=model.dtype, draft=drafter, max_batch=model.max_batch, **options)
