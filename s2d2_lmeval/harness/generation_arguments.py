"""What a task's ``generation_kwargs`` (and ``--gen_kwargs``) ask for."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from s2d2_lmeval.decoding.options.names import changes_nothing
from s2d2_lmeval.decoding.options.option import SYNONYMS, converted
from s2d2_lmeval.decoding.options.sampling import GREEDY
from s2d2_lmeval.errors import ConfigError, shown

BUDGET_NAMES = ("max_new_tokens", *(name for name, target in SYNONYMS.items() if target == "max_new_tokens"))
"""Names of the budget of new tokens."""

logger = logging.getLogger("lm_eval.s2d2")


@dataclass(frozen=True)
class GenerationArguments:
    """One group of requests: when to stop (``until``), the budget if the task names one, and the decoding options it
    names.
    """

    until: tuple[str, ...]
    max_new_tokens: int | None
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, gen_kwargs: Mapping[str, Any], own: Container[str] = ()) -> GenerationArguments:
        """Read a request's generation arguments as the harness means them.

        ``do_sample: false`` is greedy drafting whatever the temperature says; a temperature alone decides whether to
        sample. ``own`` are the parameters of a function of the user's, whatever they mean elsewhere.

        :raises ConfigError: for a value of the wrong type, or an option that has no meaning for block diffusion.
        """
        if not isinstance(gen_kwargs, Mapping):
            raise ConfigError(f"generation_kwargs must be a mapping, not {shown(gen_kwargs)}.")
        options = {
            name: value
            for name, value in gen_kwargs.items()
            if value is not None and (name in own or not changes_nothing(name, value))
        }
        until = _until(options.pop("until", None))
        budget = _budget({name: options.pop(name) for name in list(options) if name in BUDGET_NAMES})
        _sampling(options)
        return cls(until, budget, options)


def _until(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise ConfigError(f"generation_kwargs: until must be a string or a list of strings, not {shown(value)}.")
    return tuple(strings)


def _budget(given: Mapping[str, Any]) -> int | None:
    """The budget that is said last: the harness puts ``--gen_kwargs`` after a task's own arguments."""
    budgets = {name: token_budget(value, name) for name, value in given.items()}
    if len(set(budgets.values())) > 1:
        logger.warning("generation_kwargs name several budgets, %s: the last one counts.", budgets)
    return list(budgets.values())[-1] if budgets else None


def token_budget(value: Any, name: str = "max_gen_toks") -> int:
    """``value`` as a number of new tokens.

    :raises ConfigError: when it is none.
    """
    try:
        budget = int(converted(name, "int", value))
    except ConfigError:
        budget = -1
    if budget < 0:
        raise ConfigError(f"{name}={shown(value)} is not a number of tokens.")
    return budget


def _sampling(options: dict[str, Any]) -> None:
    """``do_sample`` and ``temperature`` in the harness's sense, in place."""
    for name, kind in (("do_sample", "bool"), ("temperature", "float")):
        if name in options:
            options[name] = converted(name, kind, options[name])
    temperature = options.get("temperature", 0.0)
    if "temperature" in options:
        options.setdefault("do_sample", temperature >= GREEDY)
    if options.get("do_sample") is False and options.pop("temperature", 0.0) >= GREEDY:
        logger.warning(
            "generation_kwargs say do_sample=false and temperature=%s: drafts are the arg-max. Add do_sample=true to "
            "sample.",
            temperature,
        )
