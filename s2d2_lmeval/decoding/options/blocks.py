"""The decoding options of blocks, under their published names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.decoding.options.option import option
from s2d2_lmeval.registry import DECODERS

_UNDIVIDED = ("block",)
_IN_TURN = ("block", "subblock", "seeded")
_SUBBLOCK = ("subblock",)
_EDITING = ("editing",)


@dataclass(frozen=True)
class ScheduleOption:
    """How a decoder's work is divided into forwards."""

    schedule: str = option(
        "fused",
        "reference: one forward per draft, verification and commit, as published; fused: the next draft also commits; "
        "lookahead: verifications also commit what they accept and draft the next block (AR-like caching only)",
        choices=("reference", "fused", "lookahead"),
    )

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        if config.schedule != "lookahead":
            return
        if not DECODERS[config.decoder].acceptances:
            yield f"schedule=lookahead is for verifications, and {config.decoder} has none; use schedule=fused."
        if not (config.cache_ver and config.draft_ver):
            yield (
                "schedule=lookahead keeps the verifier's keys and values, which is correct only under AR-like caching: "
                "set cache_ver=true and draft_ver=true, or use schedule=fused."
            )
        if not config.keyed:
            yield (
                "schedule=lookahead drafts before knowing whether the draft is needed, so draws in the order of "
                "calls would differ: use random_source=keyed, or schedule=fused."
            )


@dataclass(frozen=True)
class BlockOption:
    """The length of a block."""

    block_length: int = option(4, "tokens per block", low=1)


@dataclass(frozen=True)
class StepOptions:
    """The steps in which a block is denoised, and the attention they see."""

    denoising_steps: int | None = option(
        None,
        "maximum number of steps per block; none: as many as the block has tokens",
        schemes=("block", "seeded"),
        low=1,
    )
    transfer_counts: str = option(
        "block",
        "how tokens are divided among the steps; block: those of a whole block, the remainder first; masks: likewise "
        "those that the block has to decide; rounded: at each step the masks by the steps left, half to even",
        schemes=_IN_TURN,
        choices=("block", "masks", "rounded"),
    )
    short_last_block: bool = option(
        False, "end the last block with the last requested token; otherwise it is whole, and cut", schemes=_UNDIVIDED
    )
    untempered_confidence: bool = option(
        False,
        "rate a sampled token by its probability at temperature one without filters, as an argmax always is",
        schemes=(*_IN_TURN, "editing"),
    )
    cache_ver: bool = option(False, "commit with token-causal attention (AR-like caching)", schemes=_IN_TURN)
    draft_ver: bool = option(
        False, "draft with token-causal attention over the decided prefix of the block", schemes=_IN_TURN
    )

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        if config.steps > config.block_length:
            yield (
                f"denoising_steps={config.steps} exceeds block_length={config.block_length}: a step decides at least "
                f"one token. Use denoising_steps={config.block_length} or less."
            )


@dataclass(frozen=True)
class SubblockOptions:
    """Blocks that are denoised in sub-blocks (Fast-dLLM v2)."""

    small_block_size: int | None = option(
        None,
        "tokens per sub-block; sub-blocks are decided one after the other; none: a block is one sub-block",
        schemes=_SUBBLOCK,
        low=1,
    )
    use_block_cache: bool = option(
        False,
        "inside a sub-block, draft against the rest of the block as it was in the last whole forward: cheaper, and "
        "other tokens",
        schemes=_SUBBLOCK,
    )
    sample_first_token: bool = option(
        False,
        "with do_sample, also sample a block's first token, which the published code takes as the argmax",
        schemes=_SUBBLOCK,
    )

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        yield from divides("small_block_size", config.small_block_size, config)
        if config.use_block_cache and config.draft_ver:
            yield "use_block_cache keeps keys that draft_ver would have changed in the meantime; disable one of them."


@dataclass(frozen=True)
class ConfidenceOption:
    """The probability from which a mask is decided."""

    confidence_threshold: float = option(
        0.85, "dynamic, editing, pipelined: decide every mask above this probability", low=0.0
    )


@dataclass(frozen=True)
class MultiBlockOption:
    """Blocks that are denoised at once."""

    multi_block: int = option(
        1,
        "dynamic, editing: blocks denoised at once. Those after the first decide what is above confidence_threshold "
        "although the text before them is not settled: fewer forwards, and other tokens than one block after the other",
        schemes=(*_UNDIVIDED, *_EDITING),
        low=1,
        high=64,
    )

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        if config.multi_block > 1 and config.steps_of != config.decoder:
            yield f"decoder={config.decoder} accelerates one block after the other: leave multi_block out."


@dataclass(frozen=True)
class EntropyOptions:
    """How much entropy a step may decide."""

    eb_threshold: float | None = option(
        None,
        "entropy_bounded: maximum sum of entropies per step (nats, of the unfiltered softmax)",
        schemes=_UNDIVIDED,
        low=0.0,
    )
    collapse_entropy: bool = option(
        False, "entropy_bounded with one entropy for the whole block, as published", schemes=_UNDIVIDED
    )

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        if config.strategy == "entropy_bounded" and config.eb_threshold is None:
            yield "entropy_bounded needs eb_threshold, the maximum entropy per step in nats, e.g. 0.35."


@dataclass(frozen=True)
class EditingOptions:
    """Blocks whose decided tokens may be edited (LLaDA2)."""

    editing_threshold: float = option(
        0.9,
        "replace a decided token of the open block by another one above this probability",
        schemes=_EDITING,
        low=0.0,
    )
    max_post_steps: int = option(
        0,
        "maximum number of editing steps after the last mask; ends early once a step changes nothing",
        schemes=_EDITING,
        low=0,
        high=1000,
    )
    num_to_transfer: int = option(1, "minimum number of masks decided per step", schemes=_EDITING, low=1)
    eos_early_stop: bool = option(
        True,
        "end with the block that contains a stop token; otherwise decode all new tokens and cut",
        schemes=_EDITING,
    )


def divides(name: str, part: Any, config: Any) -> Iterator[str]:
    """What is wrong if a block has parts of ``part`` tokens."""
    if part is not None and config.block_length % part:
        yield f"{name}={part} does not divide block_length={config.block_length}; use one that does."
