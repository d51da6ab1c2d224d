"""The processes that train together, each on its own texts; started by ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch

from s2d2_lmeval.ranks import launched


class Processes:
    """This process among ``count``, and its ``device`` (None: as asked)."""

    def __init__(self) -> None:
        self._accelerator: Any = None
        self.rank, self.count, self.device = 0, 1, None
        if launched() > 1:
            from accelerate import Accelerator, InitProcessGroupKwargs

            self._accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))])
            self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
            self.device = str(self._accelerator.device)

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each of ``tensors`` by its mean over the processes."""
        if self._accelerator is not None:
            for tensor in tensors:
                tensor.copy_(self._accelerator.reduce(tensor, reduction="mean"))

    def of_first(self, number: float) -> float:
        """What the first process says."""
        if self._accelerator is None:
            return number
        said = torch.tensor(number if self.rank == 0 else 0.0, dtype=torch.float64, device=self._accelerator.device)
        return float(self._accelerator.reduce(said, reduction="sum"))

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
