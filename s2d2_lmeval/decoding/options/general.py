"""The options of every decoder: which, how long, and what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.decoding.options.option import option
from s2d2_lmeval.registry import DECODERS

GREEDY = 1e-6
"""Temperatures below are zero."""
MOST_TOP_LOGPROBS = 20
"""As in OpenAI's interface."""


@dataclass(frozen=True)
class GeneralOptions:
    """What is decoded, and up to where.

    ``preset`` is read by :meth:`~s2d2_lmeval.decoding.options.config.DecodingConfig.from_options`, which alone knows
    the options given with it. In a complete configuration it records where the values come from.
    """

    decoder: str = option("s2d2", "which decoder", choices=DECODERS)
    preset: str | None = option(
        None, "name of a published setting (last section); options given with it override it", init=False
    )
    max_new_tokens: int = option(256, "maximum number of new tokens", low=0)
    stop_token_ids: tuple[int, ...] = option((), "token ids that end the answer")
    trim_stop_tokens: bool = option(True, "cut the answer before the first stop token")


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling.

    Filters and biases are functions of one row of logits, the same for draft and verifier. As in transformers, biases
    and suppressed tokens also apply to the argmax, filters only to draws.
    """

    random_source: object = option("keyed", "keyed (by request and position), fixed, torch, or an object of your own")
    seed: int = option(0, "seed of keyed randomness; in an evaluation, if not given, the harness's --seed")
    do_sample: bool = option(
        False,
        "sample the draft, at temperature 1 if none is given; otherwise take the argmax. A temperature alone decides",
    )
    temperature: float = option(1.0, "softmax temperature of draft and verifier", low=0.0)
    top_k: int = option(0, "keep the k most probable tokens; 0: all", low=0, neutral=(-1,))
    top_p: float = option(1.0, "keep the smallest set of tokens with this probability", low=0.0, high=1.0)
    min_p: float = option(0.0, "keep tokens with at least this share of the top probability", low=0.0, high=1.0)
    typical_p: float = option(
        1.0, "keep the tokens whose surprise is nearest to the entropy, up to this probability", low=0.0, high=1.0
    )
    suppress_tokens: tuple[int, ...] = option((), "token ids that are never predicted")
    logit_bias: tuple[tuple[int, float], ...] = option((), "token ids and the value to add to their logits")
    suppress_mask_token: bool = option(
        True, "never predict the mask token (the published code may; then a block's last steps forbid it)"
    )

    @property
    def sampled(self) -> bool:
        """Whether the draft is sampled rather than the argmax."""
        return self.do_sample

    @property
    def keyed(self) -> bool:
        """Whether draws are keyed, so that neither their order nor the batch matters."""
        return isinstance(self.random_source, str) and self.random_source in ("keyed", "fixed")

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options and others."""
        if config.do_sample and config.temperature < GREEDY:
            yield (
                f"do_sample=true contradicts temperature={config.temperature:g}, which is greedy: raise the "
                "temperature, or drop do_sample."
            )


@dataclass(frozen=True)
class LogprobsOption:
    """What is kept of the laws that tokens are decided by."""

    logprobs: bool = option(
        False,
        "keep the log-probability of every decided token under the law that decided it (Generation.logprobs): the "
        "verifier's where a verifier accepted or replaced it, otherwise the draft's; under the sampling options where "
        "it was drawn, of the plain softmax where it is the argmax",
    )
    top_logprobs: int = option(
        0, "with logprobs: also so many of the likeliest tokens under the same law", low=0, high=MOST_TOP_LOGPROBS
    )

    @staticmethod
    def faults(config: Any) -> Iterator[str]:
        """What is wrong between these options."""
        if config.top_logprobs and not config.logprobs:
            yield f"top_logprobs={config.top_logprobs} needs the laws that logprobs=true keeps: give it too."


EVERY_DECODER = (GeneralOptions, SamplingOptions)
"""Options that every decoder takes."""
