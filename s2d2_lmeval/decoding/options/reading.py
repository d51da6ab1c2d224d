"""Options as they are given: names, types, and which decoder and checkpoint they are for.

``known`` are the fields of :class:`~s2d2_lmeval.decoding.options.config.DecodingConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.decoding.options.names import changes_nothing, nearest
from s2d2_lmeval.decoding.options.option import DECODERS, SYNONYMS, checked
from s2d2_lmeval.decoding.options.sampling import GREEDY
from s2d2_lmeval.decoding.options.spiffy import accelerated
from s2d2_lmeval.errors import ConfigError, shown

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts

Fields = Sequence[dataclasses.Field[Any]]


def fields_of(known: Fields, decoder: str, base: str) -> list[str]:
    """Options of ``decoder``, and those of ``base`` if it is accelerated."""
    who = {decoder, accelerated(decoder, base)}
    return [field.name for field in known if who & set(field.metadata["decoders"])]


def own(known: Fields, decoder: str, base: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that ``decoder`` knows."""
    names = set(fields_of(known, decoder, base)) if decoder in DECODERS else set()
    return {name: value for name, value in options.items() if name in names}


def normalised(known: Fields, options: Mapping[str, Any]) -> dict[str, Any]:
    """Published names for synonyms, values in their types; what is null or changes nothing is left out.

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
        if value is None and not str(fields[target].type).endswith("None"):
            continue
        value = checked(fields[target], value)
        if target in given and given[target] != value:
            raise ConfigError(f"{name} and another name of {target} are given with different values; give one of them.")
        given[target] = value
    return given


def layer(known: Fields, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as one source gives them: a temperature alone decides whether to sample."""
    given = normalised(known, options)
    if "temperature" in given:
        given.setdefault("do_sample", given["temperature"] >= GREEDY)
    return given


def refuse_foreign(known: Fields, decoder: str, base: str, given: Mapping[str, Any]) -> None:
    """Refuse options of another decoder."""
    fitting, also = fields_of(known, decoder, base), f" with base={base}" if decoder == "spiffy" else ""
    for field in known:
        owners = field.metadata["decoders"]
        if field.name in given and field.name not in fitting:
            raise ConfigError(
                f"{field.name} is an option of decoder {' or '.join(owners)}, and this run uses decoder={decoder}"
                f"{also}; drop {field.name} or choose decoder={owners[0]}."
            )


def refuse_other_schemes(known: Fields, given: Mapping[str, Any], facts: Facts) -> None:
    """Refuse options that mean nothing to checkpoints of ``facts``, where they differ from their default."""
    for field in known:
        value = given.get(field.name, field.default)
        # As many steps as tokens is what no number of steps comes to.
        default = value == field.default or (field.name == "denoising_steps" and value == given.get("block_length"))
        if not default and facts.scheme not in field.metadata["schemes"]:
            raise ConfigError(f"{field.name} does not apply to {facts.family} checkpoints; remove it.")
