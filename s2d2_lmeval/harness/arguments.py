"""What ``--model_args`` may hold, and who gets which of it.

Three readers share one flat list of names: the decoder
(:class:`~s2d2_lmeval.decoding.options.config.DecodingConfig`, or the function given as ``custom_generate``),
:func:`s2d2_lmeval.load`, and the harness's own model class, whose names keep their meaning. A name that none of them
knows is refused with the nearest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.decoding.options.names import changes_nothing, nearest
from s2d2_lmeval.decoding.options.option import LARGEST, converted
from s2d2_lmeval.decoding.options.rounds import DRAFT_SHAPES
from s2d2_lmeval.errors import ConfigError, first_line, shown
from s2d2_lmeval.harness.custom import CustomFunction, load_object
from s2d2_lmeval.runtime.memory import RowLimit

HARNESS = frozenset(
    (
        *("tokenizer", "use_fast_tokenizer", "trust_remote_code", "add_bos_token", "prefix_token_id", "truncation"),
        *("max_length", "think_end_token", "enable_thinking", "chat_template_args", "backend", "special_tokens"),
    )
)
"""Options with the meaning that they have for the harness's ``hf`` models, and ``special_tokens``."""

SPECIAL_TOKENS = ("parse", "text", "refuse")
"""Strings of special tokens in prompts: these tokens, as for ``hf``, but the mask's is text; or all are text; or these
tokens, and a prompt with the mask is refused.
"""

_KINDS = {
    **dict.fromkeys(("use_fast_tokenizer", "trust_remote_code", "add_bos_token", "truncation"), "bool"),
    **dict.fromkeys(("enable_thinking", "static_shapes", "force_download", "local_files_only"), "bool"),
    **dict.fromkeys(("max_length", "prefix_token_id", "max_context", "mask_token_id"), "int"),
}
_TEXTS = {
    **dict.fromkeys(("draft", "revision", "variant", "cache_dir", "offload_folder", "family", "device"), (str, Path)),
    "dtype": (str, torch.dtype),
    "token": (str, bool),
    "think_end_token": (str, int),
    "device_map": (str, dict),
}
LONGEST_TEXT = 1000

PLACEMENT = frozenset(("parallelize", "device_map", "max_memory_per_gpu", "max_cpu_memory", "offload_folder"))
QUANTIZATION = ("load_in_8bit", "load_in_4bit", "bnb_4bit_", "llm_int8_")
RUNTIME = frozenset(("attention", "max_batch", "max_context", "mask_token_id", "static_shapes", "draft", "family"))
HUB = frozenset(("cache_dir", "force_download", "local_files_only", "token", "variant"))
WEIGHTS = frozenset(("dtype", "device", "revision"))

LOADING_SYNONYMS = {"torch_dtype": "dtype", "attn_implementation": "attention"}
"""What transformers calls them, or called them."""
_BACKENDS = {"eager": "sdpa", "flash_attention_2": "flash", "flash_attention_3": "flash"}
"""Attention in transformers' names."""


@dataclass(frozen=True)
class Arguments:
    """``--model_args``, sorted by reader.

    ``source`` is ``pretrained``; ``decoding`` the options of the decoder; ``loading`` the keyword arguments of
    :func:`s2d2_lmeval.load` but for ``max_batch``; ``harness`` those of the harness's model class; ``rows`` how many
        requests are in flight (None: ``max_batch`` was not given, ask :func:`rows_in_flight`).
    """

    source: Any
    decoding: Mapping[str, Any]
    loading: Mapping[str, Any]
    harness: Mapping[str, Any]
    custom: CustomFunction | None = None
    model_class: Callable[..., Any] | None = None
    peft: str | None = None
    log_decoding_order: bool = False
    rows: RowLimit | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


