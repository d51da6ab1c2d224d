"""The known families in transformers' auto classes: ``AutoConfig``, ``AutoTokenizer``, ``AutoModelForCausalLM`` and
``pipeline("text-generation")`` take their checkpoints, without remote code.

Each family has a subclass of its native class. It computes the same, reads the published files, and its ``generate`` is
that of :mod:`s2d2_lmeval.custom_generate.generate`. After ``import s2d2_lmeval``, :func:`register` is called as soon as
transformers has its auto classes.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from s2d2_lmeval.custom_generate.generate import generate, through_transformers
from s2d2_lmeval.families import FAMILIES, Family, family_named, identify
from s2d2_lmeval.families.facts import FAMILY_FIELD
from s2d2_lmeval.families.files import HUB_OPTIONS
from s2d2_lmeval.families.loading import check_fit, described
from s2d2_lmeval.families.records import BLOCK_FIELDS, MASK_FIELDS, first
from s2d2_lmeval.families.registry import mark

_CONFIGS: dict[str, type[PreTrainedConfig]] = {}
"""Family -> its configuration in the auto classes."""


def register() -> None:
    """Add every known family, under each published ``model_type`` that transformers itself does not know."""
    for family in FAMILIES.values():
        types = [name for name in family.model_types if name not in CONFIG_MAPPING_NAMES]
        # A family without a type of its own is chosen by the one that shares it.
        if family.name in _CONFIGS or (family.model_types and not types):
            continue
        config_class, model_class = _classes(family)
        _CONFIGS[family.name] = config_class
        for name in types:
            CONFIG_MAPPING.register(name, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def _classes(family: Family) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    native = getattr(transformers, family.native_class)
    stem = "".join(part.capitalize() for part in family.name.split("_"))
    config_class = type(f"{stem}Config", (_Published, family.config_class), {"__module__": __name__})
    described_by = {"__module__": __name__, "config_class": config_class}
    return config_class, type(f"{stem}ForCausalLM", (_Decoded, native), described_by)


class _Published:
    """A native configuration that is read from a published config.json."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of the family that the fields show, which may be another one of the same type."""
        source = str(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "")
        family = identify(config_dict, source)
        fields = family.native_config(config_dict).to_dict()
        fields[FAMILY_FIELD] = family.name
        fields["mask_token_id"] = first(config_dict, MASK_FIELDS)
        fields["block_length"] = first(config_dict, family.block_fields and BLOCK_FIELDS)
        kept = {name: value for name, value in fields.items() if value is not None}
        chosen = _CONFIGS.get(family.name, cls)
        return super(_Published, chosen).from_dict(kept, **kwargs)  # type: ignore[misc]


class _Decoded:
    """A native model that is read from a published checkpoint, and decoded as its family is."""

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As of the native class, and CheckpointError for a checkpoint that does not fit it exactly."""
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(source if config is None else config, **hub)  # type: ignore[attr-defined]
        named = getattr(config, FAMILY_FIELD, "")
        family = family_named(named)
        overrides = {name: getattr(config, name, None) for name in ("mask_token_id", "block_length")}
        mark(config, described(str(source), hub, named, (None, None), overrides)[2])
        wanted = kwargs.pop("output_loading_info", False)
        given = {"use_safetensors": True, "key_mapping": dict(family.key_mapping) or None, **kwargs}
        model, info = super().from_pretrained(source, *args, config=config, output_loading_info=True, **given)  # type: ignore[misc]
        check_fit(family, str(source), info)
        return (model, info) if wanted else model

    def generate(self, *args: Any, custom_generate: Any = generate, **kwargs: Any) -> Any:
        """As ``generate`` of transformers, decoded by the family's decoder.

        ``custom_generate=None`` is transformers' own loop, which makes sense only where text predicts the next token.
        """
        if custom_generate is generate:
            return through_transformers(super().generate, *args, **kwargs)  # type: ignore[misc]
        return super().generate(*args, custom_generate=custom_generate, **kwargs)  # type: ignore[misc]
