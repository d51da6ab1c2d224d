"""LoRA adapters, merged into a model's weights when it is loaded.

Adapters name the modules of the model they were trained on, as published; the family's weight names translate them.
Only safetensors files are read, and the package peft is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families.facts import Family
from s2d2_lmeval.families.files import adapter_file, read_json, resolve

_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# What changes the arithmetic beyond W + scale * B A -> the only value that is merged here.
_PLAIN = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_qalora": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


def merge_adapter(model: PreTrainedModel, family: Family, source: str | Path, **hub: Any) -> None:
    """Adds a LoRA adapter to the weights of ``model``, in place: W + scale * B A, computed in float32.

    Args:
        model: of the native class of ``family``.
        source: folder or hub id of the adapter (adapter_config.json and adapter_model.safetensors).
        hub: as for a checkpoint (``token``, ``cache_dir``, ``local_files_only``, …).

    Raises:
        CheckpointError: no LoRA adapter there, or one that was not made for this model; the model is as before then.
    """
    source = resolve(source)
    config = read_json(source, "adapter_config.json", **hub)
    if config is None:
        raise CheckpointError(f"{source} holds no adapter_config.json, so it is no adapter.")
    _check_plain(source, config)
    changes = []
    for module, factors in _factors(source, load_file(adapter_file(source, **hub))).items():
        weight = _weight_of(model, family, module, source)
        low, high = factors["A"], factors["B"]
        if (high.shape[0], low.shape[1], high.shape[1]) != (*weight.shape, low.shape[0]):
            raise CheckpointError(
                f"the adapter {source} does not fit this model: {module} has factors {list(high.shape)} and "
                f"{list(low.shape)} for a weight {list(weight.shape)}. Load the base model that it was trained on."
            )
        changes.append((weight, low, high, _scale(config, module, low.shape[0])))
    with torch.no_grad():
        for weight, low, high, scale in changes:
            update = high.to(weight.device, torch.float32) @ low.to(weight.device, torch.float32)
            weight.copy_(weight.float() + scale * update)


def _check_plain(source: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{source} is an adapter of type {config.get('peft_type')!r}; only LORA can be merged.")
    odd = [name for name, plain in _PLAIN.items() if config.get(name) not in (None, plain, [], {})]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda")):
        odd.append("init_lora_weights")  # its base weights are not the published ones
    if odd:
        raise CheckpointError(
            f"the adapter {source} says {odd[0]}={config[odd[0]]!r}, which is more than a plain LoRA. Merge it with "
            "the package peft, and load the result."
        )


def _factors(source: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Module name -> its two factors, A (r, in) and B (out, r)."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or tensor.dim() != 2:
            raise CheckpointError(f"the adapter {source} holds {name}, which is no factor of a LoRA.")
        found.setdefault(match[1], {})[match[2]] = tensor
    halves = sorted(name for name, factors in found.items() if len(factors) < 2)
    if halves or not found:
        what = f"only one factor of {halves[0]}" if halves else "no factor at all"
        raise CheckpointError(f"the adapter {source} holds {what}; fetch it again.")
    return dict(sorted(found.items()))


def _weight_of(model: PreTrainedModel, family: Family, module: str, source: str) -> nn.Parameter:
    name = f"{module}.weight"
    for pattern, replacement in family.key_mapping.items():
        name = re.sub(pattern, replacement, name, count=1)
    weights = dict(model.named_parameters())
    if name not in weights:
        raise CheckpointError(
            f"the adapter {source} changes {module}, which this {family.name} model does not have under that name. "
            "Load the base model that it was trained on, or merge it with the package peft."
        )
    weight = weights[name]
    if not weight.is_floating_point() or weight.is_meta:
        kind = "offloaded" if weight.is_meta else "quantized"
        raise CheckpointError(
            f"the adapter {source} cannot be merged into {kind} weights. Merge it into the checkpoint first, and load "
            "the result."
        )
    return weight


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"adapter_config.json says lora_alpha={alpha!r}; a number is needed.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
