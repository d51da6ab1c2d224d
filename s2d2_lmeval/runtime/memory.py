"""How many sequences fit into memory, also after an out-of-memory error."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from s2d2_lmeval.errors import ConfigError, shown
from s2d2_lmeval.ranks import shards_of

MOST_ROWS_ON_CPU, MOST_ROWS = 16, 128
"""Rows in flight beyond which a wider batch no longer decodes faster: a CPU computes, a GPU reads weights."""

SHARE = 0.8
"""Share of the free memory to plan for; the rest is for captured graphs and fragmentation."""

_FAILED_ALLOCATIONS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""How failed allocations end that have no class of their own: torch's on a CPU, and workspaces of CUDA's libraries."""


@dataclass(frozen=True)
class RowNeeds:
    """What a row takes: ``capacity`` positions in the cache; ``logits`` rows over the vocabulary, in float32, that are
    alive at once; and at most ``tokens`` of a forward, of which all rows together bring at most ``together`` (None: no
    bound).
    """

    capacity: int
    logits: int
    tokens: int
    together: int | None = None


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
    return int(2 * config.num_hidden_layers * heads // shards_of(model) * dim * model.dtype.itemsize)


def bytes_per_token(model: PreTrainedModel, span: int) -> int:
    """Memory of one token's activations in a forward that sees ``span`` positions: the most that a layer holds at once,
    in its attention or its MLP, and the token's mask.
    """
    config = model.config.get_text_config()
    width, itemsize = config.hidden_size, model.dtype.itemsize
    dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    chosen = getattr(config, "num_experts_per_tok", None)
    # Experts sort a copy of the token for each of them, and weigh what comes out.
    experts = chosen * (3 * config.moe_intermediate_size + 6 * width * shards_of(model)) if chosen else 0
    attention = 6 * config.num_attention_heads * dim
    layer = 4 * width + max(attention, 3 * config.intermediate_size, experts) // shards_of(model)
    return int(layer * itemsize + span * (2 + itemsize))


def rows_that_fit(
    model: PreTrainedModel, tables: torch.device, needs: RowNeeds, held: Mapping[torch.device, int]
) -> int:
    """How many rows with such ``needs`` memory holds, at least 1: on the fullest device, if ``model`` is spread over
    several. Logits are worked on in ``tables``; ``held`` are bytes in use by device that will be free.
    """
    layers = Counter(map(place_of, model.get_decoder().layers))
    position, token = bytes_per_position(model) // layers.total(), bytes_per_token(model, needs.capacity)
    of_logits = needs.logits * int(model.config.get_text_config().vocab_size) * 4
    heads = {tables, place_of(model.get_output_embeddings())}
    found = []
    for device in heads | layers.keys():
        row = needs.capacity * position * layers[device] + of_logits * (device in heads)
        free = int(SHARE * (free_bytes(device) + held.get(device, 0)))
        found.append(_rows_within(free, row, token, needs))
    return max(1, min(found))


def place_of(module: torch.nn.Module) -> torch.device:
    """Where ``module`` computes: where its weights are, or are taken to by accelerate."""
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if place is None else torch.device(place)


def _rows_within(free: int, row: int, token: int, needs: RowNeeds) -> int:
    """Rows that ``free`` bytes hold if each takes ``row``, and every token of a forward ``token``."""
    rows = free // (row + needs.tokens * token)
    return rows if needs.together is None else max(rows, (free - needs.together * token) // row)


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
