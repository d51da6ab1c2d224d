"""From a published config.json to the configuration of a native transformers class."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from transformers import PreTrainedConfig, Qwen2Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
MOST_LAYERS = 10_000
_LARGEST = 1 << 40
_DTYPES = ("float32", "bfloat16", "float16", "float64")
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
        _check_known("dtype", dtype, _DTYPES)
    _check_known("hidden_act", fields.get("hidden_act", "silu"), ACT2FN)
    if not isinstance(fields.get("quantization_config", {}), Mapping):
        raise CheckpointError("config.json says something else than an object as quantization_config.")
    fields.update(tie_word_embeddings=bool(config.get(tied, False)), rope_parameters=_rope(config), **fixed)
    _check_heads(fields)
    _check_experts(fields)
    return configured(native, fields)


def qwen2(config: Mapping[str, Any]) -> Qwen2Config:
    """Qwen2's configuration from one that names its fields as transformers does."""
    return translate(config, Qwen2Config, SIZES, optional=("hidden_act",), assumes=NO_WINDOW)


def configured(native: type[Config], fields: Mapping[str, Any]) -> Config:
    """A native configuration of fields under native names; CheckpointError where transformers refuses one of them."""
    for name, most in (
        ("num_hidden_layers", MOST_LAYERS),
        ("vocab_size", _LARGEST),
        ("max_position_embeddings", _LARGEST),
    ):
        if name in fields and not is_whole(fields[name], 1, most):
            raise CheckpointError(
                f"config.json says {name}={fields[name]!r}; a positive integer up to {most} is needed."
            )
    try:
        # A language model has no labels, and transformers would write a name for each.
        return native.from_dict({name: value for name, value in fields.items() if name != "num_labels"})
    except Exception as error:  # transformers checks some fields, and falls over others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"config.json does not describe a {native.__name__}: {reason}") from None


def is_whole(value: Any, least: int, most: int | None = None) -> TypeGuard[int]:
    """Whether a value is an integer in that range; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _positive(config: Mapping[str, Any], name: str) -> int | float:
    if config.get(name) is None:
        raise CheckpointError(f"config.json lacks {name!r}.")
    value = config[name]
    integral = not name.endswith("_eps")
    if not (is_whole(value, 1) if integral else is_number(value) and value > 0):
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
    if fields.get("decoder_sparse_step", 1) < 1:
        raise CheckpointError("config.json says decoder_sparse_step=0; a positive integer is needed.")


def _check_known(name: str, value: Any, known: Collection[str]) -> None:
    if value not in tuple(known):
        raise CheckpointError(f"config.json says {name}={value!r}; known are {', '.join(sorted(known))}.")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling next to each other.
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json says rope_scaling={given!r}; an object is needed.")
    rope = dict(given)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    _check_known("rope_type", rope["rope_type"], {"default", *ROPE_INIT_FUNCTIONS})
    for name in ("rope_theta", "partial_rotary_factor"):
        if config.get(name) is not None:
            rope.setdefault(name, config[name])
    theta = rope.get("rope_theta")
    if not is_number(theta) or theta <= 0:
        raise CheckpointError(f"config.json says rope_theta={theta!r}; a positive number is needed.")
    part = rope.get("partial_rotary_factor", 1.0)
    if not is_number(part) or not 0 < part <= 1:
        raise CheckpointError(f"config.json says partial_rotary_factor={part!r}; a share from 0 to 1 is needed.")
    return rope
