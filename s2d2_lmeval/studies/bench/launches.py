"""What a decode step asks of a GPU, counted on a pretend one (:mod:`s2d2_lmeval.studies.pretend`): any machine will do.

A row holds ``decoder``, ``schedule``, ``batch`` and, each a mean over the decode steps of a run whose graphs are
captured: ``launches_outside`` graphs, ``launches_replayed`` inside them, ``uploads``, those of them that are ``staged``
(not waited for, but of pageable memory), ``reads``, and ``blocking``: what makes the host stand still without bringing
it anything. ``replayed_share`` of the steps replayed a graph. Of all runs together: ``captures``, ``capture_faults``,
``device_mismatches``, ``races``; ``same_tokens`` says whether the answers are the CPU's. A step is a record of the
trace that is not of prompts alone; a run's first, which also has what the run prepares, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from s2d2_lmeval.decoding.options.reading import names_of
from s2d2_lmeval.errors import ConfigError, first_line
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.runtime.trace import ForwardRecord, Trace
from s2d2_lmeval.studies.pretend import Counts, move, pretend_cuda
from s2d2_lmeval.studies.pretend.moving import Place

SCHEDULES = ("reference", "fused", "lookahead")

NEEDED: dict[str, dict[str, Any]] = {"entropy_bounded": {"eb_threshold": 0.5}}
"""Options without a default, by decoder."""

PER_STEP = ("launches_outside", "launches_replayed", "uploads", "staged", "reads", "blocking")
FAULTS = ("captures", "capture_faults", "device_mismatches", "races")

MOST_RUNS = 3
"""The first run measures costs and meets every shape, and the second has met each: the third captures nothing new."""

PLACES = 12
"""Lines of code that a row names, those that launch most outside graphs."""

Row = dict[str, Any]


class _StepTrace(Trace):
    """A trace that also keeps what every step counted."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counted = counts
        self.steps: list[tuple[bool, Counter[str]]] = []
        self.before: Counter[str] = Counter()

    def begin(self) -> None:
        """The run that follows is looked at."""
        self.reset()
        self.counted.reset()
        self.steps, self.before = [], self.counted.totals()

    def forwarded(self, record: ForwardRecord) -> None:
        super().forwarded(record)
        now = self.counted.totals()
        self.steps.append((set(record.kinds) == {"prefill"}, now - self.before))
        self.before = now


def every_entry(model: BlockDiffusionModel) -> list[str]:
    """``DECODER[:SCHEDULE][+OPTION=VALUE]`` of all that fit the checkpoint."""
    entries = []
    for decoder in model.facts.decoders:
        for schedule in SCHEDULES if "schedule" in names_of(decoder) else ("",):
            needed = NEEDED.get(decoder, {})
            try:
                model.config({"decoder": decoder, **needed, **({"schedule": schedule} if schedule else {})})
            except ConfigError:
                continue
            entry = f"{decoder}:{schedule}" if schedule else decoder
            entries.append("+".join([entry, *(f"{name}={value}" for name, value in needed.items())]))
    return entries


def count_launches(
    model: BlockDiffusionModel,
    options: Mapping[str, Any],
    batch: int,
    prompts: Sequence[Sequence[int]],
    place: Place = lambda name: "cuda:0",
    runs: int = MOST_RUNS,
) -> Row:
    """The row of one setting, ``batch`` rows in flight. ``model`` is on the CPU; ``place`` says where its parts go; the
    last of ``runs`` is counted, or the first after the first that captures nothing.

    An exception on the pretend device is part of the row, as ``error``.
    """
    config = model.config({**options, "stop_token_ids": []})
    row: Row = {"decoder": config.decoder, "schedule": options.get("schedule"), "batch": batch}
    model.max_batch = batch
    expected = [answer.canvas for answer in model.generate(prompts, config)]
    faults: Counter[str] = Counter()
    with pretend_cuda(devices=2) as counts:
        moved = move(model, place)
        moved.trace = trace = _StepTrace(counts)
        try:
            for repeat in range(runs):
                trace.begin()
                found = [answer.canvas for answer in moved.generate(prompts, config)]
                faults += counts.totals()
                if repeat and not counts.captures:
                    break
        except Exception as error:  # whatever a device would stumble over is what is asked for
            return {**row, **_of_all(faults + counts.totals()), "error": first_line(error)}
    steps = [counted for prompts_only, counted in trace.steps[1:] if not prompts_only]
    total = sum(steps, Counter())
    return {
        **row,
        **{name: total[name] / len(steps) for name in PER_STEP},
        "most_replayed": max(counted["launches_replayed"] for counted in steps),
        "replayed_share": sum(counted["replays"] > 0 for counted in steps) / len(steps),
        **_of_all(faults),
        "same_tokens": found == expected,
        "steps": len(steps),
        "launched_at": _most(counts),
    }


def _of_all(faults: Counter[str]) -> dict[str, int]:
    return {name: faults[name] for name in FAULTS}


def _most(counts: Counts) -> dict[str, int]:
    return {f"{kernel} {where}": count for (kernel, where), count in counts.launches.most_common(PLACES)}
