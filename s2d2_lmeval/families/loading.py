"""One way to load every family: transformers' own ``from_pretrained`` of the native class.

Sharding, dtype, device placement and quantization are therefore transformers'. What is added here: the native
configuration, the published weight names, and a refusal of every checkpoint that does not fit its class exactly.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from s2d2_lmeval.errors import CheckpointError, ConfigError, first_line, shown, without_messages
from s2d2_lmeval.families.adapters import keep_adapter, merge_adapter
from s2d2_lmeval.families.drafts import check_base, place_of, what_drafts
from s2d2_lmeval.families.facts import ADAPTER_FIELD, AUTOREGRESSIVE, Facts, Family
from s2d2_lmeval.families.files import (
    HUB_OPTIONS,
    Stored,
    read_config,
    read_json,
    resolve,
    skeleton,
    stored_weights,
    weight_files,
)
from s2d2_lmeval.families.quantized import check_blocks, quantization_of, with_native_names
from s2d2_lmeval.families.records import TOKENIZER_FILES, TRAINING_FILES, names_block_length, names_mask
from s2d2_lmeval.families.registry import identify, mark
from s2d2_lmeval.ranks import launched

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PACKED = 16  # quantized weights keep at most so many parameters in one stored number
_SHOWN = 4  # weights that a message names
_OF_THE_BASE = ("revision", "subfolder")  # hub options that mean nothing to an adapter


def load_checkpoint(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    tp_plan: str | None = None,
    quantization_config: Any = None,
    mask_token_id: int | None = None,
    block_length: int | None = None,
    family: str | None = None,
    adapter: str | Path | None = None,
    draft_adapter: str | Path | None = None,
    **from_pretrained: Any,
) -> tuple[PreTrainedModel, Facts]:
    """Load a published checkpoint into the native class of its family, in evaluation mode.

    Args:
        source: folder, hub id, or ``"toy"`` (the embedded checkpoint).
        dtype: a torch dtype or its name. ``"auto"`` is the checkpoint's own, but float32 on a CPU, where bfloat16 is
            both slower and less exact. Pass ``"bfloat16"`` to use it anyway.
        device: the device of the whole model; by default a GPU if there is one. Not together with ``device_map``.
        revision: branch, tag or commit of a hub id.
        device_map, quantization_config: as in ``from_pretrained``.
        tp_plan: ``"auto"`` divides every layer among the processes of ``torchrun``, which all call the same methods.
        mask_token_id, block_length: override or complete config.json.
        family: the family, if config.json does not determine it.
        adapter: folder or hub id of a LoRA adapter that is merged; of some families, it is a ``draft_adapter``.
        draft_adapter: likewise, that only draft queries go through (:mod:`~s2d2_lmeval.families.drafts`).
        from_pretrained: more arguments of ``from_pretrained``. No remote code is ever run: ``trust_remote_code`` is
            accepted, because existing commands pass it, but has no effect.

    Returns:
        The model, with a configuration of its own, and its facts.

    Raises:
        CheckpointError: if the checkpoint is unusable, with the reason in one sentence.
    """
    source = resolve(source)
    from_pretrained |= {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    hub = {name: from_pretrained[name] for name in HUB_OPTIONS if name in from_pretrained}
    placed = _placement(device, device_map) if tp_plan is None else "auto"
    asked_dtype = _dtype(dtype)
    overrides = {"mask_token_id": mask_token_id, "block_length": block_length}
    chosen, native, facts = described(source, hub, family, (adapter, draft_adapter), overrides)
    if facts.block_length_from == "assumed":
        warnings.warn(f"{source}: {facts.caveat}.", stacklevel=2)
    mark(native, facts)
    quantized = bool(quantization_config) or quantization_of(native) is not None
    files = weight_files(source, from_pretrained.get("variant"), **hub)
    _check_stored(source, chosen, native, stored_weights(files, quantized=quantized))
    from_pretrained["dtype"] = torch.float32 if asked_dtype == "auto" and _on_cpu(placed) else asked_dtype
    beside: dict[str, Any] = {"device": device, "device_map": device_map, "adapter": adapter or draft_adapter}
    beside["quantized weights"] = quantized
    from_pretrained |= {"device_map": placed} if tp_plan is None else _divided(source, native, tp_plan, beside)
    model = _load(chosen, source, {**from_pretrained, "config": native, "quantization_config": quantization_config})
    _add_adapters(model, chosen, facts, files, _of_adapters(hub))
    return model, facts


def checkpoint_facts(
    source: str | Path,
    revision: str | None = None,
    *,
    mask_token_id: int | None = None,
    block_length: int | None = None,
    family: str | None = None,
    adapter: str | Path | None = None,
    draft_adapter: str | Path | None = None,
    **hub: Any,
) -> Facts:
    """The facts of a checkpoint from its small files alone; arguments and errors as in :func:`load_checkpoint`."""
    overrides = {"mask_token_id": mask_token_id, "block_length": block_length}
    adapters = adapter, draft_adapter
    return described(resolve(source), {**hub, "revision": revision}, family, adapters, overrides)[2]


def described(
    source: str,
    hub: Mapping[str, Any],
    family: str | None,
    adapters: tuple[str | Path | None, str | Path | None],
    overrides: dict[str, int | None],
) -> tuple[Family, PreTrainedConfig, Facts]:
    """The family, native configuration and facts of a checkpoint; ``adapters`` are that to merge and that for drafts,
    ``overrides`` its mask token and block length.
    """
    config = read_config(source, **hub)
    chosen = identify(config, source, family, overrides["block_length"])
    native = chosen.native_config(config)
    small = ["generation_config.json"]
    if overrides["block_length"] is None and not names_block_length(config) and not chosen.fixed_block_length:
        small += TRAINING_FILES
    if overrides["mask_token_id"] is None and not names_mask(config) and chosen.scheme != AUTOREGRESSIVE:
        small += TOKENIZER_FILES
    found = {name: read_json(source, name, **hub) for name in small}
    records = {name: record for name, record in found.items() if record is not None}
    merged, draft = adapters
    if chosen.prefix_causal and merged is not None:
        if draft is not None:
            raise ConfigError(f"adapter and draft_adapter: give one; that of {chosen.name} is for draft queries alone.")
        merged, draft = None, merged
    if merged is not None:
        config = {**config, ADAPTER_FIELD: str(merged)}
    facts = chosen.facts(config, native, records, source=source, **overrides)
    if draft is not None:
        facts = facts.with_draft_adapter(what_drafts(draft, chosen, native, _of_adapters(hub)))
    return chosen, native, facts


def _add_adapters(
    model: PreTrainedModel, family: Family, facts: Facts, files: Iterable[Path], hub: Mapping[str, Any]
) -> None:
    """What the facts say beside the weights, which come from ``files``."""
    if facts.adapter is not None:
        merge_adapter(model, family, facts.adapter, **hub)
    if facts.draft_adapter is not None:
        check_base(facts.draft_adapter, files, model.name_or_path)
        where, options = place_of(facts.draft_adapter.source, hub)
        keep_adapter(model, family, where, **options)


def _of_adapters(hub: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hub.items() if name not in _OF_THE_BASE}


def _placement(device: str | torch.device | None, device_map: Any) -> Any:
    """The ``device_map`` of from_pretrained; None for the CPU."""
    if device is not None and device_map is not None:
        raise CheckpointError("device and device_map both say where the model goes; give one of them.")
    if device_map is not None:
        return device_map
    asked = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    placed = usable_device(asked)
    return None if placed.type == "cpu" else {"": placed}


def _divided(source: str, native: PreTrainedConfig, tp_plan: Any, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Every layer divided among the processes of this run, by transformers' plan for the class; nothing ``beside``.

    Raises:
        ConfigError: this run, this release of transformers or this checkpoint cannot be divided so.
    """
    if tp_plan != "auto":
        raise ConfigError(f"tp_plan={shown(tp_plan)}: only auto is known here, transformers' plan for the class.")
    other = next((name for name, given in beside.items() if given), None)
    if other is not None:
        raise ConfigError(f"tp_plan and {other}: give one of them. Every rank has its part of each plain weight.")
    ranks = launched()
    if ranks == 1:
        raise ConfigError(
            "tp_plan=auto divides a model among processes: start one for each GPU with torchrun --nproc-per-node N."
        )
    if "tp_plan" not in DistributedConfig.__dataclass_fields__:
        raise ConfigError("tp_plan=auto needs a newer transformers, with DistributedConfig(tp_plan=…); upgrade it.")
    experts = "moe_intermediate_size" if getattr(native, "num_experts_per_tok", None) else "num_key_value_heads"
    for name in ("num_attention_heads", "num_key_value_heads", experts):
        if getattr(native, name) % ranks:
            raise ConfigError(
                f"{source} has {name}={getattr(native, name)}, which {ranks} processes cannot divide evenly; start a "
                "number of processes that divides it."
            )
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: no such device, here or anywhere.
    """
    try:
        placed = torch.device(device)
        torch.empty(1, device=placed)
        if placed.type != "meta":
            return placed
    except (RuntimeError, AssertionError, TypeError, ImportError, NotImplementedError):
        pass
    raise ConfigError(f"device={device} is not the name of a device that works here; use cuda, cuda:0 or cpu.")


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, str) and dtype == "auto":
        return dtype
    for known in _DTYPES:
        if dtype in (known, str(known), str(known).removeprefix("torch.")):
            return known
    raise CheckpointError(
        f"dtype {str(dtype)!r} is not a type that models are computed in; try auto, float32, bfloat16 or float16."
    )


def _on_cpu(device_map: Any) -> bool:
    if device_map is None:
        return True
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return not torch.cuda.is_available()
    places = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    return all(str(place) in ("cpu", "disk") for place in places)


def _load(family: Family, source: str, arguments: Mapping[str, Any]) -> PreTrainedModel:
    native_class = getattr(transformers, family.native_class)
    # The error says in one line what transformers has a table for, which alone names failed conversions.
    with without_messages("transformers.modeling_utils", "LOAD REPORT") as reports:
        try:
            model, info = native_class.from_pretrained(
                source,
                key_mapping=dict(family.key_mapping) or None,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **arguments,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # transformers' own refusals are many: packages, devices, quantizers
            plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(reports))
            conversions = re.findall(r"^(\S+)\s*\|\s*CONVERSION", plain, re.MULTILINE)
            if conversions:
                what = f"does not fit {family.native_class}: {_some('weights of the wrong shape', conversions)}"
            else:
                what = f"cannot be loaded as {family.native_class}: {first_line(error).rstrip('. ')}"
            raise CheckpointError(f"{source} {what}.") from None
    check_fit(family, source, info)
    _check_head(source, model)
    return model.eval()


def _check_stored(source: str, family: Family, native: PreTrainedConfig, weights: Mapping[str, Stored]) -> None:
    """Refuse a configuration whose size differs from its weights, before building a model of that size; and a
    quantization that transformers would misread.
    """
    stored = sum(math.prod(weight.shape) for weight in weights.values())
    native_class = getattr(transformers, family.native_class)
    model = skeleton(source, native.num_hidden_layers, len(weights), lambda: native_class._from_config(native))
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > _PACKED * stored:
        raise CheckpointError(
            f"{source}: config.json describes {described} parameters, but the weights are {stored} numbers."
        )
    quantization = quantization_of(native)
    if quantization is not None:
        check_blocks(source, quantization, weights)
        native.quantization_config = with_native_names(quantization, family)


def check_fit(family: Family, source: str, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of which ``from_pretrained`` says (``output_loading_info``) that its weights do not fit."""
    wrong = [f"{name} (has {list(has)}, needs {list(needs)})" for name, has, needs in sorted(info["mismatched_keys"])]
    complaints = [
        _some(kind, names)
        for kind, names in (
            ("missing weights", sorted(info["missing_keys"])),
            ("weights it has no place for", sorted(info["unexpected_keys"])),
            ("weights of the wrong shape", wrong),
        )
        if names
    ]
    if complaints:
        raise CheckpointError(f"{source} does not fit {family.native_class}: {'; '.join(complaints)}.")


def _check_head(source: str, model: PreTrainedModel) -> None:
    """transformers keeps a head of its own that contradicts the configuration; older releases dropped it."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and head is not embedding and not (head.is_meta or embedding.is_meta):
        raise CheckpointError(
            f"{source}: config.json says that the head is the embedding, but lm_head.weight is another matrix. Set "
            "tie_word_embeddings to false in config.json, or remove that weight."
        )


def _some(kind: str, names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{kind}: {', '.join(names[:_SHOWN])}{more}"
