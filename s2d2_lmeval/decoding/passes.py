"""Laying out passes: what the host knows goes to the device in one transfer."""

from __future__ import annotations

import numpy as np
import torch


class Upload:
    """Collects integer arrays and moves them to the device in one transfer."""

    def __init__(self) -> None:
        self._parts: dict[str, np.ndarray] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """Take ``values`` along under ``name``."""
        self._parts[name] = np.asarray(values, dtype=np.int64)

    def send(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The arrays as int64 tensors on ``device``, shapes kept."""
        flat = np.concatenate([part.reshape(-1) for part in self._parts.values()])
        pieces = (
            torch.from_numpy(flat).to(device, non_blocking=True).split([part.size for part in self._parts.values()])
        )
        return {name: piece.view(part.shape) for (name, part), piece in zip(self._parts.items(), pieces, strict=True)}
