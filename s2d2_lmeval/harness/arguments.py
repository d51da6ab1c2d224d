"""What ``--model_args`` and a task's ``generation_kwargs`` may hold, and who gets which of it.

Three readers share one flat list of model arguments: the decoder
(:class:`~s2d2_lmeval.decoding.options.config.DecodingConfig`, or the function given as ``custom_generate``),
:func:`s2d2_lmeval.load`, and the harness's own model class, whose names keep their meaning. A name that none of them
knows is refused with the nearest one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.decoding.options.general import GREEDY
from s2d2_lmeval.decoding.options.names import changes_nothing, nearest
from s2d2_lmeval.decoding.options.option import LARGEST, converted
from s2d2_lmeval.decoding.options.rounds import DRAFT_SHAPES
from s2d2_lmeval.errors import ConfigError, first_line, shown
from s2d2_lmeval.harness.custom import BUDGET_NAMES, CustomFunction, load_object
from s2d2_lmeval.runtime.memory import RowLimit

logger = logging.getLogger("lm_eval.s2d2")

SPECIAL_TOKENS = ("parse", "text", "refuse")
"""Strings of special tokens in prompts: these tokens, as for ``hf``, but the mask's is text; or all are text; or these
tokens, and a prompt with the mask is refused.
"""

_NAME = (str, Path)
OF_HARNESS: dict[str, Any] = {
    **dict.fromkeys(("use_fast_tokenizer", "trust_remote_code", "add_bos_token", "truncation"), "bool"),
    **dict.fromkeys(("tokenizer", "backend", "special_tokens", "chat_template_args")),
    "enable_thinking": "bool",
    "max_length": "int",
    "prefix_token_id": "int",
    "think_end_token": (str, int),
}
"""Options with the meaning that they have for the harness's ``hf`` models, and ``special_tokens``: the kind or the
types of their values (None: checked elsewhere).
"""
OF_LOADING: dict[str, Any] = {
    **dict.fromkeys(("attention", "fused", "max_batch", "parallelize", "max_memory_per_gpu", "max_cpu_memory")),
    **dict.fromkeys(("static_shapes", "compile", "force_download", "local_files_only", "probe"), "bool"),
    **dict.fromkeys(("max_context", "mask_token_id"), "int"),
    **dict.fromkeys(("draft", "draft_adapter", "family", "device", "revision"), _NAME),
    **dict.fromkeys(("variant", "cache_dir", "offload_folder"), _NAME),
    "dtype": (str, torch.dtype),
    "token": (str, bool),
    "device_map": (str, dict),
    "exact": (bool, int, str),
    "tp_plan": (str,),
}
"""Options of :func:`s2d2_lmeval.load`, and the harness's names for spreading a model, likewise."""
QUANTIZATION = ("load_in_8bit", "load_in_4bit", "bnb_4bit_", "llm_int8_")
OWN = ("custom_generate", "custom_model_class", "peft", "log_decoding_order")
"""Options of this model class alone."""

LOADING_SYNONYMS = {"torch_dtype": "dtype", "attn_implementation": "attention"}
"""What transformers calls them, or called them."""
_BACKENDS = {"eager": "sdpa", "flash_attention_2": "flash", "flash_attention_3": "flash"}
"""Attention in transformers' names."""
_LONGEST_TEXT = 1000
_ROWS = "a number of requests to decode side by side, 1 or more"


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


def sort_arguments(pretrained: Any, options: Mapping[str, Any]) -> Arguments:
    """Sort ``options`` (all of ``--model_args`` but ``pretrained``) by reader.

    Raises:
        ConfigError: an unknown name, an option that this model class does not have, an invalid value, or a missing
            ``pretrained``.
    """
    if _absent(pretrained):
        raise ConfigError("--model_args has no pretrained=…: a folder, a hub id, or toy (the embedded checkpoint).")
    custom = None if _absent(options.get("custom_generate")) else CustomFunction.load(options["custom_generate"])
    check("pretrained", pretrained, (*_NAME, torch.nn.Module))
    left = _without_synonyms(options, OF_HARNESS.keys() | (custom.parameters if custom else set()))
    own = {name: left.pop(name, None) for name in (*OWN, "max_batch")}
    check("peft", own["peft"], _NAME)
    if custom is None and left.get("draft") in DRAFT_SHAPES:
        # Who drafts, a path, and what is drafted share a short name; the long one is the option's.
        left["draft_shape"] = left.pop("draft")
    by_reader = _by_reader(left, custom)
    _check_harness(by_reader["harness"])
    loading = by_reader["loading"]
    _quantization(loading)
    _placement(loading)
    for name, value in by_reader["decoding"].items():
        # A block length also chooses the paper's setting for it, and completes a config.json that names none.
        if SYNONYMS.get(name, name) == "block_length" and value is not None:
            loading["block_length"] = converted(name, "int", value)
    model_class = own["custom_model_class"] or None
    if model_class is not None and not callable(model_class):
        model_class = load_object(model_class)
    return Arguments(
        source=pretrained,
        custom=custom,
        model_class=model_class,
        peft=own["peft"],
        log_decoding_order=converted("log_decoding_order", "bool", own["log_decoding_order"] or False),
        rows=_limit("max_batch", own["max_batch"]) if own["max_batch"] is not None else None,
        **by_reader,
    )


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == "")


