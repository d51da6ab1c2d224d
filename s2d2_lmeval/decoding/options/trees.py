"""The decoding options of drafts for autoregressive targets (DFlash, DDTree), under their published names."""

from __future__ import annotations

from dataclasses import dataclass

from s2d2_lmeval.decoding.options.option import DRAFTED, option

_TREE = ("ddtree",)


@dataclass(frozen=True)
class TreeOptions:
    """Part of :class:`~s2d2_lmeval.decoding.options.config.DecodingConfig`."""

    draft_block_size: int | None = option(
        None,
        "positions of a drafted block, the last decided token included; none: as many as the drafter was trained for",
        decoders=DRAFTED,
        low=2,
    )
    couple_drafts: bool = option(
        False,
        "at a temperature, draft with the keyed noise that the target will be drawn with; otherwise drafts know no "
        "temperature, as published",
        decoders=DRAFTED,
    )
    tree_budget: int | str = option(
        64,
        "nodes of a draft tree; auto: as many as raise the expected tokens per second, by what forwards are measured "
        "to cost",
        decoders=_TREE,
        low=0,
        high=4096,
    )
    tree_seed_chain: bool = option(
        False, "the tree holds the arg-max chain whatever its probability, so it never accepts less", decoders=_TREE
    )
    tree_sharpen: float = option(
        1.0,
        "exponent of the drafter's probabilities when the tree is grown; above 1: deeper and narrower",
        decoders=_TREE,
        low=0.0,
    )
