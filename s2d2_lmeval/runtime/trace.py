"""Counts of a model's forwards and, on request, a record of each one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s2d2_lmeval.runtime import statistics

KINDS = ("prefill", "draft", "verify", "commit", "drafter", "score")

_ALWAYS = (
    *("forwards", "prompt_only_forwards", "nfe", "decode_nfe", *(f"{kind}_forwards" for kind in KINDS)),
    *("queries", "seconds", "decode_seconds", "model_seconds"),
)
"""What the forwards alone tell; of a request's statistics these, and its blocks, are left out."""
_OF_TWO_MODELS = ("drafter_steps", "target_steps", "drafter_seconds", "target_seconds")


@dataclass
class ForwardRecord:
    """What one forward did, row by row (R rows).

    ``kinds`` (R,) what each row did (:data:`KINDS`); ``widths`` (R,) queries; ``wanted`` (R,) queries whose logits were
    read; ``kept`` (R,) queries that became prefix. ``seconds`` is the whole engine step, ``model_seconds`` the part
    inside the model.
    """

    kinds: tuple[str, ...]
    widths: np.ndarray
    wanted: np.ndarray
    kept: np.ndarray
    seconds: float
    model_seconds: float


@dataclass
class Trace:
    """Counts of everything that a model ran since :meth:`reset`.

    ``new_tokens`` counts tokens handed to the user: up to the stop, without what a block holds after it.
    ``prompt_tokens`` counts those of admitted prompts and ``reused_tokens`` the ones among them whose keys were there
    already; ``batch_halvings`` says how often memory ran out and fewer rows went on. ``records`` of single forwards are
    kept only where :meth:`reset` asked for it.
    """

    keep_records: bool = False
    records: list[ForwardRecord] = field(default_factory=list)
    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    batch_halvings: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    _forwards: Counter[str] = field(default_factory=Counter)

    def reset(self, *, keep_records: bool = False) -> None:
        """Forget everything; from here on keep a record of every forward if so asked."""
        vars(self).update(vars(Trace(keep_records)))

    @property
    def new_tokens(self) -> int:
        """Of all complete requests."""
        return self.counts["new_tokens"]

    def admitted(self, prompt: int, reused: int) -> None:
        """Count a prompt of ``prompt`` tokens, ``reused`` of which need not be run."""
        self.prompt_tokens += prompt
        self.reused_tokens += reused

    def forwarded(self, record: ForwardRecord) -> None:
        """Count a forward."""
        if self.keep_records:
            self.records.append(record)
        kinds, counts = record.kinds, self._forwards
        prompts = kinds.count("prefill")
        prompt_only = prompts == len(kinds)
        # Of a drafter beside the target; its step does not wait for a GPU, so what it leaves there shows in the target.
        model = "drafter" if "drafter" in kinds else "target"
        for kind in kinds:
            counts[f"{kind}_forwards"] += 1
        counts["forwards"] += 1
        counts["prompt_only_forwards"] += prompt_only
        counts["nfe"] += len(kinds)
        counts["decode_nfe"] += len(kinds) - prompts
        counts["queries"] += int(record.widths.sum())
        counts["clock_reversals"] += record.seconds < 0
        counts[f"{model}_steps"] += 1
        for name in ("seconds", f"{model}_seconds", *(() if prompt_only else ("decode_seconds",))):
            counts[name] += record.seconds  # type: ignore[assignment]
        counts["model_seconds"] += record.model_seconds  # type: ignore[assignment]

    def finished(self, stats: Mapping[str, Any]) -> None:
        """Count a request that is complete, with its statistics."""
        self.requests += 1
        counts = statistics.without_ratios(stats)
        self.counts.update({name: int(value) for name, value in counts.items() if name not in (*_ALWAYS, "blocks")})

    def totals(self) -> dict[str, Any]:
        """Counts and the ratios that they define (:mod:`~s2d2_lmeval.runtime.statistics`).

        ``forwards`` counts calls of the model, ``prompt_only_forwards`` those of them in which every row ran a piece of
        its prompt; ``nfe`` counts a call once per row that took part in it, which is what a request sees. With a
        drafter, engine steps and seconds of drafter and target are told apart.
        """
        counts: dict[str, Any] = {name: self._forwards[name] for name in _ALWAYS}
        if self._forwards["clock_reversals"]:
            counts["clock_reversals"] = self._forwards["clock_reversals"]
        if counts["drafter_forwards"]:
            counts |= {name: self._forwards[name] for name in _OF_TWO_MODELS}
            counts["target_forwards"] = counts["nfe"] - counts["drafter_forwards"]
        own = ("requests", "new_tokens", "prompt_tokens", "reused_tokens", "batch_halvings")
        counts = {**self.counts, **{name: getattr(self, name) for name in own}, **counts}
        return {**counts, **statistics.ratios(counts)}
