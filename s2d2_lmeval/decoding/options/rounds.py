"""The decoding options of rounds: sliding self-speculation, and drafts for targets under their published names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.decoding.options.option import option

DRAFT_SHAPES = ("chain", "tree")
DRAFT_CONTEXTS = ("clean", "published")


@dataclass(frozen=True)
class SlidingOptions:
    """Rounds whose drafts come from a window of the model itself (sliding)."""

    window: int = option(16, "how many positions a draft of masks looks ahead; 1: there are no masks", low=1)
    row_budget: int | str = option(
        64,
        "queries per sequence and forward; auto: chosen from measured forward cost",
        low=3,
        high=4096,
    )
    share_budget: bool = option(
        True,
        "sequences in flight share their budgets (never with acceptance=rejection), so the forwards that one takes "
        "depend on the others; false: they do not",
    )
    draft_shape: str = option("tree", "the shape of a draft", choices=DRAFT_SHAPES)
    draft_context: str = option(
        "clean",
        "what masks see of the token before them: clean, as text; published: a copy that is a row of the draft, sees "
        "the masks and has their adapter, as in block drafts; it takes a query more per window",
        choices=DRAFT_CONTEXTS,
    )

    @property
    def least_budget(self) -> int:
        """Queries of a round without a draft: a window, and the token before it."""
        return self.window + 1 + (self.draft_context == "published")

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        if isinstance(config.row_budget, int) and config.row_budget < config.least_budget:
            yield (
                f"row_budget={config.row_budget} leaves no room for a window of {config.window}: a round without a "
                f"draft takes {config.least_budget} queries. Raise row_budget or lower window."
            )
        if config.draft_context == "published" and config.window == 1:
            yield "draft_context=published is about masks, and window=1 has none: give window=2 or more, or leave it."
        if config.acceptance == "rejection" and config.draft_shape == "tree":
            yield (
                "acceptance=rejection compares one drafted token with the verifier at a time: set draft_shape=chain, "
                "or use acceptance=keyed, which takes trees."
            )
        if config.acceptance == "rejection" and config.window == 1:
            yield "acceptance=rejection needs drafts with a distribution: give window=2 or more, or acceptance=keyed."
        if config.acceptance == "rejection" and config.row_budget == "auto":
            yield (
                "acceptance=rejection draws for its drafts, so their size must not depend on the clock: "
                "give row_budget as a number."
            )
        if not config.share_budget and config.row_budget == "auto":
            yield "share_budget=false needs row_budget as a number: auto weighs all sequences in flight together."
        if config.random_source not in ("keyed", "fixed"):
            yield "sliding draws before it decides, which needs keyed randomness: use random_source=keyed."


@dataclass(frozen=True)
class HintOptions:
    """What drafts go by beside the model's: text that is there (sliding, DDTree). Trees of masks or of a drafter take
    neither with share_budget=false or schedule=reference.
    """

    pairs: float = option(
        0.5,
        "weight of counted pairs of tokens, of prompts and answers so far, when a tree is grown; 0: none, as with "
        "share_budget=false and schedule=reference",
        low=0.0,
        high=4.0,
    )
    lookup: bool = option(
        True,
        "draft what followed the last tokens before, in prompt, answer and (with share_budget) earlier answers: with "
        "window=1 in place of masks, else within a tree that counts pairs or could",
    )


@dataclass(frozen=True)
class DrafterOptions:
    """Rounds whose drafts come from a separate drafter (DFlash, DDTree)."""

    draft_block_size: int | None = option(
        None,
        "positions of a drafted block, including the last decided token; none: as many as the drafter was trained for",
        low=2,
    )
    couple_drafts: bool = option(
        False,
        "at a temperature, draft with the same keyed noise as the target's draws; otherwise drafts ignore the "
        "temperature, as published",
    )


@dataclass(frozen=True)
class TreeOptions:
    """Drafts that are trees (DDTree)."""

    tree_budget: int | str = option(
        64,
        "nodes of a draft tree; auto: the number with the most expected tokens per second at measured forward cost",
        low=0,
        high=4096,
    )
    tree_seed_chain: bool = option(False, "always include the argmax chain in the tree, so it never accepts less")
    tree_sharpen: float = option(
        1.0,
        "exponent of the drafter's probabilities when the tree is grown; above 1: deeper and narrower",
        low=0.0,
    )