def sort_arguments(pretrained: Any, options: Mapping[str, Any]) -> Arguments:
    """Sort ``options`` (all of ``--model_args`` but ``pretrained``) by reader.

    :raises ConfigError: for a name that nobody knows, an option that this model class does not have, or a missing
        ``pretrained``.
    """
    if _absent(pretrained):
        raise ConfigError("--model_args has no pretrained=…: a folder, a hub id, or toy (the embedded checkpoint).")
    custom = None if _absent(options.get("custom_generate")) else CustomFunction.load(options["custom_generate"])
    decoder_names = custom.option_names if custom else DecodingConfig.option_names()
    check_text("pretrained", pretrained, (str, Path, torch.nn.Module))
    left = _without_synonyms(options, HARNESS | (custom.parameters if custom else frozenset()))
    own = {name: left.pop(name, None) for name in ("custom_generate", "custom_model_class", "peft", "max_batch")}
    log_decoding_order = left.pop("log_decoding_order", None)

    sorted_by_reader: dict[str, dict[str, Any]] = {"decoding": {}, "loading": {}, "harness": {}}
    if custom is None and left.get("draft") in DRAFT_SHAPES:
        # Who drafts, a path, and what is drafted share a short name; the long one is the option's.
        left["draft_shape"] = left.pop("draft")
    for name, value in left.items():
        sorted_by_reader[_reader(name, decoder_names, custom)][name] = value
    _check_harness(sorted_by_reader["harness"])
    check_text("peft", own["peft"], (str, Path))
    loading = sorted_by_reader["loading"]
    _quantization(loading)
    _placement(loading)
    _numbers(loading, sorted_by_reader["decoding"])
    return Arguments(
        source=pretrained,
        custom=custom,
        model_class=_class(own["custom_model_class"]),
        peft=own["peft"],
        log_decoding_order=converted("log_decoding_order", "bool", log_decoding_order or False),
        rows=_limit("max_batch", own["max_batch"]) if own["max_batch"] is not None else None,
        given=dict(options),
        **sorted_by_reader,
    )


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == "")


def _class(spec: Any) -> Any:
    return None if _absent(spec) else spec if callable(spec) else load_object(spec)


def rows_in_flight(batch_size: int | str, max_batch_size: int | None) -> RowLimit:
    """Rows in flight for a harness ``--batch_size``.

    A number is taken as it is. ``auto`` (and ``auto:N``) is as many as memory holds, at most ``max_batch_size``.
    """
    if isinstance(batch_size, str) and batch_size.startswith("auto"):
        return RowLimit("auto", None if max_batch_size is None else _positive("max_batch_size", max_batch_size))
    return _limit("batch_size", batch_size)


def _limit(name: str, value: Any) -> RowLimit:
    return RowLimit("auto") if isinstance(value, str) and value == "auto" else RowLimit(_positive(name, value))


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
        whole = number == float(value)
    except (TypeError, ValueError, OverflowError):
        number, whole = 0, False
    if number < 1 or not whole or isinstance(value, bool):
        said = shown(value).strip("'")
        raise ConfigError(f"{name}={said}: give the number of requests to decode side by side, 1 or more.")
    return number


def _without_synonyms(options: Mapping[str, Any], own: frozenset[str]) -> dict[str, Any]:
    """``options`` under the names they have here, without those of other tools that change nothing; ``own`` names keep
    their meaning, whatever it is elsewhere.

    :raises ConfigError: for one that would, or a name that is given twice.
    """
    named: dict[str, Any] = {}
    for given, value in options.items():
        name = given if given in own else LOADING_SYNONYMS.get(given, given)
        if getattr(value, "shape", ()):
            raise ConfigError(f"{name}={shown(value)} is an array; give plain values.")
        if name not in own and (changes_nothing(name, value) or (value is None and name != given)):
            continue
        if name == "attention" and isinstance(value, str):
            value = _BACKENDS.get(value, value)
        if name in named and named[name] != value:
            raise ConfigError(f"{given} and another name of {name} are given with different values; give one of them.")
        named[name] = value
    return named


def _reader(name: str, decoder_names: Iterable[str], custom: CustomFunction | None) -> str:
    # With a function of one's own its parameters come first: it may name anything.
    if name in decoder_names:
        return "decoding"
    if name in RUNTIME | PLACEMENT | HUB | WEIGHTS or name.startswith(QUANTIZATION):
        return "loading"
    if name in HARNESS:
        return "harness"
    known = [*decoder_names, *RUNTIME, *PLACEMENT, *HUB, *WEIGHTS, *HARNESS, *_OTHERS]
    if custom is not None and name in DecodingConfig.option_names():
        raise ConfigError(
            f"{name} is not a parameter of {custom.name}, which decodes in this run.{nearest(name, decoder_names)}"
        )
    raise ConfigError(f"{name} is not an option of --model s2d2.{nearest(name, known)}")


