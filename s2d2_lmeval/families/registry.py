"""The families that are known, and which of them a configuration is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families.autoregressive import TARGETS
from s2d2_lmeval.families.dream import DREAM
from s2d2_lmeval.families.facts import ADAPTER_FIELD, AUTOREGRESSIVE, FAMILY_FIELD, Facts, Family, names_blocks
from s2d2_lmeval.families.fast_dllm_v2 import FAST_DLLM_V2
from s2d2_lmeval.families.llada import LLADA
from s2d2_lmeval.families.llada2 import LLADA2
from s2d2_lmeval.families.sdar import SDAR, SDAR_MOE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES: dict[str, Family] = {}
"""Name -> family, in the order in which messages and pages list them."""

# Diffusion models that transformers runs by itself, and whose decoding is theirs alone.
_SELF_CONTAINED = ("diffusion_gemma",)
# Autoregressive models with gated delta networks, by how their model types begin.
_RECURRENT = ("qwen3_next", "qwen3_5", "qwen3_6", "qwen3_8", "kimi_linear", "olmo_hybrid")


def register(family: Family) -> Family:
    """Makes ``family`` known to everything that loads, describes or decodes checkpoints; returns it.

    Raises:
        CheckpointError: its name, a ``model_type`` or the name of a preset that is another family's already.
    """
    for other in FAMILIES.values():
        shared = family.presets.keys() & other.presets.keys()
        taken = {family.name, *family.model_types} & {other.name, *other.model_types}
        taken |= {name for name in shared if family.presets[name] != other.presets[name]}
        if taken:
            raise CheckpointError(f"{min(taken)} belongs to the family {other.name} already; choose another name.")
    FAMILIES[family.name] = family
    return family


for _family in (SDAR, SDAR_MOE, FAST_DLLM_V2, LLADA2, LLADA, DREAM, *TARGETS):
    register(_family)


def mark(native: PreTrainedConfig, facts: Facts) -> None:
    """Writes into a native configuration what only the published one said."""
    setattr(native, FAMILY_FIELD, facts.family)
    if facts.adapter is not None:
        setattr(native, ADAPTER_FIELD, facts.adapter)
    if facts.scheme != AUTOREGRESSIVE:
        native.mask_token_id = facts.mask_token_id
        native.block_length = facts.block_length


def family_named(name: str) -> Family:
    """The family of that name; CheckpointError names the known ones."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"no family is called {name!r}. Known families: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def identify(config: Mapping[str, Any]) -> Family:
    """The family of a published config.json.

    Raises:
        CheckpointError: a ``model_type`` of no known family; the message names the known ones.
    """
    if config.get(FAMILY_FIELD):
        return family_named(config[FAMILY_FIELD])
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types and not (family.scheme == AUTOREGRESSIVE and names_blocks(config)):
            return family
    known = ", ".join(f"{family.name} ({'/'.join(family.model_types)})" for family in FAMILIES.values())
    if str(model_type).startswith(_SELF_CONTAINED):
        raise CheckpointError(
            f"model_type {model_type!r} is a diffusion model that transformers decodes by itself, with another kind of "
            f"denoising: evaluate it with `lm_eval --model hf`. Families decoded here: {known}."
        )
    if str(model_type).startswith(_RECURRENT):
        raise CheckpointError(
            f"model_type {model_type!r} has gated delta layers, whose recurrent state no mask can divide among "
            "the branches of a draft and no crop can take back. Targets decoded here attend to the whole prefix: "
            f"{', '.join(family.name for family in TARGETS)}."
        )
    natives = sorted({native for family in FAMILIES.values() for native in family.native_types})
    if model_type in natives:
        raise CheckpointError(
            f"model_type {model_type!r} is an autoregressive model, or a block-diffusion model under its native name. "
            f'Say which in config.json ("{FAMILY_FIELD}": one of {", ".join(FAMILIES)}).'
        )
    raise CheckpointError(f"model_type {model_type!r} is of no known family. Known families (model_type): {known}.")
