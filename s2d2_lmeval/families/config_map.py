"""From a published config.json to the configuration of a native transformers class, and the context that it allows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from transformers import PreTrainedConfig, Qwen2Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from s2d2_lmeval.errors import CheckpointError

Config = TypeVar("Config", bound=PreTrainedConfig)

# What every decoder-only transformer has under the names that transformers uses.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)
# Some published code has the switch, but no checkpoint uses it; a window would not fit one attention for all.
NO_WINDOW = {"use_sliding_window": False}
MOST_LAYERS = 10_000
_LARGEST = 1 << 40
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# Says nothing about the arithmetic, but loading and tokenizing want it.
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
_BY_LENGTH = ("dynamic", "longrope")
_FULL = {"full_attention", "sliding_attention"}


def translate(
    config: Mapping[str, Any],
    native: type[Config],
    sizes: Mapping[str, str] | Sequence[str],
    *,
    optional: Sequence[str] = (),
    assumes: Mapping[str, Any] | None = None,
    tied: str = "tie_word_embeddings",
    **fixed: Any,
) -> Config:
    """Builds the native configuration from the published one.

    Args:
        sizes: required positive numbers, native name -> published name (or names that are the same in both).
        optional: names that are the same in both and have a native default.
        assumes: published fields that the native class has no switch for -> the only value it computes.
        tied: published name of "the head is the embedding".
        fixed: native fields that the family decides.

    Raises:
        CheckpointError: a required field that is missing or out of range, or a field that the native class cannot
            honour.
    """
    names = sizes if isinstance(sizes, Mapping) else {name: name for name in sizes}
    for name, value in (assumes or {}).items():
        if config.get(name) not in (None, value):
            raise CheckpointError(
                f"config.json says {name}={config[name]!r}; {native.__name__} computes {name}={value!r} only, so "
                "this checkpoint cannot be run."
            )
    fields: dict[str, Any] = {ours: _positive(config, theirs) for ours, theirs in names.items()}
    fields.update({name: config[name] for name in (*optional, *_CARRIED) if config.get(name) is not None})
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        fields["dtype"] = dtype
        _check_known("dtype", dtype, _DTYPES)
    _check_known("hidden_act", fields.get("hidden_act", "silu"), ACT2FN)
    require(fields, "quantization_config", "an object", isinstance(fields.get("quantization_config", {}), Mapping))
    fields.update(tie_word_embeddings=bool(config.get(tied, False)), rope_parameters=_rope(config), **fixed)
    _check_heads(fields)
    _check_experts(fields)
    return configured(native, fields)


def qwen2(config: Mapping[str, Any]) -> Qwen2Config:
    """Qwen2's configuration from one that names its fields as transformers does."""
    return translate(config, Qwen2Config, SIZES, optional=("hidden_act",), assumes=NO_WINDOW)


def configured(native: type[Config], fields: Mapping[str, Any]) -> Config:
    """A native configuration of fields under native names; CheckpointError where transformers refuses one of them."""
    most = {"num_hidden_layers": MOST_LAYERS, "vocab_size": _LARGEST, "max_position_embeddings": _LARGEST}
    for name in most.keys() & fields.keys():
        require(fields, name, f"a positive integer up to {most[name]}", is_whole(fields[name], 1, most[name]))
    try:
        # A language model has no labels, and transformers would write a name for each.
        return native.from_dict({name: value for name, value in fields.items() if name != "num_labels"})
    except Exception as error:  # transformers checks some fields, and falls over others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"config.json does not describe a {native.__name__}: {reason}") from None


def positions(native: PreTrainedConfig) -> tuple[int, int]:
    """The context that a checkpoint names, and the most that may be asked for.

    The latter is longer under yarn, whose frequencies were stretched to hold ``factor`` times the original context, and
    shorter where layers see a sliding window: they are run with full attention, which is the same inside the window.

    Raises:
        CheckpointError: rotary frequencies that depend on the longest text of a forward, or layers that neither see
            everything nor a window.
    """
    rope = native.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind in _BY_LENGTH:
        raise CheckpointError(
            f"config.json says rope_type={kind!r}, whose frequencies follow the longest text in a forward: an answer "
            "would depend on its neighbours. Evaluate it with `lm_eval --model hf`, one document at a time."
        )
    named = stretched = int(native.max_position_embeddings)
    if kind == "yarn":
        yarn = {"factor": 1.0, "original_max_position_embeddings": named, **rope}
        for name in ("factor", "original_max_position_embeddings"):
            fine = is_number(yarn[name]) and 0 < yarn[name] < _LARGEST
            require(yarn, name, "a positive number (for yarn)", fine)
        stretched = int(yarn["factor"] * yarn["original_max_position_embeddings"])
    return named, int(min(max(named, stretched), _window(native)))


