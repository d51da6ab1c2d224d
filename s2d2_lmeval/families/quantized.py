"""Quantized checkpoints: transformers loads them; what its quantizers would take for something else is seen to here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families.facts import Family
from s2d2_lmeval.families.files import Stored

LEFT_OUT = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")
"""Fields of a quantization_config with the names of modules that are not quantized."""
SCALE = "_scale_inv"


def quantization_of(native: PreTrainedConfig) -> Mapping[str, Any] | None:
    """What config.json says; transformers takes weights of a kind that it does not know for plain ones."""
    given = getattr(native, "quantization_config", None)
    if given is None:
        return None
    try:
        if AutoHfQuantizer.supports_quant_method(given):
            return dict(given)
    except Exception:  # not an object, or without a method
        pass
    raise CheckpointError(f"config.json says quantization_config={given!r}, which transformers cannot read.")


def with_native_names(quantization: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """``quantization`` with the native names of modules that are left out, which have their published names in it."""

    def renamed(module: Any) -> Any:
        if not isinstance(module, str) or module.startswith("re:"):
            return module
        name = f"{module}."
        for published, native in family.key_mapping.items():
            name = re.sub(published, native, name)
        return name.removesuffix(".")

    lists = {name: quantization[name] for name in LEFT_OUT if isinstance(quantization.get(name), list)}
    return {**quantization, **{name: [renamed(module) for module in modules] for name, modules in lists.items()}}


def check_blocks(source: str, quantization: Mapping[str, Any], weights: Mapping[str, Stored]) -> None:
    """Refuse FP8 weights that their blocks do not divide: without FP8 kernels, transformers takes other blocks."""
    block = quantization.get("weight_block_size")
    if quantization.get("quant_method") != "fp8" or not isinstance(block, list):
        return
    for name, scale in weights.items():
        weight = weights.get(name.removesuffix(SCALE))
        if not name.endswith(SCALE) or weight is None or len(weight.shape) != 2 or len(scale.shape) != 2:
            continue
        for size, length, several in zip(weight.shape, block, scale.shape, strict=False):
            if several > 1 and size % length:
                raise CheckpointError(
                    f"{source}: {name.removesuffix(SCALE)} has {size} rows or columns, which blocks of {length} do not "
                    "divide, so its scales cannot be told apart. Load weights that are not quantized."
                )
