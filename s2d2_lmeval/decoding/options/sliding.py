"""The decoding options of sliding self-speculation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from s2d2_lmeval.decoding.options.option import option

DRAFT_SHAPES = ("chain", "tree")
_SLIDING = ("sliding",)


@dataclass(frozen=True)
class SlidingOptions:
    """Part of :class:`~s2d2_lmeval.decoding.options.config.DecodingConfig`."""

    window: int = option(16, "positions that a draft looks ahead", decoders=_SLIDING, low=2)
    row_budget: int | str = option(
        64,
        "queries per sequence and forward; auto: as many as pay, by what forwards are measured to cost",
        decoders=_SLIDING,
        low=3,
        high=4096,
    )
    share_budget: bool = option(
        True,
        "the sequences in flight share their budgets (never with acceptance=rejection), so how many forwards one takes "
        "depends on the others; false: it does not",
        decoders=_SLIDING,
    )
    draft_shape: str = option("tree", "what is drafted from a window", decoders=_SLIDING, choices=DRAFT_SHAPES)

    def _sliding_faults(self, decoder: str, acceptance: str | None, source: object) -> Iterator[str]:
        """What is wrong between options of ``decoder=sliding``."""
        if decoder != "sliding":
            return
        if isinstance(self.row_budget, int) and self.row_budget <= self.window:
            yield (
                f"row_budget={self.row_budget} leaves no room for a window of {self.window}: a round without a draft "
                f"takes {self.window + 1} queries. Raise row_budget or lower window."
            )
        if acceptance == "rejection" and self.draft_shape == "tree":
            yield (
                "acceptance=rejection compares one drafted token with the verifier at a time: set draft_shape=chain, "
                "or use acceptance=keyed, which takes trees."
            )
        if acceptance == "rejection" and self.row_budget == "auto":
            yield (
                "acceptance=rejection draws for what it drafts, so the size of drafts must not depend on the clock: "
                "give row_budget as a number."
            )
        if not self.share_budget and self.row_budget == "auto":
            yield "share_budget=false needs row_budget as a number: auto weighs all sequences in flight together."
        if source not in ("keyed", "fixed"):
            yield "sliding draws ahead of what it decides, so only keyed draws can be named: use random_source=keyed."
