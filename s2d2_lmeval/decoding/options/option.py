"""The description and validation of a decoding option, and option names."""

from __future__ import annotations

import ast
import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from s2d2_lmeval.decoding.options.names import nearest
from s2d2_lmeval.errors import ConfigError, shown

SYNONYMS = {
    "block_size": "block_length",
    "threshold": "confidence_threshold",
    "skip_threshold": "confidence_threshold",
    "max_gen_toks": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "gen_length": "max_new_tokens",
    "stopping_criteria_idx": "stop_token_ids",
    "stop_token": "stop_token_ids",
    "eos_id": "stop_token_ids",
    "bad_words_ids": "suppress_tokens",
    "sequence_bias": "logit_bias",
}

SCHEMES = (
    *("block", "editing", "subblock", "pipelined", "seeded", "strided", "reordered"),
    "autoregressive",
)
"""How a family lays out a generation (:attr:`s2d2_lmeval.families.Facts.scheme`)."""

LARGEST = 2**31 - 1
"""Upper bound of whole numbers without their own, because tensors count them."""


def option(
    default: Any,
    meaning: str,
    *,
    schemes: tuple[str, ...] = SCHEMES,
    choices: Iterable[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    init: bool = True,
    reasons: Mapping[str, str] | None = None,
    neutral: tuple[Any, ...] = (),
) -> Any:
    """A field of an options class, with its validation and description.

    Args:
        default: the value if not set.
        meaning: one line for lists of options.
        schemes: schemes of the checkpoints that the option applies to.
        choices: the valid values; for a registry, those registered at the time.
        low: smallest value.
        high: largest value.
        init: False if only :meth:`DecodingConfig.from_options` sets it.
        reasons: why some values that one might expect are not among the choices.
        neutral: other tools' ways to write the default.
    """
    metadata = {
        "meaning": meaning,
        "schemes": schemes,
        "choices": choices,
        "low": low,
        "high": high,
        "reasons": reasons or {},
        "neutral": neutral,
    }
    return dataclasses.field(default=default, init=init, metadata=metadata)


def checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """``value`` in the type of ``field``, within its choices and range; None is the default."""
    name, meta, kind = field.name, field.metadata, kind_of(field)
    if value is None:
        return None if takes_none(field) else field.default
    value = converted(name, kind, value)
    if value in meta["neutral"]:
        return field.default
    if meta["choices"] is not None and value not in tuple(meta["choices"]):
        hint = f" {value} does not work: {meta['reasons'][value]}." if value in meta["reasons"] else ""
        hint = hint or nearest(value, meta["choices"])
        raise ConfigError(f"{name}={shown(value)} is not one of: {', '.join(meta['choices'])}.{hint}")
    if value == "auto" or kind in ("bool", "str") or not isinstance(value, (int, float)):
        return value
    low, high = meta["low"], meta["high"]
    if high is None and isinstance(value, int) and name != "seed":
        high = LARGEST
    if low is not None and value < low:
        raise ConfigError(f"{name}={shown(value)} is too small; it must be at least {low:g}.")
    if high is not None and value > high:
        raise ConfigError(f"{name}={shown(value)} is too large; it must be at most {high}.")
    return value


def kind_of(field: dataclasses.Field[Any]) -> str:
    """The type of an option, as it is written, without ``None``."""
    written = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return written.removesuffix(" | None")


def takes_none(field: dataclasses.Field[Any]) -> bool:
    """Whether an option may have no value."""
    return str(field.type).endswith("None")


def converted(name: str, kind: str, value: Any) -> Any:
    """``value`` as a ``kind``; numbers may be written as texts, as YAML reads 1e-5."""
    try:
        if kind == "bool" and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if kind == "float":
            return _number(value)
        if kind == "int" or (kind == "int | str" and value != "auto"):
            return _whole(value)
        if kind in ("str", "int | str") and isinstance(value, str):
            return value
        if kind == "tuple[int, ...]":
            return _token_ids(value)
        if kind == "tuple[tuple[int, float], ...]":
            return _biases(value)
        if kind == "object" and _is_source(value):
            return value
    except ConfigError:
        raise
    except (TypeError, ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):
        pass
    raise ConfigError(f"{name}={shown(value)} is not of the right type; it takes {_KINDS[kind]}.")


def _is_source(value: Any) -> bool:
    """Whether randomness can be drawn from ``value``."""
    if isinstance(value, str):
        return value in ("keyed", "fixed", "torch")
    return callable(getattr(value, "uniform", None)) and callable(getattr(value, "categorical", None))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _whole(value: Any) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        return int(value)
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _token_ids(value: Any) -> tuple[int, ...]:
    """One id, several, or lists that hold one each (as ``bad_words_ids`` of transformers)."""
    value = ast.literal_eval(value) if isinstance(value, str) else value
    several = value if isinstance(value, (list, tuple, set, frozenset)) else (value,)
    return tuple(_token_id(one) for one in several)


def _token_id(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise ConfigError(
                f"{shown(value)} is not a single token: whether a sequence continues depends on previous tokens, and a "
                "block's tokens are decided together. Give single tokens."
            )
        value = value[0]
    token = _whole(value)
    if not 0 <= token <= LARGEST:
        raise ValueError
    return token


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Ids and the biases of their logits: a mapping or pairs, each id alone or in a list (as ``sequence_bias``)."""
    if isinstance(value, str):
        value = ast.literal_eval(value)
    pairs = value.items() if isinstance(value, Mapping) else value
    biases: dict[int, float] = {}
    for token, bias in pairs:
        token = ast.literal_eval(token) if isinstance(token, str) else token
        biases[_token_id(token)] = _number(bias)
    return tuple(sorted(biases.items()))


_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "int | str": "a whole number or auto",
    "float": "a finite number",
    "str": "a name",
    "tuple[int, ...]": "a list of token ids",
    "object": "keyed, fixed, torch, or an object with uniform(n) and categorical(probabilities)",
    "tuple[tuple[int, float], ...]": "token ids and the value to add to their logits, such as {5: -2.5}",
}
