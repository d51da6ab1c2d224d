"""The known families, and the family of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.errors import CheckpointError, shown
from s2d2_lmeval.families.facts import ADAPTER_FIELD, AUTOREGRESSIVE, FAMILY_FIELD, Facts, Family
from s2d2_lmeval.families.known.autoregressive import TARGETS
from s2d2_lmeval.families.known.d2f import DREAM, LLADA
from s2d2_lmeval.families.known.fast_dllm_v2 import FAST_DLLM_V2
from s2d2_lmeval.families.known.idlm import IDLM
from s2d2_lmeval.families.known.llada2 import LLADA2
from s2d2_lmeval.families.known.nemotron import NEMOTRON
from s2d2_lmeval.families.known.sdar import SDAR, SDAR_MOE
from s2d2_lmeval.families.known.stable_diffcoder import STABLE_DIFFCODER
from s2d2_lmeval.families.known.tiny_a2d import TINY_A2D
from s2d2_lmeval.families.known.wedlm import WEDLM
from s2d2_lmeval.families.records import names_blocks
from s2d2_lmeval.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES: Registry[Family] = Registry("families")
"""Name -> family, in the order in which messages and pages list them."""

# Diffusion models that transformers runs and decodes by itself.
_SELF_CONTAINED = ("diffusion_gemma",)
_OF_TRANSFORMERS = ("ForCausalLM", "Model", "ModelLM")
# Autoregressive models with gated delta networks, by how their model types begin.
_RECURRENT = ("qwen3_next", "qwen3_5", "qwen3_6", "qwen3_8", "kimi_linear", "olmo_hybrid")


def register(family: Family) -> Family:
    """Register ``family`` for everything that loads, describes or decodes checkpoints; returns it.

    Raises:
        CheckpointError: if its name, a ``model_type`` or a preset's name already belongs to another family.
    """
    for other in FAMILIES.known():
        shared = family.presets.keys() & other.presets.keys()
        taken = {family.name, *family.model_types} & {other.name, *other.model_types}
        taken |= {name for name in shared if family.presets[name] != other.presets[name]}
        if taken:
            raise CheckpointError(f"{min(taken)} belongs to the family {other.name} already; choose another name.")
    FAMILIES.add(family.name, family)
    return family


_KNOWN = (SDAR, SDAR_MOE, FAST_DLLM_V2, LLADA2, LLADA, DREAM, NEMOTRON, *TINY_A2D, STABLE_DIFFCODER, IDLM, *WEDLM)
for _family in (*_KNOWN, *TARGETS):
    register(_family)


def mark(native: PreTrainedConfig, facts: Facts) -> None:
    """Writes into a native configuration what only the published one said."""
    setattr(native, FAMILY_FIELD, facts.family)
    if facts.adapter is not None:
        setattr(native, ADAPTER_FIELD, facts.adapter)
    if facts.scheme != AUTOREGRESSIVE:
        native.mask_token_id = facts.mask_token_id
        if facts.block_length_from != "assumed":
            native.block_length = facts.block_length


def family_named(name: str) -> Family:
    """The family of that name; CheckpointError names the known ones."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"no family is called {shown(name)}. Known families: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def identify(
    config: Mapping[str, Any], source: str = "", family: str | None = None, block_length: int | None = None
) -> Family:
    """The family of a published config.json.

    The user may name it, by ``family`` or the field of config.json, and say by ``block_length`` that it denoises
    blocks. Otherwise the names of classes and the fields that only one family has say more than the ``model_type``,
    which several share; and a class that is nobody's, or something else in config.json or in the name ``source``,
    refutes the type.

    Raises:
        CheckpointError: an unknown family, or a contradiction; the message names the known ones and says what to do.
    """
    told = family if family is not None else config.get(FAMILY_FIELD)
    if told:
        return family_named(told)
    model_type = config.get("model_type")
    known = shown_family(config, source)
    if known is None:
        typed = (one for one in FAMILIES.values() if model_type in one.model_types)
        known = next((one for one in typed if not (one.scheme == AUTOREGRESSIVE and names_blocks(config))), None)
    if known is None:
        raise _unknown(config)
    check_class(known, config if block_length is None else {**config, "block_length": block_length}, source)
    return known


