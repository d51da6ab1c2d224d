"""The decoding options of blocks whose decided tokens may be edited (LLaDA2), under their published names."""

from __future__ import annotations

from dataclasses import dataclass

from s2d2_lmeval.decoding.options.option import option

_BOTH = ("editing", "s2d2")
_SCHEME = ("editing",)


@dataclass(frozen=True)
class EditingOptions:
    """Part of :class:`~s2d2_lmeval.decoding.options.config.DecodingConfig`."""

    editing_threshold: float = option(
        0.9,
        "replace a decided token of the open block by another of more than this probability",
        decoders=_BOTH,
        schemes=_SCHEME,
        low=0.0,
    )
    max_post_steps: int = option(
        0,
        "steps that may still edit a block without masks; fewer once one changes nothing",
        decoders=_BOTH,
        schemes=_SCHEME,
        low=0,
        high=1000,
    )
    num_to_transfer: int = option(1, "masks that a step decides at least", decoders=_BOTH, schemes=_SCHEME, low=1)
    eos_early_stop: bool = option(
        True,
        "end with the block that holds a stop token; otherwise decode the whole budget and cut",
        decoders=_BOTH,
        schemes=_SCHEME,
    )
