"""From ``--model_args`` to a model, a tokenizer and the processes that share the work."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from s2d2_lmeval import lockstep
from s2d2_lmeval.errors import CheckpointError, ConfigError, first_line, shown, without_messages
from s2d2_lmeval.families import Facts, load_checkpoint
from s2d2_lmeval.families.facts import NO_MASK
from s2d2_lmeval.families.loading import usable_device
from s2d2_lmeval.harness.arguments import Arguments
from s2d2_lmeval.model import BlockDiffusionModel, load
from s2d2_lmeval.ranks import launched
from s2d2_lmeval.runtime.memory import RowLimit
from s2d2_lmeval.runtime.probe import SENTENCES, ShiftProbe
from s2d2_lmeval.toy import embedded

logger = logging.getLogger("lm_eval.s2d2")

_FACTS = ("family", "mask_token_id", "block_length")
# Names of mask tokens in published tokenizers: <|MASK|>, |<MASK>|, <|mdm_mask|>, [MASK], <[MASK_TOKEN]>, …
_MASK_NAME = re.compile(r"[^a-z]*(mdm_?)?mask(_?token)?[^a-z]*", re.IGNORECASE)


@dataclass(frozen=True)
class Loaded:
    """``hf_model`` is what a custom function gets; ``engine`` decodes (None for a class of the user's own that is of
    no known family).
    """

    hf_model: Any
    engine: BlockDiffusionModel | None
    source: str


def load_model(arguments: Arguments, *, rows: RowLimit, dtype: Any, device: str | None, revision: str | None) -> Loaded:
    """Load the model that the arguments name.

    Raises:
        CheckpointError: if it cannot be used for decoding.
    """
    source, loading = resolve(arguments.source), dict(arguments.loading)
    own = ("attention", "max_context", "static_shapes", "fused", "exact", "compile", "draft")
    loading.pop("probe", None)  # that needs the tokenizer
    options: dict[str, Any] = {"max_batch": rows, **{name: loading.pop(name) for name in own if name in loading}}
    if "tp_plan" in loading and (arguments.custom is not None or arguments.model_class is not None):
        raise ConfigError("custom_generate runs a model in one process; leave out tp_plan, or spread it: parallelize.")
    if "device_map" not in loading and "tp_plan" not in loading:
        loading["device"] = choose_device(loading["device"], None) if loading.get("device") else device
    for fact, given in (("dtype", dtype), ("revision", revision)):
        if loading.setdefault(fact, given) != given and given not in (None, "auto"):
            raise ConfigError(f"{fact}={given} and {fact}={loading[fact]} are both given; give one of them.")
    name = str(source if isinstance(source, str) else getattr(source, "name_or_path", "") or type(source).__name__)
    if arguments.peft is not None and (arguments.model_class is not None or isinstance(source, torch.nn.Module)):
        raise ConfigError("peft=… is for a checkpoint that is loaded here; merge the adapter into your model yourself.")
    if loading.get("draft_adapter") and (arguments.custom is not None or arguments.model_class is not None):
        raise ConfigError("draft_adapter=… is for the decoders here; a function or class of your own would not use it.")
    if arguments.custom is None and arguments.model_class is None and not isinstance(source, torch.nn.Module):
        engine = load(source, **options, **loading, adapter=arguments.peft)
        lockstep.join(engine)
        return Loaded(engine.hf_model, engine, name)
    # The engine installs its own attention on its model; a custom function gets the model without it.
    if isinstance(source, torch.nn.Module):
        hf_model: Any = source
    elif arguments.model_class is not None:
        hf_model = _from_class(arguments, source, loading)
    else:
        hf_model, _ = load_checkpoint(source, **loading, adapter=arguments.peft)
    facts = {name: loading[name] for name in _FACTS if name in loading}
    try:
        return Loaded(hf_model, load(hf_model, **options, **facts), name)
    except CheckpointError:
        if arguments.custom is None or arguments.model_class is None:
            raise
        return Loaded(hf_model, None, name)


def _from_class(arguments: Arguments, source: str, loading: dict[str, Any]) -> Any:
    """``custom_model_class``: its own ``from_pretrained`` with transformers' arguments."""
    options = {name: value for name, value in loading.items() if name not in ("device", *_FACTS) and value is not None}
    dtype, device = options.get("dtype"), loading.get("device")
    if isinstance(dtype, str) and dtype != "auto":
        options["dtype"] = getattr(torch, dtype, dtype)
    loader = getattr(arguments.model_class, "from_pretrained", None)
    if loader is None:
        raise ConfigError(f"custom_model_class={arguments.model_class!r} has no from_pretrained.")
    try:
        model = loader(source, **options)
    except Exception as error:
        raise CheckpointError(f"{arguments.model_class!r} cannot load {source}: {error!r}") from error
    return model.to(device).eval() if device is not None else model.eval()


