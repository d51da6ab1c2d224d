"""A run's entry in the results file under ``config.s2d2`` (totals, configurations, environment), and its header in
the log.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.runtime.memory import RowLimit
from s2d2_lmeval.runtime.statistics import add, gained, with_ratios, without_ratios
from s2d2_lmeval.tasks import sandbox


@dataclass
class Totals:
    """Sums over everything that one process decoded and scored, as plain numbers that processes can exchange.

    ``run`` adds up the engine's trace: every forward once (``forwards``) and once per row (``nfe``). ``tasks``
    adds up the statistics of each task's responses, without ``seconds``, which overlap for responses in flight
    together.
    """

    run: dict[str, float] = field(default_factory=dict)
    scoring: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def add_run(self, before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> None:
        """Add the engine's trace of a call that took ``seconds``."""
        add(self.run, {**gained(before, after), "seconds": seconds})

    def add_scoring(
        self, before: Mapping[str, float], after: Mapping[str, float], requests: int, seconds: float
    ) -> None:
        """Count a call of the scorer."""
        forwards = gained(before, after).get("forwards", 0)
        add(self.scoring, {"requests": requests, "forwards": forwards, "seconds": seconds})

    def add_response(self, task: str, stats: Mapping[str, Any]) -> None:
        """Count one response of a task."""
        counts = {name: value for name, value in without_ratios(stats).items() if name != "seconds"}
        add(self.tasks.setdefault(task, {}), {"requests": 1, **counts})

    def summary(self) -> dict[str, Any]:
        """The totals with their ratios of sums."""
        parts: dict[str, Any] = {}
        if self.run:
            parts["totals"] = with_ratios(self.run)
        if self.scoring:
            parts["scoring"] = with_ratios(self.scoring)
        if self.tasks:
            parts["tasks"] = {name: with_ratios(counts) for name, counts in sorted(self.tasks.items())}
        return parts


def merge(several: Iterable[Totals]) -> Totals:
    """The totals of parallel processes: counts add up, the time is that of the slowest."""
    merged = Totals()
    for totals in several:
        for mine, other in ((merged.run, totals.run), (merged.scoring, totals.scoring)):
            seconds = max(mine.get("seconds", 0.0), other.get("seconds", 0.0))
            add(mine, other)
            if other:
                mine["seconds"] = seconds
        for task, counts in totals.tasks.items():
            add(merged.tasks.setdefault(task, {}), counts)
    return merged


def settings(config: DecodingConfig) -> dict[str, Any]:
    """What is in force under ``config``."""
    return {"decoding": config.to_dict(), "promise": config.promise, "caution": config.caution}


def in_common(several: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Decoder, preset, seed, promise and caution of configurations (:func:`settings`); None where they differ."""
    rows = [{**one["decoding"], **one} for one in several if "decoding" in one]
    found = {name: [row[name] for row in rows] for name in ("decoder", "preset", "seed", "promise", "caution")}
    return {name: values[0] if len({*values}) == 1 else None for name, values in found.items()}


def environment(device: torch.device, dtype: torch.dtype | None, attention: str | None) -> dict[str, Any]:
    """What timings depend on: hardware, dtypes, back ends, versions, threads; and the sandbox of model-written code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        **{name: _version(name) for name in ("transformers", "lm_eval", "s2d2-lmeval")},
        **({"cuda": torch.version.cuda} if device.type == "cuda" else {}),
        **({"sandbox": sandbox.record()} if sandbox.record() else {}),
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def header(
    source: str, model: BlockDiffusionModel | None, config: DecodingConfig | None, custom: str | None, rows: RowLimit
) -> str:
    """The run's header, a few lines for the log."""
    lines = [("checkpoint", source)]
    if model is not None:
        size = sum(parameter.numel() for parameter in model.hf_model.parameters())
        lines.append(
            ("family", f"{model.facts.family}, {_short(size)} parameters, {str(model.dtype).removeprefix('torch.')}")
        )
    if model is not None and model.facts.drafter is not None:
        lines.append(("drafter", f"blocks of {model.facts.drafter.block_length}"))
    if custom is not None:
        lines.append(("decoder", f"{custom}, one request at a time"))
    elif config is not None and model is not None:
        lines.append(("decoder", f"{config.decoder}: {config.promise}"))
        if config.caution is not None:
            lines.append(("counts", config.caution))
        if config.preset is not None:
            lines.append(("preset", config.preset))
        lines.append(("layout", config.layout))
        lines.append(("in flight", f"{rows} rows, up to {model.max_context} positions each"))
    if model is not None:
        several = "" if model.ranks.alone else f"{model.ranks.size} ranks, the first on "
        lines.append(("runs on", f"{several}{model.device}, attention {model.attention}"))
        if model.facts.caveat:
            lines.append(("but", model.facts.caveat))
    return "\n".join(["s2d2", *(f"  {name:<11} {value}" for name, value in lines)])


def figures(totals: Totals) -> str:
    """What decoding took, a line for each task and one for the run; empty if nothing was decoded."""
    lines = []
    for task, counts in sorted(totals.tasks.items()):
        numbers = with_ratios(counts)
        parts = [f"{counts['requests']:.0f} answers", f"{counts.get('new_tokens', 0):.0f} tokens"]
        parts += [f"{numbers[name]:.2f} {words}" for name, words in _FIGURES.items() if name in numbers]
        lines.append((task or "(no task)", ", ".join(parts)))
    if not lines:
        return ""
    run = with_ratios(totals.run)
    rate = f", {run['tokens_per_second']:.1f} tokens per second" if "tokens_per_second" in run else ""
    lines.append(("in all", f"{run.get('forwards', run.get('nfe', 0)):.0f} forwards, {run['seconds']:.1f} s{rate}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(["s2d2 decoded", *(f"  {name:<{width}} {value}" for name, value in lines)])


_FIGURES = {"tokens_per_forward": "tokens per forward", "acceptance": "of the drafts accepted", "routed": "verified"}


def _short(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
