"""Adapters that make a model draft for itself: what their folder says of the draft, and what the draft's masks are.

A LoRA as the package peft writes it, and beside it ``s2d2_draft.json``, such as ::

    {"window": 8, "sight": "both", "base": "…"}

``window`` is how many positions a draft looks ahead, as the option; ``sight`` whether masks see each other (``both``)
or earlier ones only (``causal``); ``base`` the digest of the weights that it was trained on (optional). Masks are the
checkpoint's own, or random tokens of ``noise`` [low, high), or vectors, one for each place in a window, in
``s2d2_draft.safetensors``. Uno's adapters (arXiv 2609.04010) have no such file; their form is the
published one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from s2d2_lmeval.errors import CheckpointError, shown
from s2d2_lmeval.families.config_map import is_whole
from s2d2_lmeval.families.facts import DraftAdapter, Family
from s2d2_lmeval.families.files import find, read_json, resolve, stored_weights

RECORD, VECTORS = "s2d2_draft.json", "s2d2_draft.safetensors"
MASKS = "masks"
"""The tensor (places, hidden size) of the vectors' file."""
SIGHTS = {"both": False, "causal": True}
_FIELDS = {"window", "sight", "noise", "base"}
_UNO_WINDOW = 16
_UNO_NOISE = {151936: (1, 151669), 250624: (1, 250624)}  # vocabulary -> random tokens of the published adapters
_SAMPLED = 64  # numbers of a weight that the digest of a base looks at, at each of three places


def place_of(source: str | Path, hub: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where an adapter's files are: the folder or hub id, and its options; Uno's are in a subfolder ``adapter``."""
    found, hub = resolve(source), dict(hub)
    for options in (hub, hub | {"subfolder": "adapter"}):
        if find(found, "adapter_config.json", options) is not None:
            return found, options
    raise CheckpointError(f"{source} holds no adapter_config.json, so it is not an adapter.")


def what_drafts(source: str | Path, family: Family, native: PreTrainedConfig, hub: Mapping[str, Any]) -> DraftAdapter:
    """What an adapter for the draft queries of a model of ``family`` says of itself.

    Raises:
        CheckpointError: it is none, or says what cannot be.
    """
    where, options = place_of(source, hub)
    record, vocabulary = read_json(where, RECORD, **options), int(native.vocab_size)
    has_vectors = find(where, VECTORS, options) is not None
    if record is not None:
        return _recorded(str(source), record, family, vocabulary, has_vectors)
    if family.has_masks:
        return DraftAdapter(str(source))
    if vocabulary not in _UNO_NOISE:
        raise CheckpointError(
            f"the adapter {source} holds no {RECORD}, which says what it drafts from; write one, such as "
            '{"window": 16, "sight": "causal", "noise": [1, 1000]} for an adapter in the form of Uno.'
        )
    return DraftAdapter(str(source), _UNO_WINDOW, True, _UNO_NOISE[vocabulary])


def _recorded(
    source: str, record: Mapping[str, Any], family: Family, vocabulary: int, has_vectors: bool
) -> DraftAdapter:
    def refused(what: str) -> CheckpointError:
        return CheckpointError(f"the adapter {source}: {RECORD} {what}.")

    unknown = sorted(record.keys() - _FIELDS)
    if unknown:
        raise refused(f"says {unknown[0]}, which is not known here; update s2d2-lmeval")
    window, sight, noise = record.get("window"), record.get("sight", "both"), record.get("noise")
    if not is_whole(window, 2):
        raise refused(f"says window={shown(window)}; a whole number of positions is needed, 2 or more")
    if sight not in SIGHTS:
        raise refused(f"says sight={shown(sight)}; it is both or causal")
    if noise is not None:
        if not (isinstance(noise, list) and len(noise) == 2 and all(is_whole(one, 0, vocabulary) for one in noise)):
            raise refused(f"says noise={shown(noise)}; two token ids of a vocabulary of {vocabulary} are needed")
        if noise[0] >= noise[1] or has_vectors:
            raise refused("says noise without a token in it, or beside vectors of masks")
    elif not (has_vectors or family.has_masks):
        raise refused(f"says no noise, there is no {VECTORS}, and {family.name} has no mask token: it cannot draft")
    base = record.get("base")
    if base is not None and not isinstance(base, str):
        raise refused(f"says base={shown(base)}; a digest is needed, or nothing")
    return DraftAdapter(source, window, SIGHTS[sight], None if noise is None else (noise[0], noise[1]), base)


def mask_vectors(model: PreTrainedModel, source: str, **hub: Any) -> torch.Tensor | None:
    """The vectors (places, hidden size) of an adapter's masks, if it has such.

    Raises:
        CheckpointError: vectors for another model.
    """
    path = find(source, VECTORS, hub)
    if path is None:
        return None
    stored_weights([path])
    tensors, hidden = load_file(path), model.get_input_embeddings().weight.shape[1]
    vectors = tensors.get(MASKS)
    if vectors is None or len(tensors) > 1 or vectors.dim() != 2 or vectors.shape[1] != hidden or not len(vectors):
        has = {name: list(one.shape) for name, one in sorted(tensors.items())}
        raise CheckpointError(
            f"the adapter {source} does not fit this model: {VECTORS} holds {shown(has)}, and needed is {MASKS} "
            f"[places, {hidden}]. Load the base model that it was trained on."
        )
    return vectors


def check_base(adapter: DraftAdapter, files: Iterable[Path], source: str) -> None:
    """Refuse an adapter that was trained on other weights than those in ``files``; CheckpointError."""
    if adapter.base is not None and adapter.base != digest(files):
        raise CheckpointError(
            f"the adapter {adapter.source} was trained on other weights than those of {source}. Load its own base "
            f'model; or remove "base" from {RECORD}: answers stay right, but fewer drafts may be accepted.'
        )


def digest(files: Iterable[Path]) -> str:
    """A digest of a checkpoint's weights, of numbers at three places of each, whatever files they are divided among."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                weight = tensors.get_slice(name)
                shape = weight.get_shape()
                rows = shape[0] if shape else 0
                parts = [weight[at : at + 1].flatten()[:_SAMPLED] for at in {0: 0, rows // 2: 0, max(rows - 1, 0): 0}]
                values = torch.cat([part.float() for part in parts]).numpy().tobytes() if rows else b""
                found[name] = f"{name}{shape}".encode() + values
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()
