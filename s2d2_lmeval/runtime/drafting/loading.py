"""Published DFlash and DSpark drafters: what their config.json says, their weights, and whether they fit a target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3Config

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families.config_map import MOST_LAYERS, configured, is_number, is_whole
from s2d2_lmeval.families.files import misfit, read_config, resolve, skeleton, stored_weights, weight_files
from s2d2_lmeval.runtime.drafting.dflash import DFlash, DrafterShape
from s2d2_lmeval.runtime.drafting.heads import KINDS
from s2d2_lmeval.toy import embedded

DEFAULT_BLOCK_LENGTH = 16
_DFLASH2 = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_SUCCESSORS = {
    "attention_sink_bias": "attention sinks",
    "pure_draft_prefix_len": "a prefix of its own",
}
_UNREAD = ("confidence_head.", "embed_tokens.", "lm_head.")
"""Weights of DSpark that drafting does not need: when to verify less, and copies of the target's."""


def load_drafter(source: str | Path, target: PreTrainedModel, **hub: Any) -> DFlash:
    """Load a DFlash drafter beside its target, on the target's device and in its type.

    Args:
        source: folder, hub id, or ``"toy"`` (the drafter of the embedded model).
        hub: as for a checkpoint (``token``, ``cache_dir``, ``local_files_only``, …).

    Raises:
        CheckpointError: no DFlash drafter there, another kind of drafter, or one for another target.
    """
    source = resolve(embedded(source, drafter=True))
    shape = drafter_shape(read_config(source, **hub), source)
    check_fit(shape, target, source)
    files = weight_files(source, **hub)
    stored = stored_weights(files)
    if shape.markov is not None or shape.shifted:
        stored = {name: one for name, one in stored.items() if not name.startswith(_UNREAD)}
    if any(".attention_conv." in name or name.startswith("candidate_selector.") for name in stored):
        raise _is_dflash2(source)
    described = skeleton(source, shape.config.num_hidden_layers, len(stored), lambda: DFlash(shape)).state_dict()
    shapes = [{name: one.shape for name, one in of.items()} for of in (stored, described)]
    if wrong := misfit(*shapes):
        raise CheckpointError(f"{source} does not hold the weights of a DFlash drafter: {wrong}.")
    weights = {name: tensor for file in files for name, tensor in load_file(file).items() if name in stored}
    # Whoever samples by the global generator gets the same draws whether the drafter was loaded before or not.
    with torch.random.fork_rng(devices=[]):
        drafter = DFlash(shape).to(target.dtype)
    drafter.load_state_dict(weights)
    head = target.get_output_embeddings().weight
    return drafter.to(head.device).eval().requires_grad_(False).attach(target)