def shown_family(config: Mapping[str, Any], source: str) -> Family | None:
    """The family that fields, the name ``source`` or a class of its own show, whatever the ``model_type``."""
    claimed = next((one for one in FAMILIES.values() if one.claims(config, source)), None)
    if claimed is not None:
        return claimed
    named = {name.casefold() for name in (*_classes(config.get("auto_map")), *_strings(config.get("architectures")))}
    model_type = config.get("model_type")
    owners = [
        one
        for one in FAMILIES.values()
        if named & {name.casefold() for name in one.classes} and model_type in (*one.model_types, *one.native_types)
    ]
    of_type = [one for one in owners if model_type in one.model_types]
    return next(iter(of_type or (owners if len(owners) == 1 else [])), None)


def check_class(family: Family, config: Mapping[str, Any], source: str) -> None:
    """Refuse a config.json of the type of ``family`` that describes another model.

    Raises:
        CheckpointError: with the class, or the other evidence.
    """
    remote, listed = _classes(config.get("auto_map")), _strings(config.get("architectures"))
    strange: list[str] = []
    if family.scheme == AUTOREGRESSIVE:
        prefix = family.config_class.__name__.removesuffix("Config")
        native = (f"{prefix}For", f"{prefix}Model")
        # A class of its own is code that may do anything, whatever it is called.
        strange = [*remote, *(name for name in listed if not name.startswith(native))]
    elif family.classes:
        own = {name.casefold() for name in (*family.classes, family.native_class)}
        # The type says much already; of code that is not run anyway, only a name as transformers gives them counts.
        telling = [name for name in remote if name.endswith(_OF_TRANSFORMERS)]
        strange = [name for name in (*telling, *listed) if name.casefold() not in own]
    reason = "has a model class of its own" if strange else family.doubt(config, source)
    if reason:
        of_class = next((f" (class {name})" for name in (*strange, *remote, *listed)), "")
        known = f" (known: {', '.join(FAMILIES)})" if strange else f", such as family={family.name}"
        raise CheckpointError(
            f"model_type {config.get('model_type')!r} is that of {family.name}, but this one{of_class} {reason}, "
            "so it may decode otherwise. If it computes what a known family does all the same, say which with "
            f"family=…{known}."
        )


def _classes(auto_map: Any) -> list[str]:
    """The class of the language model that remote code would load."""
    if not isinstance(auto_map, Mapping):
        return []
    given = auto_map.get("AutoModelForCausalLM") or auto_map.get("AutoModel")
    return [given.rpartition(".")[2]] if isinstance(given, str) else []


def _strings(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, (list, tuple)) else []


def _unknown(config: Mapping[str, Any]) -> CheckpointError:
    model_type = config.get("model_type")
    known = ", ".join(f"{one.name} ({'/'.join(one.model_types) or 'by its fields'})" for one in FAMILIES.values())
    if str(model_type).startswith(_SELF_CONTAINED):
        return CheckpointError(
            f"model_type {model_type!r} is a diffusion model that transformers decodes by itself, with another kind of "
            f"denoising: evaluate it with `lm_eval --model hf`. Families decoded here: {known}."
        )
    if str(model_type).startswith(_RECURRENT):
        return CheckpointError(
            f"model_type {model_type!r} has gated delta layers, whose recurrent state no mask can divide among "
            "the branches of a draft and no crop can take back. Targets decoded here attend to the whole prefix: "
            f"{', '.join(family.name for family in TARGETS)}."
        )
    names = [*_classes(config.get("auto_map")), *_strings(config.get("architectures"))]
    of_class = f" (class {names[0]})" if names else ""
    natives = {native for family in FAMILIES.values() for native in family.native_types}
    if isinstance(model_type, str) and model_type in natives:
        return CheckpointError(
            f"model_type {model_type!r}{of_class} is an autoregressive model, or a block-diffusion model under its "
            f'native name. Say which with family=… or in config.json ("{FAMILY_FIELD}": one of {", ".join(FAMILIES)}).'
        )
    return CheckpointError(
        f"model_type {model_type!r}{of_class} is of no known family. Known families (model_type): {known}. If it "
        "computes the same as one of them under the same names, say so with family=…."
    )
