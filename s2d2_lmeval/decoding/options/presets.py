"""Published settings under the options that a user gives: a family's own for each block length, and presets by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.families import FAMILIES, family_named

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts


def published_setting(facts: Facts, block_length: Any) -> dict[str, Any]:
    """The family's setting for blocks of ``block_length`` (None: the checkpoint's own), and the checkpoint's stop
    tokens.
    """
    options = facts.defaults
    if isinstance(block_length, int) and block_length != facts.block_length:
        options = {**options, **family_named(facts.family).defaults(block_length)}
    return {"stop_token_ids": facts.stop_token_ids, **options}


def preset_options(name: Any, facts: Facts | None) -> dict[str, Any]:
    """The options of the preset ``name``, which must be one of ``facts``' family if that is known.

    Raises:
        ConfigError: no such name, or one of another family; it says which fit.
    """
    owners = [family for family in FAMILIES.values() if isinstance(name, str) and name in family.presets]
    fitting = [family for family in owners if facts is None or family.name == facts.family]
    if not fitting:
        raise ConfigError(_refusal(name, [family.name for family in owners], facts))
    options = dict(fitting[0].presets[name])
    if options.get("denoising_steps") == options.get("block_length"):
        # As many as the block has tokens, also if another length is given with the preset.
        options["denoising_steps"] = None
    return options


def _refusal(name: Any, owners: list[str], facts: Facts | None) -> str:
    families = FAMILIES.values() if facts is None else [family_named(facts.family)]
    known = list(dict.fromkeys(preset for family in families for preset in family.presets))
    listed = f"known are {', '.join(known)}" if facts is None else f"{facts.family} has {', '.join(known) or 'none'}"
    if owners and facts is not None:
        whose = " and ".join(owners)
        return f"preset={name} is a setting of {whose}, and this is a {facts.family} checkpoint: {listed}."
    near = get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"there is no preset {name}; {listed}.{f' Did you mean {near[0]}?' if near else ''}"
