"""From a published config.json to the configuration of a native transformers class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, Qwen2Config

from s2d2_lmeval.errors import CheckpointError

Config = TypeVar("Config", bound=PreTrainedConfig)

# What every decoder-only transformer has under the names that transformers uses.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
# Some published code has the switch, but no checkpoint uses it; a window would not fit one attention for all.
NO_WINDOW = {"use_sliding_window": False}
# Says nothing about the arithmetic, but loading and tokenizing want it.
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")


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
    fields.update({name: config[name] for name in optional if config.get(name) is not None})
    fields.update({name: config[name] for name in _CARRIED if config.get(name) is not None})
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        fields["dtype"] = dtype
    fields.update(tie_word_embeddings=bool(config.get(tied, False)), rope_parameters=_rope(config), **fixed)
    _check_heads(fields)
    return configured(native, fields)


def qwen2(config: Mapping[str, Any]) -> Qwen2Config:
    """Qwen2's configuration from one that names its fields as transformers does."""
    return translate(config, Qwen2Config, SIZES, optional=("hidden_act",), assumes=NO_WINDOW)


def configured(native: type[Config], fields: Mapping[str, Any]) -> Config:
    """A native configuration of fields under native names; CheckpointError where transformers refuses one of them."""
    try:
        return native.from_dict(dict(fields))
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json does not describe a {native.__name__}: {reason}") from None


_WINDOWS = ("sliding_window", "attention_chunk_size")


def refuse_partial_attention(config: Mapping[str, Any]) -> None:
    """Refuse a target of drafts some of whose layers do not attend to everything before them.

    Raises:
        CheckpointError: naming the field of config.json.
    """
    reason = "a draft tree isolates its branches by an attention mask, which takes full attention in every layer"
    others = sorted({str(kind) for kind in config.get("layer_types") or () if kind != "full_attention"})
    if others:
        raise CheckpointError(f"config.json has layers of type {', '.join(others)}: {reason}.")
    for name in _WINDOWS:
        switched_off = name == "sliding_window" and config.get("use_sliding_window") is False
        if config.get(name) is not None and not switched_off:
            raise CheckpointError(f"config.json says {name}={config[name]!r}: {reason}.")


def _positive(config: Mapping[str, Any], name: str) -> int | float:
    if config.get(name) is None:
        raise CheckpointError(f"config.json lacks {name!r}.")
    value = config[name]
    integral = not name.endswith("_eps")
    if isinstance(value, bool) or not isinstance(value, int if integral else (int, float)) or value <= 0:
        kind = "integer" if integral else "number"
        raise CheckpointError(f"config.json says {name}={value!r}; a positive {kind} is needed.")
    return value


def _check_heads(fields: Mapping[str, Any]) -> None:
    heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % groups:
        raise CheckpointError(
            f"config.json says {heads} attention heads and {groups} key-value heads; the former must be a multiple."
        )
    if "head_dim" not in fields and fields["hidden_size"] % heads:
        raise CheckpointError(
            f"config.json says a hidden size of {fields['hidden_size']} and {heads} heads; "
            "the former must be a multiple."
        )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling next to each other.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    for name in ("rope_theta", "partial_rotary_factor"):
        if config.get(name) is not None:
            rope.setdefault(name, config[name])
    theta = rope.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise CheckpointError(f"config.json says rope_theta={theta!r}; a positive number is needed.")
    return rope