_OTHERS = (
    *("pretrained", "batch_size", "max_batch_size", "peft"),
    *("custom_generate", "custom_model_class", "log_decoding_order", "load_in_8bit", "load_in_4bit"),
)


def _convert(options: dict[str, Any]) -> None:
    """Values in their types, in place."""
    for name, value in options.items():
        if value is not None and name in _KINDS:
            options[name] = converted(name, _KINDS[name], value)
            if abs(options[name]) > LARGEST:
                raise ConfigError(f"{name}={shown(value)} is too large.")
        elif name in _TEXTS:
            check_text(name, value)


def check_text(name: str, value: Any, kinds: tuple[type, ...] = ()) -> None:
    """Refuse what does not name anything: another type, or a text as long as a page.

    :raises ConfigError: naming the argument.
    """
    fine = value is None or isinstance(value, kinds or _TEXTS[name])
    long = (
        len(str(value)) > LONGEST_TEXT if isinstance(value, (str, Path)) else isinstance(value, int) and value > LARGEST
    )
    if not fine or long:
        raise ConfigError(f"{name}={shown(value)} is not a name or a path.")


def _check_harness(harness: dict[str, Any]) -> None:
    """What the harness's class would find out only after the weights are loaded, or not at all."""
    _convert(harness)
    if harness.get("backend", "default") not in ("default", "causal"):
        raise ConfigError(f"backend={shown(harness['backend'])} is not available with --model s2d2: models are causal.")
    if harness.get("special_tokens") not in (None, *SPECIAL_TOKENS):
        raise ConfigError(
            f"special_tokens={shown(harness['special_tokens'])} is not one of: {', '.join(SPECIAL_TOKENS)}."
        )
    if not isinstance(harness.get("chat_template_args") or {}, Mapping):
        raise ConfigError(f"chat_template_args={shown(harness['chat_template_args'])} is not a mapping.")
    if harness.get("enable_thinking") and harness.get("think_end_token") is None:
        raise ConfigError("enable_thinking=True needs think_end_token=…, the token that ends the reasoning trace.")


def _quantization(loading: dict[str, Any]) -> None:
    """bitsandbytes switches become the ``quantization_config`` that transformers wants."""
    names = [name for name in loading if name.startswith(QUANTIZATION)]
    options = {name: loading.pop(name) for name in names}
    if not options:
        return
    if not options.get("load_in_8bit") and not options.get("load_in_4bit"):
        if any(value not in (None, False) for value in options.values()):
            raise ConfigError(
                f"{', '.join(names)}: say what to quantize to, with load_in_8bit=True or load_in_4bit=True."
            )
        return
    from transformers import BitsAndBytesConfig

    accepted = signature(BitsAndBytesConfig.__init__).parameters
    for name in names:
        if name not in accepted:
            raise ConfigError(f"{name} is not a quantization option.{nearest(name, accepted)}")
    try:
        loading["quantization_config"] = BitsAndBytesConfig(**options)
    except (ImportError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"quantization options {shown(options)} do not work: {first_line(error)}") from None


def _placement(loading: dict[str, Any]) -> None:
    """The harness's names for spreading a model become those of ``from_pretrained``."""
    parallelize = loading.pop("parallelize", None)
    per_gpu, cpu = loading.pop("max_memory_per_gpu", None), loading.pop("max_cpu_memory", None)
    if parallelize and loading.get("device_map") is None:
        loading["device_map"] = "auto"
    if loading.get("device_map") is None:
        loading.pop("device_map", None)
        if per_gpu is not None or cpu is not None or loading.pop("offload_folder", None) is not None:
            raise ConfigError("memory limits and offload_folder are for a model that is spread; add parallelize=True.")
    elif per_gpu is not None or cpu is not None:
        import torch

        limits: dict[int | str, Any] = {}
        if per_gpu is not None:
            limits.update(dict.fromkeys(range(torch.cuda.device_count()), per_gpu))
        if cpu is not None:
            limits["cpu"] = cpu
        loading["max_memory"] = limits


def _numbers(loading: dict[str, Any], decoding: Mapping[str, Any]) -> None:
    """Numbers in their types. A block length also chooses the paper's setting for it, and completes a config.json that
    names none.
    """
    _convert(loading)
    for name, value in decoding.items():
        if SYNONYMS.get(name, name) == "block_length" and value is not None:
            loading["block_length"] = converted(name, "int", value)
