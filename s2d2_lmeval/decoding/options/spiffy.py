"""The options of speculation over denoising states (Spiffy)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2d2_lmeval.decoding.options.option import BASES, DRAFTED, option

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts

_SPIFFY = ("spiffy",)


@dataclass(frozen=True)
class SpiffyOptions:
    """Part of :class:`~s2d2_lmeval.decoding.options.config.DecodingConfig`."""

    base: str = option(
        "dynamic",
        "the decoder that is accelerated; its options apply",
        decoders=_SPIFFY,
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
        "which states are drafted: a file of `s2d2-lmeval calibrate`, or default: the graph that comes with the "
        "package",
        decoders=_SPIFFY,
    )
    draft_nodes: int | str = option(
        "auto",
        "states to draft per row and forward at most; auto: chosen from measured forward cost and the hit rate so far",
        decoders=_SPIFFY,
        low=0,
    )
    lossless: bool = option(
        True,
        "refuse what would not give the base decoder's output token for token; otherwise its law is enough",
        decoders=_SPIFFY,
    )

    def _spiffy_faults(
        self, decoder: str, schedule: str, keyed: bool, sampled: bool, block_cache: bool
    ) -> Iterator[str]:
        """What is wrong between these options and those of every decoder."""
        if decoder != "spiffy":
            return
        if schedule == "lookahead":
            yield "schedule=lookahead is for verifications; spiffy skips a block's first draft under schedule=fused."
        if block_cache:
            yield (
                "use_block_cache drafts against keys that an earlier forward left behind, and which forward that was "
                "depends on those that spiffy skips: switch one of them off."
            )
        if self.lossless and sampled and not keyed:
            yield (
                "spiffy draws once for each step, also for those whose forward it skips, but not in the order of "
                "another decoder's calls: use random_source=keyed, or lossless=false for the same law with other draws."
            )


def accelerated(decoder: str, base: str) -> str:
    """The decoder whose steps are made: ``base`` if it is accelerated, else ``decoder`` itself."""
    return base if decoder == "spiffy" else decoder


def default_base(facts: Facts | None) -> str:
    """What ``spiffy`` accelerates on checkpoints of ``facts`` if nothing is said."""
    return "editing" if facts is not None and facts.scheme == "editing" else "dynamic"


def misfit(decoder: str, facts: Facts, option: str = "decoder") -> str:
    """Why ``decoder``, the value of ``option``, is not for checkpoints of ``facts``."""
    reason = _NOT_FOR[facts.scheme] if decoder == "spiffy" and facts.scheme in _NOT_FOR else ""
    if decoder in DRAFTED:
        reason = " without a drafter (give its path or hub id as draft=…)"
    fitting = [name for name in facts.decoders if option == "decoder" or name in BASES]
    return f"{option}={decoder} does not fit {facts.family} checkpoints{reason}; use one of: {', '.join(fitting)}."


_NOT_FOR = {
    "pipelined": " (several blocks are open at once and see each other's unfinished text, so the state of one is not "
    "what its next step depends on, and drafts could be exact only against a frozen prefix and suffix, which no "
    "decoder of these checkpoints keeps here)",
}
