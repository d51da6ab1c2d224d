"""Runs a step: what a decoder planned goes to the device, through the model and back, as a captured graph if there is
one.

1. lay      the plan's arrays, in buffers of the exact shape or of a bucket; one transfer sends them
2. assemble the decoder's queries, which only the device knows
3. forward  the model
4. decide   the decoder's decisions; accepted queries that are not leading ones move to the end of the prefix
5. read     one table; here the host waits
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import Decoder
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.passes import Plan, Sent
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.graphs import upload
from s2d2_lmeval.runtime.passes import TARGET
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.runtime.shapes import Frame, Shape


class Stepper:
    """Runs the steps of a ``decoder`` on a ``runner``; ``bias`` (V,) is added to all logits."""

    def __init__(
        self, decoder: Decoder[Any], config: DecodingConfig, runner: Runner, bias: torch.Tensor | None = None
    ) -> None:
        self.decoder, self.runner, self.bias = decoder, runner, bias
        # Draws in the published order read the device to know how many there are.
        self.graphs = runner.graphs if config.keyed else None
        self.program = type(decoder), config
        """What graphs are captured of."""

    def __call__(self, plan: Plan) -> np.ndarray | None:
        """Run the planned step; the decoder's table."""
        runner, layout, cache = self.runner, plan.layout, self.runner.cache_of(plan.model)
        rows = self.decoder.rows.count
        shape = self._shape(plan, cache)
        frame = Frame(layout, shape)
        arrays = {**plan.lay(frame, rows), **frame.attention(cache)}
        if plan.moves:
            arrays |= runner.ends(frame, plan.keep, rows, plan.feeds_drafter)

        def program(told: dict[str, torch.Tensor]) -> torch.Tensor | None:
            return self._run(Sent(told, plan, frame))

        if self.graphs is None or not shape.padded:
            table = program(upload(runner.device, arrays))
            read = None if table is None else table.cpu().numpy()
        else:
            told = tuple((name, values.shape) for name, values in arrays.items())
            key = (self.program, shape, plan.model, plan.present, plan.moves, plan.fixed, plan.places, told)
            with runner.timed():
                read = self.graphs.run(key, arrays, program)
        runner.commit(layout.slots, plan.keep, plan.model)
        return read

    def _shape(self, plan: Plan, cache: SlotCache) -> Shape:
        """The shape in which the planned step runs."""
        layout, wanted, rows = plan.layout, len(plan.query), self.decoder.rows.count
        if self.runner.part and plan.model == TARGET:
            return Shape.in_parts(layout, wanted, cache, rows, self.runner.part)
        reads_span = self.runner.attention_of(plan.model) == "sdpa"
        bucket = self.graphs and Shape.bucket(layout, wanted, cache, rows, reads_span)
        return bucket or Shape.tight(layout, wanted, cache, self.runner.grain)

    def _run(self, sent: Sent) -> torch.Tensor | None:
        """The device part of a step. In a bucket its shapes and addresses depend on that alone."""
        decoder, runner = self.decoder, self.runner
        tokens, visible = decoder.assemble(sent)
        logits = runner.run(tokens, sent["positions"], sent["read"], visible, sent, sent.frame, sent.model)
        if self.bias is not None:
            logits = logits + self.bias
        decided = decoder.decide(sent, logits)
        if sent.moves:
            runner.keep(sent, decided.path)
        return decided.table
