"""A target and its drafter behind one door: passes name the model that answers them.

What the drafter has to know of the text is handed over on the device. After a target's forward the features of the
queries that have become prefix are absorbed into the drafter's cache, at the same positions, so both caches always hold
the same text.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.costs import CostCurve
from s2d2_lmeval.runtime.drafter import DFlash, FeatureTap
from s2d2_lmeval.runtime.memory import bytes_per_position
from s2d2_lmeval.runtime.passes import DRAFTER, TARGET, Pass
from s2d2_lmeval.runtime.runner import Runner


class DraftingRunner(Runner):
    """Runs passes on a target or on its drafter."""

    def __init__(self, model: PreTrainedModel, drafter: DFlash, attention: str = "auto") -> None:
        # Features are tapped from packed, eager forwards; the drafter narrows its masks by layer.
        super().__init__(model, attention, static_shapes=False)
        self.drafter = Runner(drafter, "sdpa", static_shapes=False)
        self.tap = FeatureTap(self.backbone, drafter.shape.layer_ids)

    def reserve(self, slots: int, capacity: int) -> None:
        super().reserve(slots, capacity)
        self.drafter.reserve(slots, capacity)

    def release(self) -> None:
        self.tap.clear()
        self.drafter.release()
        super().release()

    def rows_that_fit(self, capacity: int, wanted: int) -> int:
        ours, drafters = (bytes_per_position(model) for model in (self.model, self.drafter.model))
        return super().rows_that_fit(round(capacity * (1 + drafters / ours)), wanted)

    def begin(self, slot: int, source: int, length: int) -> None:
        super().begin(slot, source, length)
        self.drafter.begin(slot, source, length)

    def measure_costs(self, rows: int, most: int, *, model: str = TARGET) -> CostCurve:
        """As of a single model; ``model`` says which."""
        return self.drafter.measure_costs(rows, most) if model == DRAFTER else super().measure_costs(rows, most)

    def forward(self, request: Pass) -> torch.Tensor:
        if request.model == TARGET:
            return super().forward(request)
        return self.drafter.forward(request)

    def settle(self) -> None:
        super().settle()
        self.drafter.settle()
        self.model_seconds += self.drafter.model_seconds
        self.drafter.model_seconds = 0.0

    @torch.inference_mode()
    def commit(self, request: Pass, kept: np.ndarray, paths: Mapping[int, np.ndarray] | None = None) -> None:
        super().commit(request, kept, paths) if request.model == TARGET else self.drafter.commit(request, kept, paths)
        if request.feeds_drafter:
            started = clock.now()
            self._hand_over(request, kept, paths or {})
            self.model_seconds += clock.now() - started

    def _hand_over(self, request: Pass, kept: np.ndarray, paths: Mapping[int, np.ndarray]) -> None:
        """Let the drafter absorb what ``request`` has added to the prefix: leading queries, then those kept later."""
        layout, cache = request.layout, self.drafter.cache
        index, positions, slots = [], [], []
        for row, slot in enumerate(layout.slots.tolist()):
            first = np.arange(request.keep[row])
            queries = np.concatenate([first, len(first) + paths.get(row, np.arange(kept[row]))])
            index.append(layout.offsets[row] + queries)
            positions.append(cache.lengths[slot] + np.arange(len(queries)))
            slots.append(np.full(len(queries), slot))
            cache.lengths[slot] += len(queries)
        place, owner = np.concatenate(positions), np.concatenate(slots)
        if not len(place):
            return

        def upload(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values.astype(np.int64)).to(self.drafter.device, non_blocking=True)

        cache.write_to(upload(owner * cache.capacity + place))
        model = self.drafter.model
        assert isinstance(model, DFlash)
        model.absorb(self.tap.rows(upload(np.concatenate(index))), upload(place).unsqueeze(0), cache)
