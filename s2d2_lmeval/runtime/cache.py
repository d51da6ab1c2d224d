"""The key-value cache: static slots, one prefix length per slot, nothing ever concatenated.

A forward writes the keys and values of its queries after the prefix of their slot. Whether they stay is decided by
advancing the prefix length, or not. Slots of different lengths need no padding: what lies after a prefix is never
visible.
"""

from __future__ import annotations

from collections import Counter
from inspect import signature

import numpy as np
import torch
from torch import nn

from s2d2_lmeval.runtime.passes import Layout


class SlotCache:
    """Keys and values of ``slots`` sequences of up to ``capacity`` positions.

    One slot more takes what queries write that stand for nothing: :attr:`scratch` is its first position.

    ``layers`` alike share a tensor, so that what concerns all of them is one operation; 0: a tensor for each, where a
    model lies on several devices.

    It answers the part of transformers' cache interface that the native models call while they run
    (:meth:`update`, :meth:`get_seq_length`).
    """

    is_compileable = True

    def __init__(self, slots: int, capacity: int, layers: int = 0) -> None:
        self.slots = slots
        self.capacity = capacity
        self.layers = layers
        self.lengths = np.zeros(slots, dtype=np.int64)
        self._banks: list[torch.Tensor] = []
        """Storage of several layers each, (layers, 2, slots + 1, capacity, heads, dim)."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._flat: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """The same as (slots * capacity, heads, dim), scratch included."""
        self._destinations: dict[torch.device, torch.Tensor] = {}

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
        self._given = destinations
        self._destinations = {destinations.device: destinations}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the packed ``keys`` and ``values`` (1, heads, N, dim).

        Return the storage (slots + 1, capacity, heads, dim).
        """
        return self.write(layer, keys[0].transpose(0, 1), values[0].transpose(0, 1))

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`update`, of ``keys`` and ``values`` (N, heads, dim)."""
        rooms, destinations = self.storage(layer, keys, values), self.places(keys.device)
        for flat, fresh in zip(self._flat[layer], (keys, values), strict=True):
            flat.index_copy_(0, destinations, fresh)
        return rooms

    def storage(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where such ``keys`` and ``values`` (N, heads, dim) of ``layer`` lie: (slots + 1, capacity, heads, dim)."""
        if layer not in self._layers:
            self._allocate(layer, keys, values)
        return self._layers[layer]

    def places(self, device: torch.device) -> torch.Tensor:
        """What :meth:`write_to` was told, on ``device``."""
        if device not in self._destinations:
            self._destinations[device] = self._given.to(device, non_blocking=True)
        return self._destinations[device]

    def _allocate(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Room for ``layer`` and, if they are alike, all layers, where the layer lives."""
        size, heads = (self.slots + 1, self.capacity), keys.shape[1]
        if keys.shape != values.shape:
            made = [new.new_zeros(1, 1, *size, heads, new.shape[2]) for new in (keys, values)]
            self._banks += made
            self._place(layer, made[0][0, 0], made[1][0, 0])
            return
        together = range(self.layers) if not self._layers and layer < self.layers else [layer]
        bank = keys.new_zeros(len(together), 2, *size, heads, keys.shape[2])
        self._banks.append(bank)
        for index, number in enumerate(together):
            self._place(number, bank[index, 0], bank[index, 1])

    def _place(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._layers[layer] = keys, values
        self._flat[layer] = keys.flatten(0, 1), values.flatten(0, 1)

    def move(self, to: torch.Tensor, origin: torch.Tensor) -> None:
        """Copy keys and values of the places ``origin`` (K,) to the places ``to`` (K,) of the flattened storage."""
        for bank in self._banks:
            flat = bank.view(-1, (self.slots + 1) * self.capacity, *bank.shape[4:])
            flat.index_copy_(1, to.to(flat.device), flat.index_select(1, origin.to(flat.device)))

    def begin(self, slot: int, source: int = 0, length: int = 0) -> None:
        """Empty ``slot`` for another sequence, but for the first ``length`` positions, taken from ``source``."""
        if length and source != slot:
            for bank in self._banks:
                bank[:, :, slot, :length] = bank[:, :, source, :length]
        self.lengths[slot] = length

    def get_seq_length(self, *_: object) -> int:
        """Asked by models that were given no positions; ours always are."""
        return 0

    @property
    def bytes_on(self) -> Counter[torch.device]:
        """Memory held on each device, in bytes."""
        held: Counter[torch.device] = Counter()
        for bank in self._banks:
            held[bank.device] += bank.nbytes
        return held


def cache_argument(module: nn.Module) -> str:
    """What ``module`` calls its cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before."""
    return "cache" if "cache" in signature(type(module).forward).parameters else "past_key_values"
