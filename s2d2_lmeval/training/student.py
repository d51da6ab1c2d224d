"""What a run trains: a frozen target, and beside it something that learns to draft for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from s2d2_lmeval.families import Facts
from s2d2_lmeval.runtime.cache import cache_argument
from s2d2_lmeval.training.anchors import Windows


class Student(ABC):
    """``model``, frozen, and :attr:`parameters`, by name, that learn to draft ``masks`` tokens at once."""

    grows: ClassVar[bool] = True
    """Whether drafts begin short."""

    def __init__(self, model: PreTrainedModel, masks: int) -> None:
        self.model, self.masks = model.requires_grad_(False), masks
        self.backbone, self.head = model.get_decoder(), model.get_output_embeddings()
        self.device = model.get_input_embeddings().weight.device
        self.parameters: dict[str, nn.Parameter] = {}

    def groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for an optimizer, with ``scale``, what the learning rate is multiplied by."""
        return [{"params": list(self.parameters.values()), "scale": 1.0}]

    @abstractmethod
    def forward(self, windows: Windows, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (K * W, H) of the masks, with a gradient, and of the plain target that says the same tokens;
        None where no query of a text does.
        """

    @abstractmethod
    def save(self, folder: Path, base: str, source: str) -> None:
        """Write what decodes; ``base`` is the digest of the target's weights, ``source`` where they come from."""

    @torch.no_grad()
    def read(self, windows: Windows, cache: Cache | None = None) -> torch.Tensor:
        """Hidden states (L, H) of the plain target, which reads the texts token by token."""
        return self.run(windows.tokens, windows.positions, windows.clean_sight(), cache)

    def run(
        self, tokens: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """Hidden states (N, H) of ``tokens`` (N,); ``seen`` (N, C + N) is what they see of the ``cache`` and of each
        other.
        """
        given = {cache_argument(self.backbone): cache, "use_cache": cache is not None}
        return self.backbone(
            input_ids=tokens.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=bias(seen, self.model.dtype),
            **given,
        ).last_hidden_state[0]


class Trainable(Protocol):
    """What may be trained: the sizes of a student."""

    @property
    def window(self) -> int:
        """Positions that a draft needs after a text."""

    @property
    def tags(self) -> str:
        """Of the card."""

    def check(self, source: str, facts: Facts) -> None:
        """Refuse a target that this is not for; TrainingError."""

    def student(self, model: PreTrainedModel, facts: Facts, seed: int) -> Student:
        """The student, which knows nothing yet."""

    def described(self, source: str) -> str:
        """What it is, in Markdown, down to a list that may go on."""


def bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores, (1, 1, queries, keys), so that a query has only the keys ``seen``."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[
        None, None
    ]