def load_tokenizer(arguments: Arguments, source: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that ``--model_args`` name, by default that of the checkpoint; CheckpointError without any."""
    options = arguments.harness
    named = source if options.get("tokenizer") is None else options["tokenizer"]
    if isinstance(named, PreTrainedTokenizerBase):
        if options.get("special_tokens") == "text":
            raise ConfigError("special_tokens=text is for a tokenizer that is loaded here; give its path or hub id.")
        return named
    if not isinstance(named, (str, Path)):
        raise ConfigError(f"tokenizer={shown(named)} is neither a folder nor a hub id.")
    extra = {
        name: arguments.loading[name]
        for name in ("cache_dir", "local_files_only", "token")
        if name in arguments.loading
    }
    if options.get("add_bos_token") is not None:
        extra["add_bos_token"] = options["add_bos_token"]
    if options.get("special_tokens") == "text":
        extra["split_special_tokens"] = True
    try:
        # The tokenizer's loader reads config.json and warns of a model type that is none of transformers' own.
        with without_messages("transformers.configuration_utils", "You are using a model of type"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                resolve(named),
                revision=revision or arguments.loading.get("revision") or "main",
                use_fast=options.get("use_fast_tokenizer", True),
                trust_remote_code=bool(options.get("trust_remote_code", False)),
                **extra,
            )
        tokenizer("a")  # some damage shows only in use
        return tokenizer
    except Exception as error:
        said = first_line(error).rstrip(" :").removesuffix(" from one of")  # of ways that are all files it lacks
        if "custom code" in str(error):
            raise CheckpointError(
                f"the tokenizer of {named} is code of its own, which is not run unasked. Look at it and give "
                "trust_remote_code=True (model code is not run even so), or name a folder or hub id with a tokenizer "
                "of the same vocabulary: tokenizer=…."
            ) from None
        raise CheckpointError(
            f"no tokenizer could be loaded from {named} ({said}). Give one of the same vocabulary with "
            "tokenizer=…, a folder or hub id."
        ) from None


def probed(tokenizer: Any, engine: BlockDiffusionModel) -> ShiftProbe | None:
    """How the model's masks predict, by one forward on plain sentences; None if nothing can be said."""
    texts = [tokenizer.encode(sentence, add_special_tokens=False) for sentence in SENTENCES]
    in_vocabulary = [text for text in texts if all(0 <= token < engine.facts.vocab_size for token in text)]
    return engine.probe(in_vocabulary)


def check_shift(tokenizer: Any, engine: BlockDiffusionModel, probe: bool | None) -> None:
    """Refuse a checkpoint whose masks predict otherwise than its family's, unless ``probe`` is False.

    Raises:
        CheckpointError: with both numbers.
    """
    found = probed(tokenizer, engine) if probe is not False else None
    if found is not None:
        found.check(engine.facts)


def check_mask(tokenizer: Any, facts: Facts, given: int | None) -> None:
    """Refuse a mask token that is not the tokenizer's, unless the user has ``given`` it; CheckpointError names both."""
    mask, added = facts.mask_token_id, tokenizer.get_added_vocab()
    masks = {token: text for text, token in added.items() if _MASK_NAME.fullmatch(text)}
    if tokenizer.mask_token_id is not None:
        masks[tokenizer.mask_token_id] = tokenizer.mask_token
    is_word = 0 <= mask < len(tokenizer) and mask not in added.values()
    if mask == NO_MASK or mask in masks or not (masks or is_word):
        return
    text = repr(tokenizer.convert_ids_to_tokens(mask)) if 0 <= mask < len(tokenizer) else "no token"
    other = " or ".join(f"{one} ({text!r})" for one, text in sorted(masks.items()))
    advice = (
        f"its mask token is {other}: give mask_token_id={min(masks)}" if masks else "give the right mask_token_id=…"
    )
    message = (
        f"the checkpoint's mask token {mask} is {text} in the tokenizer; {advice} or add it to config.json, or give "
        "the checkpoint's own tokenizer=…."
    )
    if given is None:
        raise CheckpointError(message)
    logger.warning("mask_token_id=%s as asked, but %s", given, message)


def resolve(source: Any) -> Any:
    """An absolute path for a folder and for ``toy``; a hub id or a model unchanged."""
    source = embedded(source)
    if isinstance(source, (str, Path)) and os.path.isdir(place := os.path.expanduser(source)):
        return str(Path(place).resolve())
    return str(source) if isinstance(source, Path) else source


def join_processes(arguments: Arguments) -> Any:
    """The accelerator of a run started by ``accelerate launch`` or ``torchrun``, whose processes share the requests;
    None in a single process, and where they share the model.
    """
    if launched() == 1 or "tp_plan" in arguments.loading:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=52))])
    return accelerator if accelerator.num_processes > 1 else None


def choose_device(device: Any, accelerator: Any) -> str:
    """The device of a model that is not spread: this process's own, the requested one, or a GPU if there is one.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    if accelerator is not None:
        return str(accelerator.device)
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) in ("cuda", "cuda:0") and not torch.cuda.is_available():
        logger.info("device %s: this machine has none, running on the CPU.", device)  # the harness's default is cuda:0
        return "cpu"
    usable_device(str(device))
    return str(device)