def rows_in_flight(batch_size: int | str, max_batch_size: int | None) -> RowLimit:
    """Rows in flight for a harness ``--batch_size``.

    ``auto`` (and ``auto:N``) means as many as fit in memory, at most ``max_batch_size``.
    """
    if isinstance(batch_size, str) and batch_size.startswith("auto"):
        return RowLimit(
            "auto", None if max_batch_size is None else _at_least(1, "max_batch_size", max_batch_size, _ROWS)
        )
    return _limit("batch_size", batch_size)


def _limit(name: str, value: Any) -> RowLimit:
    return RowLimit("auto" if isinstance(value, str) and value == "auto" else _at_least(1, name, value, _ROWS))


def _at_least(least: int, name: str, value: Any, meaning: str) -> int:
    try:
        number = int(converted(name, "int", value))
    except ConfigError:
        number = least - 1
    if not least <= number <= LARGEST:
        said = shown(value).strip("'")
        raise ConfigError(f"{name}={said} is not {meaning}.")
    return number


def _without_synonyms(options: Mapping[str, Any], own: Container[str]) -> dict[str, Any]:
    """``options`` under their names here, without those of other tools that have no effect; ``own`` names keep their
    meaning, whatever it is elsewhere.
    """
    named: dict[str, Any] = {}
    for given, value in options.items():
        name = given if given in own else LOADING_SYNONYMS.get(given, given)
        if getattr(value, "shape", ()):
            raise ConfigError(f"{name}={shown(value)} is an array; give plain values.")
        if value is None and (name != given or name in OF_LOADING or name in OF_HARNESS):
            continue  # as if it were not there
        if name not in own and name not in OF_LOADING and changes_nothing(name, value):
            continue
        if name == "attention" and isinstance(value, str):
            value = _BACKENDS.get(value, value)
        if name in named and named[name] != value:
            raise ConfigError(f"{given} and another name of {name} are given with different values; give one of them.")
        named[name] = value
    return named


def _by_reader(options: Mapping[str, Any], custom: CustomFunction | None) -> dict[str, dict[str, Any]]:
    # The parameters of a custom function come first, because they may have any name.
    of_decoder = custom.option_names if custom else DecodingConfig.option_names()
    found: dict[str, dict[str, Any]] = {"decoding": {}, "loading": {}, "harness": {}}
    for name, value in options.items():
        if name in of_decoder:
            found["decoding"][name] = value
        elif name in OF_LOADING or name.startswith(QUANTIZATION):
            found["loading"][name] = check(name, value, OF_LOADING.get(name))
        elif name in OF_HARNESS:
            found["harness"][name] = check(name, value, OF_HARNESS[name])
        elif custom is not None and name in DecodingConfig.option_names():
            hint = nearest(name, of_decoder)
            raise ConfigError(f"{name} is not a parameter of {custom.name}, which decodes in this run.{hint}")
        else:
            others = ("pretrained", "batch_size", "max_batch_size", *OWN, *QUANTIZATION[:2])
            hint = nearest(name, [*of_decoder, *OF_LOADING, *OF_HARNESS, *others])
            raise ConfigError(f"{name} is not an option of --model s2d2.{hint}")
    return found


def check(name: str, value: Any, kind: Any) -> Any:
    """``value`` as a ``kind`` of option; of ``types``, where it must name something: no other type, and no text as long
    as a page.

    Raises:
        ConfigError: naming the argument.
    """
    if value is None or kind is None:
        return value
    if isinstance(kind, str):
        value = converted(name, kind, value)
        if abs(value) > LARGEST:
            raise ConfigError(f"{name}={shown(value)} is too large.")
        return value
    large = isinstance(value, int) and value > LARGEST
    long = isinstance(value, _NAME) and len(str(value)) > _LONGEST_TEXT
    if large or long or not isinstance(value, kind):
        raise ConfigError(f"{name}={shown(value)} is not a name or a path.")
    return value


