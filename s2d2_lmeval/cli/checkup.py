"""What `doctor` finds out about a checkpoint: from its files, and with --load from running it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.findings import NOTE, OK, PROBLEM, Finding, host_memory
from s2d2_lmeval.errors import ConfigError, S2D2Error

if TYPE_CHECKING:
    from s2d2_lmeval.harness.arguments import Arguments

_ONLY_TO_TRY = {"entropy_bounded": {"eb_threshold": 0.35}}
"""Options without which a decoder cannot be configured."""


def checkpoint(source: str, revision: str | None, options: Mapping[str, Any], *, load: bool) -> Iterator[Finding]:
    """Everything about ``source`` with ``options``, in the order in which it would go wrong."""
    from s2d2_lmeval.families import checkpoint_facts
    from s2d2_lmeval.families.facts import AUTOREGRESSIVE
    from s2d2_lmeval.families.files import HUB_OPTIONS, resolve
    from s2d2_lmeval.harness.arguments import sort_arguments

    section, arguments = "checkpoint", sort_arguments(source, options)
    if arguments.custom is not None or arguments.model_class is not None:
        raise ConfigError("custom_generate and custom_model_class are for `s2d2-lmeval eval`; leave them out here.")
    named = ("mask_token_id", "block_length", "family", *HUB_OPTIONS)
    given = {name: value for name, value in arguments.loading.items() if name in named}
    try:
        where = resolve(source)
        facts = checkpoint_facts(where, revision, adapter=arguments.peft, **given)
    except S2D2Error as error:
        yield Finding(section, "config.json", str(error), PROBLEM)
        return
    yield Finding(section, "family", f"{facts.family}, runs as transformers' {facts.native_class}; no remote code")
    if facts.scheme == AUTOREGRESSIVE:
        yield Finding(section, "vocabulary", f"{facts.vocab_size}; no mask token, so no blocks: a target of drafters")
    else:
        aligned = "counted from position 0" if facts.block_alignment == "absolute" else "counted from the prompt's end"
        yield Finding(section, "vocabulary", f"{facts.vocab_size}, mask token {facts.mask_token_id}")
        about = f"of {facts.block_length} tokens ({facts.block_length_from}), {aligned}"
        yield Finding(section, "blocks", about, NOTE if facts.block_length_from == "assumed" else OK)
    shift = "predict the next token (shifted)" if facts.token_shift else "predict their own token (not shifted)"
    yield Finding(section, "logits", shift)
    if facts.stop_token_ids:
        yield Finding(section, "stop tokens", ", ".join(map(str, facts.stop_token_ids)))
    else:
        yield Finding(section, "stop tokens", "none named; the tokenizer's end-of-text token is used", NOTE)
    yield _context(facts, arguments.loading.get("max_context"))
    if facts.caveat:
        yield Finding(section, "but", facts.caveat, NOTE)
    yield from _weights(where)
    yield from _tokenizer(arguments, where, revision, facts)
    yield from _decoders(facts, arguments.decoding)
    if load:
        yield from _try(arguments, revision, facts)


def _context(facts: Any, asked: Any) -> Finding:
    section, about = "checkpoint", f"{facts.max_context} positions, prompt and answer together"
    if facts.context_limit > facts.max_context:
        about += f"; up to {facts.context_limit} with max_context=…"
    outside = facts.context_limit < facts.max_context and not (isinstance(asked, int) and asked <= facts.context_limit)
    if outside:
        about += f"; more than the window of its layers: give max_context={facts.context_limit} or less"
    return Finding(section, "context", about, PROBLEM if outside else OK)


def _weights(where: str) -> Iterator[Finding]:
    """Size of the weights, and whether the device holds them. A hub id's are not downloaded."""
    from s2d2_lmeval.cli.console import size
    from s2d2_lmeval.families.files import read_config, stored_weights, weight_files

    section = "checkpoint"
    if not Path(where).is_dir():
        yield Finding(section, "weights", "on the hub; not looked at (--load downloads them)", NOTE)
        return
    try:
        files = weight_files(where)
        quantized = "quantization_config" in read_config(where)
        weights = stored_weights(files, quantized=quantized).values()
    except S2D2Error as error:
        yield Finding(section, "weights", str(error), PROBLEM)
        return
    import torch

    parameters, kinds = sum(math.prod(weight.shape) for weight in weights), {weight.dtype for weight in weights}
    stored = sum(file.stat().st_size for file in files)
    about = f"{_short(parameters)} parameters, {size(stored)} of {'/'.join(sorted(kinds))} in {len(files)} file(s)"
    on_gpu = torch.cuda.is_available()
    # On a CPU, dtype=auto is float32, whatever is stored.
    needed = stored if on_gpu else 4 * parameters
    room = torch.cuda.get_device_properties(0).total_memory if on_gpu else host_memory()
    if room and needed > room:
        remedy = "device_map=auto spreads them" if on_gpu else "dtype=bfloat16 halves that"
        about += f"; they take {size(needed)} and there are {size(room)} ({remedy})"
        yield Finding(section, "weights", about, PROBLEM)
    else:
        yield Finding(section, "weights", about)