def drafter_shape(config: Mapping[str, Any], source: str) -> DrafterShape:
    """Read a published config.json; CheckpointError where it is not a DFlash drafter's, or one of more than that."""
    own = config.get("dflash_config") or {}
    if not isinstance(own, Mapping):
        raise CheckpointError(f"{source}: config.json says dflash_config={own!r}; an object is needed.")

    def value(name: str, default: Any = None) -> Any:
        return own.get(name, config.get(name, default))

    if "DFlash2DraftModel" in str(config.get("architectures")) or any(value(name) for name in _DFLASH2):
        raise _is_dflash2(source)
    for name, what in _SUCCESSORS.items():
        if own.get(name):
            raise CheckpointError(f"{source} is a drafter with {what} ({name}={own[name]!r}), which is not DFlash.")
    spark = "DSpark" in str(config.get("architectures")) or own.get("projector_type") == "dspark"
    if not spark and own.get("projector_type"):
        raise CheckpointError(
            f"{source} is a drafter with the projector {own['projector_type']!r}, which is not DFlash."
        )
    layers, mask = config.get("num_hidden_layers"), value("mask_token_id")
    if not is_whole(layers, 1, MOST_LAYERS) or not is_whole(mask, 0) or not _names_layers(config, value):
        raise CheckpointError(
            f"{source} is not a DFlash drafter: its config.json must name num_hidden_layers, mask_token_id and "
            "target_layer_ids or num_target_layers (in dflash_config)."
        )
    kinds = config.get("layer_types") or ["full_attention"] * layers
    window, cap = own.get("swa_window_size") or config.get("sliding_window"), value("final_logit_softcapping")
    for name, fine in (
        ("layer_types", isinstance(kinds, list) and len(kinds) == layers),
        ("block_size", is_whole(value("block_size", DEFAULT_BLOCK_LENGTH), 1)),
        ("sliding_window", window is None or is_whole(window, 1)),
        *((name, is_number(value(name, 1.0))) for name in ("input_embedding_scale", "output_multiplier")),
        ("final_logit_softcapping", cap is None or is_number(cap)),
        ("markov_rank", is_whole(value("markov_rank") or 0, 0)),
    ):
        if not fine:
            raise CheckpointError(f"{source}: config.json says {name}={value(name)!r}, which no drafter has.")
    sliding = [kind == "sliding_attention" or bool(own.get("use_swa")) for kind in kinds]
    if any(sliding) and window is None:
        raise CheckpointError(f"{source}: config.json has layers of sliding_attention but no sliding_window.")
    causal = own.get("causal", config.get("is_causal"))
    fields = {**config, "layer_types": ["full_attention"] * layers, "use_sliding_window": False}
    fields |= {"model_type": "qwen3", "sliding_window": None}
    return DrafterShape(
        config=configured(Qwen3Config, fields),
        block_length=value("block_size", DEFAULT_BLOCK_LENGTH),
        mask_token_id=mask,
        layer_ids=tuple(value("target_layer_ids") or default_layer_ids(layers, config["num_target_layers"])),
        windows=tuple(window if slides else None for slides in sliding),
        causal=tuple(slides if causal is None else bool(causal) for slides in sliding),
        embedding_scale=float(value("input_embedding_scale", 1.0)),
        logit_scale=float(value("output_multiplier", 1.0)),
        softcap=cap,
        shifted=bool(own.get("shift_label", value("sample_from_anchor", spark))),
        markov=_markov(value, source),
    )


def _markov(value: Any, source: str) -> tuple[int, str] | None:
    rank, kind = value("markov_rank"), value("markov_head_type") or KINDS[0]
    if rank and kind not in KINDS:
        raise CheckpointError(
            f"{source} has a Markov head of the kind {kind!r}; those that are loaded here know one token before "
            f"({' and '.join(KINDS)})."
        )
    return (rank, kind) if rank else None


def _names_layers(config: Mapping[str, Any], value: Any) -> bool:
    ids = value("target_layer_ids")
    if ids:
        return isinstance(ids, list) and all(is_whole(one, 0) for one in ids)
    return is_whole(config.get("num_target_layers"), 1, MOST_LAYERS)


def default_layer_ids(drafter_layers: int, target_layers: int) -> list[int]:
    """The target's layers that are read where config.json names none: evenly from the second to the third last."""
    if drafter_layers == 1:
        return [target_layers // 2]
    return [round(1 + i * (target_layers - 4) / (drafter_layers - 1)) for i in range(drafter_layers)]


def check_fit(shape: DrafterShape, target: PreTrainedModel, source: str) -> None:
    """Refuse a drafter that was made for another target; CheckpointError says what differs."""
    wants, has, layers = shape.config, target.config, target.config.num_hidden_layers
    made_for, mask = getattr(wants, "num_target_layers", None), shape.mask_token_id
    beyond = next((index for index in shape.layer_ids if not 0 <= index < layers), None)
    for wrong, reason in (
        (
            wants.hidden_size != has.hidden_size,
            f"it reads hidden states of size {wants.hidden_size}, and the target's are {has.hidden_size}",
        ),
        (made_for not in (None, layers), f"it was made for {made_for} layers, and the target has {layers}"),
        (beyond is not None, f"it reads layer {beyond}, and the target has {layers} (from 0)"),
        (
            wants.vocab_size != has.vocab_size,
            f"its vocabulary has {wants.vocab_size} tokens, and the target's {has.vocab_size}",
        ),
        (not 0 <= mask < has.vocab_size, f"its mask token id {mask} is not in the vocabulary of {has.vocab_size}"),
        (shape.facts.block_length < 2, f"a block of {shape.block_length} drafts nothing"),
    ):
        if wrong:
            raise CheckpointError(
                f"the drafter {source} does not fit this target: {reason}. Give the drafter made for it."
            )


def _is_dflash2(source: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is a DFlash2 drafter (local convolutions and a candidate selector), another architecture than "
        "DFlash, and cannot be loaded here. Give a DFlash drafter of the same target."
    )