def _window(native: PreTrainedConfig) -> int | float:
    """Positions up to which every layer sees everything before it."""
    kinds = {str(kind) for kind in getattr(native, "layer_types", None) or ()}
    if kinds - _FULL:
        raise CheckpointError(
            f"config.json has layers of type {', '.join(sorted(kinds - _FULL))}, and decoding here takes "
            "layers that see everything before them."
        )
    slides = not kinds or "sliding_attention" in kinds
    names = [*(["sliding_window"] if slides else []), "attention_chunk_size"]
    windows = {name: getattr(native, name) for name in names if getattr(native, name, None) is not None}
    for name, window in windows.items():
        require(windows, name, "a positive integer", is_whole(window, 1))
    return min(windows.values(), default=math.inf)


def is_whole(value: Any, least: int, most: int | None = None) -> TypeGuard[int]:
    """Whether a value is an integer in that range; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def require(config: Mapping[str, Any], name: str, what: str, fine: bool) -> None:
    """Refuse a configuration whose field ``name`` is not ``fine``: CheckpointError says ``what`` is needed."""
    if not fine:
        raise CheckpointError(f"config.json says {name}={config.get(name)!r}; {what} is needed.")


def _positive(config: Mapping[str, Any], name: str) -> int | float:
    value = config.get(name)
    if value is None:
        raise CheckpointError(f"config.json lacks {name!r}.")
    if name.endswith("_eps"):
        require(config, name, "a positive number", is_number(value) and value > 0)
    else:
        require(config, name, "a positive integer", is_whole(value, 1))
    return value


def _check_heads(fields: Mapping[str, Any]) -> None:
    heads, groups, size = (fields[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads % groups:
        raise CheckpointError(
            f"config.json says {heads} attention heads and {groups} key-value heads; the former must be a multiple."
        )
    if "head_dim" not in fields and size % heads:
        raise CheckpointError(
            f"config.json says a hidden size of {size} and {heads} heads; the former must be a multiple."
        )


def _check_experts(fields: Mapping[str, Any]) -> None:
    """That a mixture of experts can choose as many as it says, from as many groups."""
    experts = fields.get("num_experts", fields.get("n_routed_experts"))
    if experts is None:
        return
    groups, open_groups = fields.get("n_group", 1), fields.get("topk_group", 1)
    if experts % groups or open_groups > groups:
        raise CheckpointError(
            f"config.json says {experts} experts in {groups} groups, {open_groups} of which are open: the experts must "
            "be a multiple of the groups, and these at least as many as are open."
        )
    reachable, chosen = experts // groups * open_groups, fields["num_experts_per_tok"]
    if chosen > reachable:
        raise CheckpointError(f"config.json says that each token takes {chosen} of {reachable} experts.")
    require(fields, "decoder_sparse_step", "a positive integer", fields.get("decoder_sparse_step", 1) >= 1)


def _check_known(name: str, value: Any, known: Collection[str]) -> None:
    if value not in tuple(known):
        raise CheckpointError(f"config.json says {name}={value!r}; known are {', '.join(sorted(known))}.")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling next to each other.
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    require({"rope_scaling": given}, "rope_scaling", "an object", isinstance(given, Mapping))
    rope = dict(given)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    _check_known("rope_type", rope["rope_type"], {"default", *ROPE_INIT_FUNCTIONS})
    for name in ("rope_theta", "partial_rotary_factor"):
        if config.get(name) is not None:
            rope.setdefault(name, config[name])
    theta, part = rope.get("rope_theta"), rope.get("partial_rotary_factor", 1.0)
    require(rope, "rope_theta", "a positive number", is_number(theta) and theta > 0)
    require(rope, "partial_rotary_factor", "a share from 0 to 1", is_number(part) and 0 < part <= 1)
    return rope
