"""Adopting a loaded model: the same memory under the native class."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families.facts import AUTOREGRESSIVE, FAMILY_FIELD, Facts, Family
from s2d2_lmeval.families.files import misfit
from s2d2_lmeval.families.records import names_blocks
from s2d2_lmeval.families.registry import FAMILIES, check_class, family_named, identify, mark, shown_family

_adopted: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()


def adopt(
    hf_model: PreTrainedModel,
    *,
    family: str | None = None,
    mask_token_id: int | None = None,
    block_length: int | None = None,
    autoregressive: bool = False,
) -> tuple[PreTrainedModel, Facts]:
    """A model of the native class that shares the weights of a loaded one.

    The given model and its configuration stay unchanged and usable; both see in-place changes of a weight. The same
    model always returns the same result, as long as it lives and keeps its weights.

    Args:
        hf_model: a model of a known family, of its native class or under the published weight names (a class of
            remote code).
        family: the family, if the class alone does not determine it (Qwen2: fast_dllm_v2 or dream).
        mask_token_id, block_length: override or complete the model's configuration.
        autoregressive: treat a transformers model as autoregressive, like its class, and not as a
            block-diffusion model under its native name, unless its configuration says otherwise. So is one that names
            neither a mask token nor a block length.

    Raises:
        CheckpointError: a model of no known family, or one whose weights cannot be shared.
    """
    if not isinstance(hf_model, PreTrainedModel):
        base = getattr(hf_model, "get_base_model", None)
        hint = " Merge the adapter first: model.merge_and_unload()." if base is not None else ""
        raise CheckpointError(f"a {type(hf_model).__name__} is not a transformers model.{hint}")
    config, source = hf_model.config.to_dict(), hf_model.name_or_path or type(hf_model).__name__
    # As of a folder: a model that names neither a mask nor a block length is what its class is.
    plain = autoregressive or (mask_token_id is None and block_length is None and not names_blocks(config))
    chosen = _family_of(config, source, family, autoregressive, plain)
    # A subclass made by this package computes what its native class computes.
    kind = next(base for base in type(hf_model).__mro__ if not base.__module__.startswith("s2d2_lmeval."))
    is_native = kind.__module__.startswith("transformers.") and kind.__name__ == chosen.native_class
    native = hf_model.config if is_native else chosen.config_map(config)
    generation = getattr(hf_model, "generation_config", None)
    records = {"generation_config.json": generation.to_dict()} if generation is not None else {}
    overrides = {"mask_token_id": mask_token_id, "block_length": block_length}
    facts = chosen.facts(config, native, records, source=source, **overrides)
    held = _adopted.get(hf_model)
    if held is None or not _same_memory(hf_model, held, chosen):
        held = _clone(hf_model) if is_native else _rebuild(hf_model, chosen, native)
        mark(held.config, facts)
        _adopted[hf_model] = held
    return held, facts


def _family_of(config: Mapping[str, Any], source: str, name: str | None, autoregressive: bool, plain: bool) -> Family:
    if name is not None:
        return family_named(name)
    shown = shown_family(config, source)
    if config.get(FAMILY_FIELD) is None and (shown is None or autoregressive):
        native = [
            family
            for family in FAMILIES.values()
            if config.get("model_type") in family.native_types and (family.scheme == AUTOREGRESSIVE) == plain
            if family.taken_for_granted
        ]
        if len(native) == 1:
            check_class(native[0], config, source)
            return native[0]
        if native:
            raise CheckpointError(
                f"a model of type {config.get('model_type')!r} may be of several families; say which with family=…: "
                f"{' or '.join(family.name for family in native)}."
            )
    return identify(config, source)


def _clone(hf_model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules and the configuration around the same parameters and buffers."""
    tensors = [*hf_model.parameters(), *hf_model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise CheckpointError("parts of this model are offloaded; load it by its path instead, with device_map=….")
    try:
        return copy.deepcopy(hf_model, {id(tensor): tensor for tensor in tensors}).eval()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"this {type(hf_model).__name__} cannot be shared ({error}); load it by its path instead."
        ) from None


def _rebuild(hf_model: PreTrainedModel, family: Family, native: Any) -> PreTrainedModel:
    """The native class around the weights of a class with the published names."""
    if getattr(hf_model, "hf_quantizer", None) is not None or getattr(hf_model, "is_quantized", False):
        raise CheckpointError(
            f"a quantized {type(hf_model).__name__} cannot be shared with {family.native_class}; load it by its path "
            "instead, with the same quantization_config=…."
        )
    if not family.shares_weights:
        raise CheckpointError(
            f"{type(hf_model).__name__} holds its weights in another shape than {family.native_class}, so they cannot "
            "be shared; load it by its path instead."
        )
    weights = {family.native_name(name): tensor for name, tensor in hf_model.state_dict().items()}
    places = {tensor.device for tensor in weights.values()}
    if len(places) > 1 or any(place.type == "meta" for place in places):
        raise CheckpointError(
            "this model is spread over several devices or offloaded; load it by its path instead, with device_map=…."
        )
    with torch.device("meta"):
        model = getattr(transformers, family.native_class)._from_config(native, dtype=hf_model.dtype)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if native.tie_word_embeddings:
        expected.pop("lm_head.weight")
        head = weights.pop("lm_head.weight", None)
        if head is not None and head.data_ptr() != weights["model.embed_tokens.weight"].data_ptr():
            raise CheckpointError("this model's configuration says that the head is the embedding, but it is not.")
    wrong = misfit({name: tensor.shape for name, tensor in weights.items()}, expected)
    if wrong:
        raise CheckpointError(
            f"{type(hf_model).__name__} does not hold the weights of {family.native_class}: {wrong}. Load it by its "
            "path instead."
        )
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    _restore_buffers(model, places.pop())
    return model.eval()


def _restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes what no checkpoint holds, the rotary frequencies: modules with such buffers are built anew."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, child = name.rpartition(".")
            with torch.device(device):
                setattr(model.get_submodule(parent), child, type(module)(config=model.config))


def _same_memory(hf_model: PreTrainedModel, held: PreTrainedModel, family: Family) -> bool:
    if type(held) is type(hf_model):
        # Buffers too: a model that was moved takes its parameters along, but leaves shared buffers behind.
        ours, theirs = ((*model.named_parameters(), *model.named_buffers()) for model in (held, hf_model))
        return {name: one.data_ptr() for name, one in ours} == {name: one.data_ptr() for name, one in theirs}
    given = {family.native_name(name): tensor.data_ptr() for name, tensor in hf_model.state_dict().items()}
    return all(given.get(name) == tensor.data_ptr() for name, tensor in held.named_parameters())
