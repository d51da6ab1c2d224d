"""The key-value cache: static slots, one prefix length per slot, nothing ever concatenated.

A forward writes the keys and values of its queries after the prefix of their slot. Whether they stay is decided by
advancing the prefix length, or not. Slots of different lengths need no padding: what lies after a prefix is never
visible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from s2d2_lmeval.runtime.passes import Layout


class SlotCache:
    """Keys and values of ``slots`` sequences of up to ``capacity`` positions, in one tensor per layer.

    One slot more takes what queries write that stand for nothing: :attr:`scratch` is its first position.

    It answers the part of transformers' cache interface that the native models call while they run
    (:meth:`update`, :meth:`get_seq_length`).
    """

    is_compileable = True

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.lengths = np.zeros(slots, dtype=np.int64)
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._destinations: torch.Tensor | None = None

    @property
    def scratch(self) -> int:
        """A place in the flattened storage that is never read."""
        return self.slots * self.capacity

    def destinations(self, layout: Layout) -> np.ndarray:
        """Where the queries of ``layout`` go (N,): after the prefix of their slots, in the flattened storage."""
        starts = layout.slots * self.capacity + self.lengths[layout.slots]
        return starts[layout.row_of] + layout.local

    def write_to(self, destinations: torch.Tensor) -> None:
        """Where the next forward's queries go: ``destinations`` (N,) as slot * capacity + position."""
        self._destinations = destinations

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the packed ``keys`` and ``values`` (1, heads, N, dim).

        Return the storage (slots + 1, capacity, heads, dim).
        """
        if layer not in self._keys:
            # Allocated where the layer lives: a model may be spread over several devices.
            heads, dim = keys.shape[1], keys.shape[3]
            self._keys[layer] = keys.new_zeros(self.slots + 1, self.capacity, heads, dim)
            self._values[layer] = values.new_zeros(self.slots + 1, self.capacity, heads, values.shape[3])
        assert self._destinations is not None
        destinations = self._destinations.to(keys.device)
        for storage, fresh in ((self._keys[layer], keys), (self._values[layer], values)):
            storage.view(-1, *storage.shape[2:]).index_copy_(0, destinations, fresh[0].transpose(0, 1))
        return self._keys[layer], self._values[layer]

    def commit(self, slots: np.ndarray, keep: np.ndarray, paths: Mapping[int, np.ndarray] | None = None) -> None:
        """Let queries of the last forward become prefix: the first ``keep`` (R,) after it of each of ``slots`` (R,).

        ``paths`` names other ones for some rows r, rising: the ``keep[r]`` queries at these distances from its end.
        """
        moves = [
            (start + np.arange(len(path)), start + path)
            for r, path in (paths or {}).items()
            if (path != np.arange(len(path))).any()
            for start in [slots[r] * self.capacity + self.lengths[slots[r]]]
        ]
        if moves:
            to, origin = (torch.from_numpy(np.concatenate(part)) for part in zip(*moves, strict=True))
            for storage in (*self._keys.values(), *self._values.values()):
                flat = storage.view(-1, *storage.shape[2:])
                flat.index_copy_(0, to.to(flat.device), flat.index_select(0, origin.to(flat.device)))
        self.lengths[slots] += keep

    def begin(self, slot: int, source: int = 0, length: int = 0) -> None:
        """Empty ``slot`` for another sequence, but for the first ``length`` positions, taken from ``source``."""
        if length and source != slot:
            for storage in (*self._keys.values(), *self._values.values()):
                storage[slot, :length] = storage[source, :length]
        self.lengths[slot] = length

    def get_seq_length(self, *_: object) -> int:
        """Asked by models that were given no positions; ours always are."""
        return 0

    @property
    def bytes_on(self) -> Counter[torch.device]:
        """Memory held on each device, in bytes."""
        held: Counter[torch.device] = Counter()
        for storage in (*self._keys.values(), *self._values.values()):
            held[storage.device] += storage.nbytes
        return held
