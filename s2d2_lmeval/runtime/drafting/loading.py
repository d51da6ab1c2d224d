"""Published drafters (DFlash, DFlash 2, DSpark, Domino): their config.json, their weights, and if they fit a target."""

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
from s2d2_lmeval.runtime.drafting.heads import MARKOV, HeadShape
from s2d2_lmeval.toy import embedded

DEFAULT_BLOCK_LENGTH = 16
_CONVOLUTION = ("conv_kernel_size", "conv_group_size")
_SELECTOR = ("selector_rank", "selector_top_k")
_DOMINO = ("emb_dim", "gru_hidden_dim")
_UNREAD = ("confidence_head.", "embed_tokens.", "lm_head.")
"""Weights beside a head that drafting does not need: when to verify less, and copies of the target's."""


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
    if shape.head is not None or shape.shifted:
        stored = {name: one for name, one in stored.items() if not name.startswith(_UNREAD)}
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

    if own.get("attention_sink_bias"):
        raise CheckpointError(f"{source} is a drafter with attention sinks, which is not DFlash.")
    projector, known = own.get("projector_type"), str(config.get("architectures"))
    if projector not in (None, "dspark", "domino"):
        raise CheckpointError(f"{source} is a drafter with the projector {projector!r}, which is not DFlash.")
    spark = "DSpark" in known or projector == "dspark"
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
        ("pure_draft_prefix_len", is_whole(value("pure_draft_prefix_len") or 0, 0)),
    ):
        if not fine:
            raise CheckpointError(f"{source}: config.json says {name}={value(name)!r}, which no drafter has.")
    sliding = [kind == "sliding_attention" or bool(own.get("use_swa")) for kind in kinds]
    if any(sliding) and window is None:
        raise CheckpointError(f"{source}: config.json has layers of sliding_attention but no sliding_window.")
    # Domino's masks look ahead unless they are told not to; others' windows are causal unless they are told.
    causal = own.get("causal", config.get("is_causal", False if projector == "domino" else None))
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
        head=_head(value, projector, source),
        convolution=_convolution(value, config, source),
    )


def _head(value: Any, projector: str | None, source: str) -> HeadShape | None:
    """Which head config.json says that there is; CheckpointError where it is not one of those known."""
    found = []
    if rank := value("markov_rank"):
        kind = value("markov_head_type") or MARKOV[0]
        if kind not in MARKOV:
            raise CheckpointError(
                f"{source} has a Markov head of the kind {kind!r}; those that are loaded here are {', '.join(MARKOV)}."
            )
        found.append(HeadShape(kind, rank))
    if selector := _sizes(value, _SELECTOR, "a candidate selector (DFlash 2)", source):
        found.append(HeadShape("selector", selector[0], choices=selector[1]))
    if projector == "domino":
        rank, state = _sizes(value, _DOMINO, "a Domino head", source, needed=True)
        found.append(HeadShape("domino", rank, state, value("pure_draft_prefix_len") or 0))
    elif value("pure_draft_prefix_len"):
        raise CheckpointError(f"{source} is a drafter with a prefix of its own but no Domino head, which is not known.")
    if len(found) > 1:
        kinds = " and ".join(head.kind for head in found)
        raise CheckpointError(f"{source} has several heads ({kinds}); drafters with one are loaded here.")
    return found[0] if found else None


def _convolution(value: Any, config: Mapping[str, Any], source: str) -> tuple[int, int] | None:
    sizes = _sizes(value, _CONVOLUTION, "convolutions (DFlash 2)", source)
    if not sizes:
        return None
    taps, group = sizes
    if not is_whole(config.get("hidden_size"), 1) or config["hidden_size"] % group:
        raise CheckpointError(f"{source}: config.json says conv_group_size={group}, which does not divide hidden_size.")
    return taps, group


def _sizes(value: Any, names: tuple[str, ...], of: str, source: str, needed: bool = False) -> tuple[int, ...]:
    """The sizes ``names`` of a part; nothing without any of them, where it is not ``needed``."""
    sizes = tuple(value(name) for name in names)
    if not needed and not any(sizes):
        return ()
    if not all(is_whole(size, 1) for size in sizes):
        raise CheckpointError(f"{source} has {of}, for which config.json must name {' and '.join(names)}.")
    return sizes


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