def _check_harness(harness: Mapping[str, Any]) -> None:
    """Check what the harness's class would check only after loading the weights, or not at all."""
    for name, known, why in (
        ("backend", ("default", "causal"), "is not available with --model s2d2: models are causal"),
        ("special_tokens", (None, *SPECIAL_TOKENS), f"is not one of: {', '.join(SPECIAL_TOKENS)}"),
    ):
        if harness.get(name, known[0]) not in known:
            raise ConfigError(f"{name}={shown(harness[name])} {why}.")
    if not isinstance(harness.get("chat_template_args") or {}, Mapping):
        raise ConfigError(f"chat_template_args={shown(harness['chat_template_args'])} is not a mapping.")
    if harness.get("enable_thinking") and harness.get("think_end_token") is None:
        raise ConfigError("enable_thinking=True needs think_end_token=…, the token that ends the reasoning trace.")


def _quantization(loading: dict[str, Any]) -> None:
    """bitsandbytes switches become the ``quantization_config`` that transformers wants."""
    options = {name: loading.pop(name) for name in list(loading) if name.startswith(QUANTIZATION)}
    if not options.get("load_in_8bit") and not options.get("load_in_4bit"):
        if any(value not in (None, False) for value in options.values()):
            names = ", ".join(options)
            raise ConfigError(f"{names}: say what to quantize to, with load_in_8bit=True or load_in_4bit=True.")
        return
    from transformers import BitsAndBytesConfig

    accepted = signature(BitsAndBytesConfig.__init__).parameters
    for name in options:
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
        gpus = {} if per_gpu is None else dict.fromkeys(range(torch.cuda.device_count()), per_gpu)
        loading["max_memory"] = gpus | ({} if cpu is None else {"cpu": cpu})


@dataclass(frozen=True)
class GenerationArguments:
    """What a task's ``generation_kwargs`` (and ``--gen_kwargs``) ask for: when to stop (``until``), the budget if the
    task names one, and the decoding options it names.
    """

    until: tuple[str, ...]
    max_new_tokens: int | None
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, gen_kwargs: Mapping[str, Any], own: Container[str] = ()) -> GenerationArguments:
        """Read a request's generation arguments with the harness's meaning.

        ``do_sample: false`` is greedy drafting whatever the temperature; a temperature alone decides whether to
        sample. ``own`` are the parameters of a custom function, whatever they mean elsewhere.

        Raises:
            ConfigError: a value of the wrong type, or an option that has no meaning for block diffusion.
        """
        if not isinstance(gen_kwargs, Mapping):
            raise ConfigError(f"generation_kwargs must be a mapping, not {shown(gen_kwargs)}.")
        options = {
            name: value
            for name, value in gen_kwargs.items()
            if value is not None and (name in own or not changes_nothing(name, value))
        }
        until = options.pop("until", ())
        until = (until,) if isinstance(until, str) else until
        if not isinstance(until, (list, tuple)) or not all(isinstance(string, str) for string in until):
            raise ConfigError(f"generation_kwargs: until must be a string or a list of strings, not {shown(until)}.")
        budgets = {name: token_budget(options.pop(name), name) for name in list(options) if name in BUDGET_NAMES}
        if len(set(budgets.values())) > 1:
            logger.warning("generation_kwargs name several budgets, %s: the last one counts.", budgets)
        _sampling(options)
        # The harness puts --gen_kwargs after a task's own arguments.
        return cls(tuple(until), list(budgets.values())[-1] if budgets else None, options)


def token_budget(value: Any, name: str = "max_gen_toks") -> int:
    """``value`` as a number of new tokens; ConfigError if it is not one."""
    return _at_least(0, name, value, "a number of tokens")


def _sampling(options: dict[str, Any]) -> None:
    """``do_sample`` and ``temperature`` in the harness's sense, in place."""
    for name, kind in (("do_sample", "bool"), ("temperature", "float")):
        if name in options:
            options[name] = converted(name, kind, options[name])
    temperature = options.get("temperature", 0.0)
    if "temperature" in options:
        options.setdefault("do_sample", temperature >= GREEDY)
    if options.get("do_sample") is False and options.pop("temperature", 0.0) >= GREEDY:
        logger.warning(
            "generation_kwargs say do_sample=false and temperature=%s: drafts are the argmax. Add do_sample=true to "
            "sample.",
            temperature,
        )
