"""LoRA adapters, merged into a model's weights when it is loaded.

Adapters name the modules of the model they were trained on, as published; the family's weight names translate them.
Only safetensors files are read, and the package peft is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families.drafts import mask_vectors
from s2d2_lmeval.families.facts import Family
from s2d2_lmeval.families.files import adapter_file, read_json, resolve, stored_weights

_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# What says nothing about the arithmetic, or is read here. Everything else that is set, in whatever release of peft it
# comes, makes an adapter more than W + scale * B A.
_READ = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "lora_dropout"),
    *("init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("qalora_group_size", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    "runtime_config",
}
_LARGEST_ALPHA = 1e9
_DRAFT = "s2d2_draft_factors"
_PLAIN_START = ("gaussian", "eva", "orthogonal")  # others change the base's weights


class Factors(NamedTuple):
    """What a LoRA adds to a projection: ``scale`` times ``high`` (out, r) times ``low`` (r, in)."""

    low: torch.Tensor
    high: torch.Tensor
    scale: float


class DraftWeights(NamedTuple):
    """What a draft adapter adds: native module name -> factors, and (places, hidden size) its vectors of masks."""

    factors: dict[str, Factors]
    vectors: torch.Tensor | None


def draft_weights(model: PreTrainedModel) -> DraftWeights | None:
    """The draft adapter that was loaded with ``model``, if one was."""
    return getattr(model, _DRAFT, None)


def keep_adapter(model: PreTrainedModel, family: Family, source: str | Path, **hub: Any) -> None:
    """Keeps a LoRA adapter for draft queries beside the weights; arguments and errors as in :func:`merge_adapter`."""
    found = {}
    for module, _, factors in _read(model, family, source, hub):
        found[family.native_name(f"{module}.weight").removesuffix(".weight")] = factors
    setattr(model, _DRAFT, DraftWeights(found, mask_vectors(model, str(source), **hub)))


def merge_adapter(model: PreTrainedModel, family: Family, source: str | Path, **hub: Any) -> None:
    """Adds a LoRA adapter to the weights of ``model``, in place: W + scale * B A, computed in float32.

    Args:
        model: of the native class of ``family``.
        source: folder or hub id of the adapter (adapter_config.json and adapter_model.safetensors).
        hub: as for a checkpoint (``token``, ``cache_dir``, ``local_files_only``, …).

    Raises:
        CheckpointError: no LoRA adapter there, or one that was not made for this model; the model is as before then.
    """
    changes = _read(model, family, source, hub)
    with torch.no_grad():
        for _, weight, (low, high, scale) in changes:
            update = high.to(weight.device, torch.float32) @ low.to(weight.device, torch.float32)
            weight.copy_(weight.float() + scale * update)


def _read(
    model: PreTrainedModel, family: Family, source: str | Path, hub: Mapping[str, Any]
) -> list[tuple[str, nn.Parameter, Factors]]:
    """Published module name, weight and factors of all that an adapter changes."""
    source = resolve(source)
    config = read_json(source, "adapter_config.json", **hub)
    if config is None:
        raise CheckpointError(f"{source} holds no adapter_config.json, so it is not an adapter.")
    _check_plain(source, config)
    changes = []
    file = adapter_file(source, **hub)
    stored_weights([file])
    for module, factors in _factors(source, load_file(file)).items():
        weight = _weight_of(model, family, module, source)
        low, high = factors["A"], factors["B"]
        if (high.shape[0], low.shape[1], high.shape[1]) != (*weight.shape, low.shape[0]):
            raise CheckpointError(
                f"the adapter {source} does not fit this model: {module} has factors {list(high.shape)} and "
                f"{list(low.shape)} for a weight {list(weight.shape)}. Load the base model that it was trained on."
            )
        changes.append((module, weight, Factors(low, high, _scale(config, module, low.shape[0]))))
    return changes


def _check_plain(source: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{source} is an adapter of type {config.get('peft_type')!r}; only LORA can be merged.")
    odd = [name for name, value in config.items() if name not in _READ and value not in (None, False, "none", [], {})]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_START:
        odd.append("init_lora_weights")
    if odd:
        raise CheckpointError(
            f"the adapter {source} says {odd[0]}={config[odd[0]]!r}, which is more than a plain LoRA. Merge it with "
            "the package peft, and load the result; one for drafts cannot be merged, and has to be plain."
        )


def _factors(source: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Module name -> its two factors, A (r, in) and B (out, r)."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or tensor.dim() != 2:
            raise CheckpointError(f"the adapter {source} holds {name}, which is not a factor of a LoRA.")
        found.setdefault(match[1], {})[match[2]] = tensor
    halves = sorted(name for name, factors in found.items() if len(factors) < 2)
    if halves or not found:
        what = f"only one factor of {halves[0]}" if halves else "no factor at all"
        raise CheckpointError(f"the adapter {source} holds {what}; fetch it again.")
    return dict(sorted(found.items()))


def _weight_of(model: PreTrainedModel, family: Family, module: str, source: str) -> nn.Parameter:
    weight = dict(model.named_parameters()).get(family.native_name(f"{module}.weight"))
    if weight is None:
        raise CheckpointError(
            f"the adapter {source} changes {module}, which this {family.name} model does not have under that name. "
            "Load the base model that it was trained on, or merge it with the package peft."
        )
    if not weight.is_floating_point() or weight.is_meta:
        kind = "offloaded" if weight.is_meta else "quantized"
        raise CheckpointError(
            f"the adapter {source} cannot be merged into {kind} weights. Merge it into the checkpoint first, and load "
            "the result."
        )
    return weight


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"adapter_config.json says alpha_pattern={patterns!r}; an object is needed.")
    for pattern, value in patterns.items():
        if _matches(pattern, module):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < abs(alpha) < _LARGEST_ALPHA:
        raise CheckpointError(f"adapter_config.json says lora_alpha={alpha!r}; a number is needed.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(pattern: str, module: str) -> bool:
    # A group that is repeated can take a regular expression more time than there is.
    if re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{?]", pattern)) > 4:
        raise CheckpointError(f"adapter_config.json has the alpha_pattern {pattern!r}; name the modules more plainly.")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"adapter_config.json has the alpha_pattern {pattern!r}: {error}.") from None
