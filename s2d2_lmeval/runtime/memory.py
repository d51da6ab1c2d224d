"""How many sequences fit into memory, also after an out-of-memory error."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from s2d2_lmeval.errors import ConfigError, shown

MOST_ROWS_ON_CPU, MOST_ROWS = 16, 128
"""Rows in flight beyond which a wider batch no longer decodes faster: a CPU computes, a GPU reads weights."""

SHARE = 0.8
"""Share of the free memory to plan for; the rest is for activations and fragmentation."""

LOGIT_COPIES = 6
"""Tables of the size of the wanted logits that a step holds at once, in float32: probabilities, noise, residuals."""


_FAILED_ALLOCATIONS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""How failed allocations end that have no class of their own: torch's on a CPU, and workspaces of CUDA's libraries."""


@dataclass
class RowLimit:
    """How many rows may be in flight: ``asked`` for a number, or ``auto`` for as many as memory holds.

    ``at_most`` bounds both; it falls when memory runs out and stays there.
    """

    asked: int | str
    at_most: int | None = None

    def __post_init__(self) -> None:
        fine = self.asked == "auto" if isinstance(self.asked, str) else isinstance(self.asked, int) and self.asked >= 1
        if not fine or isinstance(self.asked, bool):
            raise ConfigError(f"max_batch={shown(self.asked)}: give auto, or the number of rows in flight, 1 or more.")

    @property
    def automatic(self) -> bool:
        """Whether memory decides."""
        return self.asked == "auto"

    def bounded(self, rows: int) -> int:
        """``rows``, or fewer where fewer are allowed."""
        return rows if self.at_most is None else min(rows, self.at_most)

    def most(self, device: torch.device) -> int:
        """Rows that may be in flight, whatever memory holds."""
        bound = MOST_ROWS_ON_CPU if device.type == "cpu" else MOST_ROWS
        return self.bounded(bound if self.automatic else int(self.asked))

    def __str__(self) -> str:
        bound = "" if self.at_most is None else f", at most {self.at_most}"
        return f"{self.asked}{bound}"


def bytes_per_position(model: PreTrainedModel) -> int:
    """Memory of the keys and values of one position, all layers together."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * dim * model.dtype.itemsize)


def bytes_per_row(model: PreTrainedModel, capacity: int, wanted: int) -> int:
    """Memory of a row: ``capacity`` positions in the cache, and what is made of ``wanted`` logits in a step."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return capacity * bytes_per_position(model) + wanted * vocabulary * 4 * LOGIT_COPIES


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on ``device`` now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of what the machine has
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (OSError, ValueError, AttributeError):
            return 4 << 30


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _FAILED_ALLOCATIONS)
