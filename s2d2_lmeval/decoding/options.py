"""How a decoding option is described and checked, and the names that options go by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from s2d2_lmeval.errors import ConfigError

STRATEGY_OF_DECODER = {
    "sequential": "sequential",
    "static": "low_confidence_static",
    "dynamic": "low_confidence_dynamic",
    "entropy_bounded": "entropy_bounded",
}
FIXED_STRATEGIES = {**STRATEGY_OF_DECODER, "ar": "sequential", "editing": "low_confidence_dynamic"}
"""Remasking strategies of the decoders that have no choice."""

DENOISERS = (*STRATEGY_OF_DECODER, "editing", "s2d2")
BASES = (*STRATEGY_OF_DECODER, "editing")
"""Decoders whose steps can be skipped; then their options apply too."""
DRAFTED = ("dflash", "ddtree")
"""Decoders that need a drafter beside the model."""
DECODERS = ("ar", *DENOISERS, "sliding", "spiffy", "pipelined", *DRAFTED)

PROMISES = {
    "ar": "the model's own autoregressive law: one token at a time at block size one",
    "sequential": "the definition of sequential block denoising",
    "static": "the definition of static low-confidence remasking",
    "dynamic": "the definition of dynamic (confidence-threshold) remasking",
    "entropy_bounded": "the definition of entropy-bounded remasking",
    "editing": "the definition of block denoising with token editing (LLaDA2)",
    "pipelined": "the definition of pipelined block denoising (D2F)",
    "sliding": "the model's own autoregressive law, token for token the output of ar with the same seed",
    "dflash": "the target's own autoregressive law, token for token the output of ar with the same seed",
    "ddtree": "the target's own autoregressive law, token for token the output of ar with the same seed",
    "spiffy": "the output of the decoder that it accelerates, state by state, with the same seed",
    "s2d2": "the published S2D2 algorithm; the AR law exactly when every draft is sampled and verified under "
    "AR-like caching (in sub-blocks the first tokens too, with sample_first_token), otherwise neither the AR nor the "
    "diffusion law",
}

SYNONYMS = {
    "block_size": "block_length",
    "threshold": "confidence_threshold",
    "skip_threshold": "confidence_threshold",
    "gen_length": "max_new_tokens",
    "max_gen_toks": "max_new_tokens",
    "stopping_criteria_idx": "stop_token_ids",
    "stop_token": "stop_token_ids",
    "eos_id": "stop_token_ids",
}

SCHEMES = ("block", "editing", "subblock", "pipelined", "autoregressive")
"""How a family lays out a generation (:attr:`s2d2_lmeval.families.Facts.scheme`)."""


def option(
    default: Any,
    meaning: str,
    *,
    decoders: tuple[str, ...] = DECODERS,
    schemes: tuple[str, ...] = SCHEMES,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    init: bool = True,
    reasons: Mapping[str, str] | None = None,
) -> Any:
    """A field of :class:`~s2d2_lmeval.decoding.config.DecodingConfig` with what it takes to check and explain it.

    ``reasons`` say why some values that one might expect are no choices.
    """
    metadata = {
        "meaning": meaning,
        "decoders": decoders,
        "schemes": schemes,
        "choices": choices,
        "low": low,
        "high": high,
        "reasons": reasons or {},
    }
    return dataclasses.field(default=default, init=init, metadata=metadata)


def checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """``value`` in the type of ``field``, within its choices and range."""
    name, meta = field.name, field.metadata
    kind = str(field.type).removesuffix(" | None")
    if value is None and str(field.type).endswith("None"):
        return None
    value = _converted(name, kind, value)
    if meta["choices"] is not None and value not in meta["choices"]:
        near = get_close_matches(str(value), [str(choice) for choice in meta["choices"]], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        if value in meta["reasons"]:
            hint = f" {value} is none: {meta['reasons'][value]}."
        raise ConfigError(f"{name}={value!r} is not one of: {', '.join(map(str, meta['choices']))}.{hint}")
    if value == "auto":
        return value
    if meta["low"] is not None and value < meta["low"]:
        raise ConfigError(f"{name}={value} is too small; it must be at least {meta['low']:g}.")
    if meta["high"] is not None and value > meta["high"]:
        raise ConfigError(f"{name}={value} is too large; it must be at most {meta['high']:g}.")
    return value


def _converted(name: str, kind: str, value: Any, automatic: bool = False) -> Any:
    if kind == "bool":
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
    elif kind == "int":
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif kind == "int | str":
        # A number, or "auto": found from what forwards are measured to cost.
        return value if value == "auto" else _converted(name, "int", value, automatic=True)
    elif kind == "float":
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            return float(value)
    elif kind == "str":
        if isinstance(value, str):
            return value
    elif kind == "tuple[int, ...]":
        values = (value,) if isinstance(value, int) else value
        if isinstance(values, (list, tuple, set, frozenset)) and all(isinstance(item, int) for item in values):
            return tuple(values)
    else:
        return value
    raise ConfigError(f"{name}={value!r} is not of the right type; it takes {_KINDS[kind]}{' or auto' * automatic}.")


_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a name",
    "tuple[int, ...]": "a list of token ids",
}
