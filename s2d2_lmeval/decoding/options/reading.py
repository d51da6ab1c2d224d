"""Reading options as given: synonyms, the decoders they belong to, and contradictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.decoding.options.general import EVERY_DECODER, GREEDY
from s2d2_lmeval.decoding.options.names import changes_nothing, nearest
from s2d2_lmeval.decoding.options.option import SYNONYMS, checked, converted, takes_none
from s2d2_lmeval.decoding.options.s2d2 import RemaskingOption, RoutingOptions
from s2d2_lmeval.decoding.options.spiffy import BASES
from s2d2_lmeval.errors import ConfigError, shown
from s2d2_lmeval.registry import DECODERS, ESTIMATORS, POLICIES, STRATEGIES

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts

Fields = Sequence[dataclasses.Field[Any]]

_CHOSEN = ((POLICIES, RoutingOptions), (ESTIMATORS, RoutingOptions), (STRATEGIES, RemaskingOption))
"""Registries that an option chooses from, and that option's class: whoever takes it also takes their options."""


def classes_of(decoder: str, base: str = "") -> tuple[type, ...]:
    """The classes of options of ``decoder``, and those of ``base`` if that is accelerated."""
    own = [*EVERY_DECODER, *(options for part in DECODERS.all(decoder) for options in part.options)]
    chosen = [part.options for registry, owner in _CHOSEN if owner in own for part in registry.values()]
    also = classes_of(base) if accelerated(decoder, base) != decoder else ()
    return tuple(dict.fromkeys([*own, *(options for several in chosen for options in several), *also]))


def names_of(decoder: str, base: str = "") -> list[str]:
    """The options of ``decoder``, and those of ``base`` if that is accelerated."""
    return list(dict.fromkeys(name for options in classes_of(decoder, base) for name in names_in(options)))


@cache
def names_in(options: type) -> tuple[str, ...]:
    """The options that a class declares."""
    return tuple(field.name for field in dataclasses.fields(options))


def owners(name: str) -> list[str]:
    """The decoders that take an option."""
    return [decoder for decoder in DECODERS if name in names_of(decoder)]


def accelerated(decoder: str, base: str) -> str:
    """The decoder whose steps run: ``base`` if it is accelerated, else ``decoder`` itself."""
    return base if base and any(part.accelerates for part in DECODERS.all(decoder)) else decoder


def own(decoder: str, base: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that ``decoder`` knows."""
    names = set(names_of(decoder, base)) if decoder in DECODERS else set()
    return {name: value for name, value in options.items() if name in names}


def normalised(known: Fields, options: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve synonyms and convert values to their types; drops values that are null or have no effect.

    Refuses unknown names, and a name that is given twice.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"decoding options are names and values, such as {{'block_length': 16}}, not {shown(options)}."
        )
    fields = {field.name: field for field in known}
    given: dict[str, Any] = {}
    for name, value in options.items():
        target = SYNONYMS.get(name, name) if isinstance(name, str) else ""
        if target not in fields:
            if changes_nothing(name, value):
                continue
            said = shown(name).strip("'")
            raise ConfigError(f"{said} is not a decoding option.{nearest(name, {*fields, *SYNONYMS})}")
        if value is None and not takes_none(fields[target]):
            continue
        value = checked(fields[target], value)
        if target in given and given[target] != value:
            raise ConfigError(f"{name} and another name of {target} have different values; give one of them.")
        given[target] = value
    return given


def layer(known: Fields, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options from one source: a temperature alone decides whether to sample."""
    given = normalised(known, options)
    if "temperature" in given:
        given.setdefault("do_sample", given["temperature"] >= GREEDY)
    return given


def refuse_foreign(decoder: str, base: str, given: Mapping[str, Any], facts: Facts | None = None) -> None:
    """Refuse options of another decoder; names those that have them and decode checkpoints of ``facts``."""
    also = f" with base={base}" if accelerated(decoder, base) != decoder else ""
    for name in given.keys() - set(names_of(decoder, base)):
        whose = [one for one in owners(name) if facts is None or one in facts.decoders] or owners(name)
        raise ConfigError(
            f"{name} is an option of decoder {' or '.join(whose)}, and this run uses decoder={decoder}{also}; drop "
            f"{name} or choose decoder={whose[0]}."
        )


def refuse_other_schemes(known: Fields, given: Mapping[str, Any], facts: Facts) -> None:
    """Refuse options that do not apply to checkpoints of ``facts``, if they differ from their default."""
    for field in known:
        value = given.get(field.name, field.default)
        # As many steps as tokens is what no number of steps comes to.
        default = value == field.default or (field.name == "denoising_steps" and value == given.get("block_length"))
        if not default and facts.scheme not in field.metadata["schemes"]:
            raise ConfigError(f"{field.name} does not apply to {facts.family} checkpoints; remove it.")


def misfit(decoder: str, facts: Facts, option: str = "decoder") -> str:
    """Why ``decoder``, the value of ``option``, is not for checkpoints of ``facts``."""
    parts = DECODERS.all(decoder)
    reason = next((f" ({part.unfit[facts.scheme]})" for part in parts if facts.scheme in part.unfit), "")
    if any(part.needs_drafter for part in parts):
        reason = " without a drafter (give its path or hub id as draft=…)"
    fitting = [name for name in facts.decoders if option == "decoder" or name in set(BASES)]
    return f"{option}={decoder} does not fit {facts.family} checkpoints{reason}; use one of: {', '.join(fitting)}."


EXACT_QUERIES = 64
"""Queries of every forward under ``exact=true``: an H100 reads its weights for so many in the time of one."""


def queries_of(exact: bool | int | str) -> int:
    """Queries of every forward under ``exact``; 0 if forwards are as wide as they need to be.

    Raises:
        ConfigError: it is neither true or false nor a number of queries.
    """
    if isinstance(exact, bool) or str(exact).lower() in ("true", "false"):
        return EXACT_QUERIES * converted("exact", "bool", exact)
    queries = int(converted("exact", "int", exact))
    if queries < 6:  # the smallest tree beside a part of a prompt
        raise ConfigError(f"exact={queries}: give true, false, or the number of queries of every forward, 6 or more.")
    return queries
