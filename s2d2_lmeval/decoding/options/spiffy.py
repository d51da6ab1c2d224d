"""The options of speculation over denoising states (Spiffy)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.decoding.options.option import option
from s2d2_lmeval.registry import DECODERS


class _Bases(Iterable[str]):
    """The decoders whose steps can be skipped."""

    def __iter__(self) -> Iterator[str]:
        every = [part for name in DECODERS for part in DECODERS.all(name)]
        fitting = {scheme for part in every if part.accelerates for scheme in part.schemes}
        return (name for name in DECODERS if DECODERS[name].plain and fitting.intersection(DECODERS[name].schemes))


BASES = _Bases()


@dataclass(frozen=True)
class SpiffyOptions:
    """Which decoder is accelerated, and how."""

    base: str = option(
        "dynamic",
        "the decoder that is accelerated; its options apply",
        choices=BASES,
        reasons={
            "s2d2": "its step is two forwards, and which of them runs depends on the first",
            "sliding": "it has no denoising steps to skip",
            "ar": "it has no denoising steps to skip; sliding accelerates it",
            "pipelined": "its blocks are not finished one after the other, so no block's states can be drafted alone",
        },
    )
    draft_graph: str = option(
        "default",
        "which states to draft: a file from `s2d2-lmeval calibrate`, or default: the graph bundled with the package",
    )
    draft_nodes: int | str = option(
        "auto",
        "maximum number of states to draft per row and forward; auto: chosen from measured forward cost and hit rate",
        low=0,
    )
    lossless: bool = option(
        True,
        "refuse settings that would not give exactly the base decoder's output; false: the same distribution is enough",
    )

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        if config.schedule == "lookahead":
            yield "schedule=lookahead is for verifications; spiffy skips a block's first draft under schedule=fused."
        if config.short_last_block:
            yield "short_last_block leaves no room for a whole draft state; spiffy needs short_last_block=false."
        if config.transfer_counts != "block" and config.steps < config.block_length:
            yield "transfer_counts depends on the masks that a block begins with; spiffy needs transfer_counts=block."
        if config.use_block_cache:
            yield (
                "use_block_cache drafts against keys that an earlier forward left behind, and which forward that was "
                "depends on those that spiffy skips: disable one of them."
            )
        if config.lossless and config.sampled and not config.keyed:
            yield (
                "spiffy draws once for each step, also for those whose forward it skips, but not in the order of "
                "another decoder's calls: use random_source=keyed, or lossless=false for the same law with other draws."
            )