def _tokenizer(arguments: Arguments, where: str, revision: str | None, facts: Any) -> Iterator[Finding]:
    from s2d2_lmeval.harness.loading import check_mask, load_tokenizer
    from s2d2_lmeval.harness.templates import limited

    section = "checkpoint"
    try:
        tokenizer = load_tokenizer(arguments, where, revision)
    except S2D2Error as error:
        yield Finding(section, "tokenizer", str(error), PROBLEM)
        return
    size = len(tokenizer)
    may_run = bool(arguments.harness.get("trust_remote_code"))
    how = "with code of its own allowed" if may_run else "without remote code"
    about = f"{type(tokenizer).__name__}, {size} tokens, loads {how}"
    fits = size <= facts.vocab_size
    more = "" if fits else f"; more than the model's {facts.vocab_size}: not this model's tokenizer"
    yield Finding(section, "tokenizer", about + more, OK if fits else PROBLEM)
    try:
        check_mask(tokenizer, facts, arguments.loading.get("mask_token_id"))
    except S2D2Error as error:
        yield Finding(section, "mask token", str(error), PROBLEM)
    else:
        if facts.mask_token_id >= size:
            yield Finding(section, "mask token", f"{facts.mask_token_id} is not in the tokenizer", NOTE)
        elif facts.mask_token_id >= 0:
            mask = tokenizer.convert_ids_to_tokens(facts.mask_token_id)
            yield Finding(section, "mask token", f"{facts.mask_token_id} {mask}")
    if not tokenizer.chat_template:
        yield Finding(section, "chat template", "none; do not use --apply_chat_template")
        return
    try:
        with limited():
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
            )
        yield Finding(section, "chat template", "yes")
    except S2D2Error as error:
        yield Finding(section, "chat template", str(error), PROBLEM)


def _decoders(facts: Any, asked: Mapping[str, Any]) -> Iterator[Finding]:
    """The published settings, what was ``asked`` for, and every decoder that fits with what it promises."""
    from s2d2_lmeval.cli.options import as_written
    from s2d2_lmeval.decoding.options.config import DecodingConfig

    defaults = ", ".join(f"{name}={as_written(value)}" for name, value in facts.defaults.items())
    yield Finding("decoders", "default setting", defaults)
    yield from _presets(facts)
    if asked:
        try:
            config = DecodingConfig.from_options(asked, facts)
            yield Finding("decoders", "as asked", f"{config.decoder}, {config.layout}")
        except S2D2Error as error:
            yield Finding("decoders", "as asked", str(error), PROBLEM)
    for name in facts.decoders:
        extra = _ONLY_TO_TRY.get(name, {})
        try:
            config = DecodingConfig.from_options({"decoder": name, **extra}, facts)
        except S2D2Error as error:
            yield Finding("decoders", name, str(error), PROBLEM)
            continue
        needs = f" (needs {', '.join(extra)})" if extra else ""
        yield Finding("decoders", name, config.promise + needs)


def _presets(facts: Any) -> Iterator[Finding]:
    """The published settings that go by a name, each by what is different from the default."""
    from s2d2_lmeval.cli.options import as_written, compared
    from s2d2_lmeval.families import family_named

    for name, options in family_named(facts.family).presets.items():
        changes, gone = compared(options, facts.defaults)
        parts = [f"{key}={as_written(value)}" for key, value in changes.items()]
        more = ", ".join([*parts, *(f"without {key}" for key in gone)])
        yield Finding("decoders", f"preset={name}", f"the default setting{' with ' + more if more else ''}")


def _try(arguments: Arguments, revision: str | None, facts: Any) -> Iterator[Finding]:
    """Load the checkpoint and decode two blocks after a two-block prompt, with every decoder that fits."""
    from s2d2_lmeval.harness.loading import choose_device, load_model
    from s2d2_lmeval.runtime.memory import RowLimit

    section = "trial"
    started = time.perf_counter()
    try:
        loaded = load_model(
            arguments, rows=RowLimit(1), dtype="auto", device=choose_device(None, None), revision=revision
        )
    except S2D2Error as error:
        yield Finding(section, "load", str(error), PROBLEM)
        return
    model = loaded.engine
    assert model is not None
    place = f"{model.device}, {str(model.dtype).removeprefix('torch.')}, attention {model.attention}"
    yield Finding(section, "load", f"{time.perf_counter() - started:.1f} s onto {place}")
    reserved = {facts.mask_token_id, *facts.stop_token_ids}
    prompt = [token for token in range(min(facts.vocab_size, 64)) if token not in reserved][: 2 * facts.block_length]
    for name in facts.decoders:
        budget = 2 * facts.block_length
        options = {"decoder": name, "max_new_tokens": budget, "stop_token_ids": (), **_ONLY_TO_TRY.get(name, {})}
        try:
            answer = model.generate([prompt], options)[0]
        except S2D2Error as error:
            yield Finding(section, name, str(error), PROBLEM)
            continue
        stats = answer.stats
        yield Finding(section, name, f"{int(stats['new_tokens'])} tokens in {int(stats['nfe'])} forwards")


def _short(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
