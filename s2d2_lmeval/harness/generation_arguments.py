"""What a task's ``generation_kwargs`` (and ``--gen_kwargs``) ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.errors import ConfigError

BUDGET_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "gen_length")
"""Names of the budget of new tokens, in the harness's order of priority."""

_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "min_p": None,
}
"""Options of token-by-token generation that some tasks set to what they are without."""


@dataclass(frozen=True)
class GenerationArguments:
    """One group of requests: when to stop (``until``), the budget if the task names one, and the decoding options it
    names.
    """

    until: tuple[str, ...]
    max_new_tokens: int | None
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, gen_kwargs: Mapping[str, Any]) -> GenerationArguments:
        """Read a request's generation arguments as the harness means them.

        ``do_sample: false`` is greedy drafting whatever the temperature says; a temperature alone decides whether to
        sample.

        :raises ConfigError: for a value of the wrong type, or an option that has no meaning for block diffusion.
        """
        if not isinstance(gen_kwargs, Mapping):
            raise ConfigError(f"generation_kwargs must be a mapping, not {gen_kwargs!r}.")
        options = dict(gen_kwargs)
        until = _until(options.pop("until", None))
        budgets = [options.pop(name) for name in BUDGET_NAMES if name in options]
        for name, neutral in _NEUTRAL.items():
            if name in options and (value := options.pop(name)) not in (neutral, None):
                raise ConfigError(
                    f"generation_kwargs: {name}={value} has no meaning for block-diffusion decoding; remove it."
                )
        if "max_length" in options:
            raise ConfigError(
                "generation_kwargs: max_length would count the prompt; give max_gen_toks, the number of new tokens."
            )
        options.pop("use_cache", None)  # of transformers' generate; our cache is not optional
        _sampling(options)
        return cls(until, token_budget(budgets[0]) if budgets and budgets[0] is not None else None, options)


def _until(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise ConfigError(f"generation_kwargs: until must be a string or a list of strings, not {value!r}.")
    return tuple(strings)


def token_budget(value: Any) -> int:
    """``value`` as a number of new tokens.

    :raises ConfigError: when it is none.
    """
    try:
        budget = int(value)
        whole = budget == float(value)
    except (TypeError, ValueError):
        whole, budget = False, -1
    if not whole or budget < 0:
        raise ConfigError(f"max_gen_toks={value!r} is not a number of tokens.")
    return budget


def _sampling(options: dict[str, Any]) -> None:
    """``do_sample`` and ``temperature`` in the harness's sense, in place."""
    if options.get("do_sample", "") is None:
        del options["do_sample"]
    if options.get("temperature", "") is None:
        del options["temperature"]
    if "do_sample" not in options and "temperature" in options:
        options["do_sample"] = _number("temperature", options["temperature"]) > 0.0
    if options.get("do_sample") is False:
        options.pop("temperature", None)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"generation_kwargs: {name}={value!r} is not a number.") from None
