"""Checks of `doctor` on a checkpoint: on its files and, with --load, by running it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.console import size
from s2d2_lmeval.cli.doctor.installation import NOTE, OK, PROBLEM, Finding, host_memory, looked_at
from s2d2_lmeval.errors import ConfigError, S2D2Error

if TYPE_CHECKING:
    from s2d2_lmeval.harness.arguments import Arguments

finding = partial(Finding, "checkpoint")

COUNTED = {
    "absolute": "counted from position 0",
    "prompt": "the first begins where the prompt ends",
    "prompt_end": "counted from the prompt's end, in the prompt too",
}
"""How blocks are aligned, in words."""
WITHOUT_BLOCKS = ("strided", "reordered")
"""Schemes whose block length is that of a window."""


def checkpoint(source: str, revision: str | None, options: Mapping[str, Any], *, load: bool) -> Iterator[Finding]:
    """Findings on ``source`` with ``options``, in the order in which loading would fail."""
    from s2d2_lmeval.families import checkpoint_facts
    from s2d2_lmeval.families.files import HUB_OPTIONS, resolve
    from s2d2_lmeval.harness.arguments import sort_arguments

    arguments = sort_arguments(source, options)
    if arguments.custom is not None or arguments.model_class is not None:
        raise ConfigError("custom_generate and custom_model_class are for `s2d2-lmeval eval`; leave them out here.")
    named = ("mask_token_id", "block_length", "family", "draft_adapter", *HUB_OPTIONS)
    given = {name: value for name, value in arguments.loading.items() if name in named}
    try:
        where = resolve(source)
        facts = checkpoint_facts(where, revision, adapter=arguments.peft, **given)
    except S2D2Error as error:
        yield finding("config.json", str(error), PROBLEM)
        return
    yield from _facts(facts, arguments.loading.get("max_context"))
    yield from looked_at("checkpoint", "weights", _weights(where))
    yield from looked_at("checkpoint", "tokenizer", _tokenizer(arguments, where, revision, facts))
    yield from _decoders(facts, arguments.decoding)
    if load:
        yield from looked_at("trial", "load", _try(arguments, revision, facts))


def _facts(facts: Any, max_context: Any) -> Iterator[Finding]:
    from s2d2_lmeval.families.facts import AUTOREGRESSIVE

    yield finding("family", f"{facts.family}, runs as transformers' {facts.native_class}; no remote code")
    if facts.scheme == AUTOREGRESSIVE:
        use = "drafts by its adapter" if facts.draft_adapter else "a target for drafters"
        yield finding("vocabulary", f"{facts.vocab_size}; no mask token, so no block decoding: {use}")
    else:
        yield finding("vocabulary", f"{facts.vocab_size}, mask token {facts.mask_token_id}")
        about = f"of {facts.block_length} tokens ({facts.block_length_from})"
        if facts.scheme in WITHOUT_BLOCKS:
            yield finding("window", f"{about}; there are no blocks")
        else:
            about = f"{about}; {COUNTED[facts.block_alignment]}"
            yield finding("blocks", about, NOTE if facts.block_length_from == "assumed" else OK)
    if facts.draft_adapter is not None:
        yield finding("draft adapter", _draft(facts.draft_adapter))
    shift = "predict the next token (shifted)" if facts.token_shift else "predict their own token (not shifted)"
    masks = "" if facts.draft_shift in (None, facts.token_shift) else "; those of masks their own token"
    yield finding("logits", shift + masks)
    if facts.stop_token_ids:
        yield finding("stop tokens", ", ".join(map(str, facts.stop_token_ids)))
    else:
        yield finding("stop tokens", "none given; the tokenizer's EOS token is used", NOTE)
    about, limit = f"{facts.max_context} positions, prompt and answer together", facts.context_limit
    if limit > facts.max_context:
        about += f"; up to {limit} with max_context=…"
    outside = limit < facts.max_context and not (isinstance(max_context, int) and max_context <= limit)
    if outside:
        about += f"; more than the window of its layers: give max_context={limit} or less"
    yield finding("context", about, PROBLEM if outside else OK)
    if facts.caveat:
        yield finding("but", facts.caveat, NOTE)


def _weights(where: str) -> Iterator[Finding]:
    """Size of the weights, and whether they fit on the device. Weights on the hub are not downloaded."""
    import torch

    from s2d2_lmeval.families.files import read_config, stored_weights, weight_files

    if not Path(where).is_dir():
        yield finding("weights", "on the hub; not checked (--load downloads them)", NOTE)
        return
    files = weight_files(where)
    weights = stored_weights(files, quantized="quantization_config" in read_config(where)).values()
    parameters, kinds = sum(math.prod(weight.shape) for weight in weights), {weight.dtype for weight in weights}
    stored = sum(file.stat().st_size for file in files)
    about = f"{_short(parameters)} parameters, {size(stored)} of {'/'.join(sorted(kinds))} in {len(files)} file(s)"
    on_gpu = torch.cuda.is_available()
    # On a CPU, dtype=auto is float32, whatever the stored dtype.
    needed = stored if on_gpu else 4 * parameters
    room = torch.cuda.get_device_properties(0).total_memory if on_gpu else host_memory()
    lacks = bool(room) and needed > room
    if lacks:
        remedy = "device_map=auto spreads them" if on_gpu else "dtype=bfloat16 halves that"
        about += f"; they take {size(needed)} and there are {size(room)} ({remedy})"
    yield finding("weights", about, PROBLEM if lacks else OK)


def _tokenizer(arguments: Arguments, where: str, revision: str | None, facts: Any) -> Iterator[Finding]:
    from s2d2_lmeval.harness.loading import load_tokenizer

    tokenizer = load_tokenizer(arguments, where, revision)
    may_run = bool(arguments.harness.get("trust_remote_code"))
    how = "with code of its own allowed" if may_run else "without remote code"
    about = f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, loads {how}"
    fits = len(tokenizer) <= facts.vocab_size
    more = "" if fits else f"; more than the model's {facts.vocab_size}: not this model's tokenizer"
    yield finding("tokenizer", about + more, OK if fits else PROBLEM)
    given = arguments.loading.get("mask_token_id")
    yield from looked_at("checkpoint", "mask token", _mask_token(tokenizer, facts, given))
    yield from looked_at("checkpoint", "chat template", _chat_template(tokenizer))


def _mask_token(tokenizer: Any, facts: Any, given: Any) -> Iterator[Finding]:
    from s2d2_lmeval.harness.loading import check_mask

    check_mask(tokenizer, facts, given)
    if facts.mask_token_id >= len(tokenizer):
        yield finding("mask token", f"{facts.mask_token_id} is not in the tokenizer", NOTE)
    elif facts.mask_token_id >= 0:
        yield finding("mask token", f"{facts.mask_token_id} {tokenizer.convert_ids_to_tokens(facts.mask_token_id)}")


def _draft(adapter: Any) -> str:
    masks, sight = "masks", "earlier ones" if adapter.causal else "each other"
    if adapter.noise is not None:
        masks = f"random tokens from {adapter.noise[0]} to {adapter.noise[1] - 1}"
    drafts = "" if adapter.window is None else f"; windows of {adapter.window}, of {masks} that see {sight}"
    return f"only drafts go through it, so answers are those without it{drafts}"


def _chat_template(tokenizer: Any) -> Iterator[Finding]:
    from s2d2_lmeval.templates import limited

    if not tokenizer.chat_template:
        yield finding("chat template", "none; do not use --apply_chat_template")
        return
    with limited():
        chat = [{"role": "user", "content": "?"}]
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    yield finding("chat template", "yes")


def _decoders(facts: Any, asked: Mapping[str, Any]) -> Iterator[Finding]:
    """The default setting, the presets by their differences from it, the ``asked`` options, and the decoders that fit
    with their guarantees.
    """
    from s2d2_lmeval.cli.options import as_written, compared
    from s2d2_lmeval.families import family_named

    setting = {"decoder": facts.decoders[0], **facts.defaults}
    defaults = ", ".join(f"{name}={as_written(value)}" for name, value in setting.items())
    yield Finding("decoders", "default setting", defaults)
    for name, options in family_named(facts.family).presets.items():
        changes, gone = compared(options, facts.defaults)
        parts = [f"{key}={as_written(value)}" for key, value in changes.items()]
        more = ", ".join([*parts, *(f"without {key}" for key in gone)])
        yield Finding("decoders", f"preset={name}", f"the default setting{' with ' + more if more else ''}")
    if asked:
        yield from looked_at("decoders", "as asked", _decoder("as asked", asked, facts))
    for name in facts.decoders:
        yield from looked_at("decoders", name, _decoder(name, {"decoder": name}, facts))


def _needed(name: str, facts: Any) -> dict[str, Any]:
    """Options without which the decoder ``name`` cannot be configured."""
    if name == "entropy_bounded":
        return {"eb_threshold": 0.35}
    return {"short_last_block": False} if name == "spiffy" and facts.defaults.get("short_last_block") else {}


def _decoder(name: str, options: Mapping[str, Any], facts: Any) -> Iterator[Finding]:
    from s2d2_lmeval.cli.options import as_written
    from s2d2_lmeval.decoding.options.config import DecodingConfig

    extra = _needed(name, facts)
    config = DecodingConfig.from_options({**options, **extra}, facts)
    written = ", ".join(f"{key}={as_written(value)}" for key, value in extra.items())
    needs = f" (needs {written})" if extra else ""
    about = f"{config.decoder}, {config.layout}" if name == "as asked" else config.promise + needs
    yield Finding("decoders", name, about)


def _try(arguments: Arguments, revision: str | None, facts: Any) -> Iterator[Finding]:
    """Load the checkpoint and decode two blocks after a two-block prompt, with every decoder that fits."""
    from s2d2_lmeval.harness.loading import choose_device, load_model
    from s2d2_lmeval.runtime.memory import RowLimit

    started = time.perf_counter()
    device = choose_device(None, None)
    model = load_model(arguments, rows=RowLimit(1), dtype="auto", device=device, revision=revision).engine
    assert model is not None
    place = f"{model.device}, {str(model.dtype).removeprefix('torch.')}, attention {model.attention}"
    yield Finding("trial", "load", f"{time.perf_counter() - started:.1f} s onto {place}")
    yield from looked_at("trial", "shift probe", _shift(arguments, revision, model))
    for name in facts.decoders:
        yield from looked_at("trial", name, _trial(model, name, facts))


def _shift(arguments: Arguments, revision: str | None, model: Any) -> Iterator[Finding]:
    """What one forward on plain sentences says of how masks and text predict."""
    from s2d2_lmeval.harness.loading import load_tokenizer, probed

    try:
        tokenizer = load_tokenizer(arguments, str(arguments.source), revision)
    except S2D2Error:
        if model.facts.has_masks:
            yield Finding("trial", "shift probe", "not run: it reads sentences, which takes a tokenizer", NOTE)
        return
    found = probed(tokenizer, model)
    if found is not None:
        found.check(model.facts)
        yield Finding("trial", "shift probe", found.verdict, OK if found.drafts_shifted is not None else NOTE)


def _trial(model: Any, name: str, facts: Any) -> Iterator[Finding]:
    reserved, length = {facts.mask_token_id, *facts.stop_token_ids}, 2 * facts.block_length
    prompt = [token for token in range(min(facts.vocab_size, 64)) if token not in reserved][:length]
    options = {"decoder": name, "max_new_tokens": length, "stop_token_ids": (), **_needed(name, facts)}
    stats = model.generate([prompt], options)[0].stats
    yield Finding("trial", name, f"{int(stats['new_tokens'])} tokens in {int(stats['nfe'])} forwards")


def _short(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
