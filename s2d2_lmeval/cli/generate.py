"""Continue one prompt and show what it cost; with --trace, the order in which its tokens were decided."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import add_shared, nonempty, parse_options, whole
from s2d2_lmeval.errors import ConfigError, RequestError, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from s2d2_lmeval.decoding.generation import Generation
    from s2d2_lmeval.decoding.options.config import DecodingConfig
    from s2d2_lmeval.model import BlockDiffusionModel

SUMMARY = "continue one prompt; --trace draws the decoding order"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", "-m", type=nonempty, required=True, metavar="PATH", help='folder, hub id, or "toy"')
    parser.add_argument("--prompt", "-p", required=True, metavar="TEXT", help="the prompt; - reads it from stdin")
    add_shared(parser, "--chat")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument("--decoder", "-d", metavar="NAME", help="default: s2d2")
    add_shared(parser, "--option")
    parser.add_argument("--max_new_tokens", "-n", type=whole(0), metavar="N")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), help="of keyed randomness")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    add_shared(parser, "--revision")
    parser.add_argument("--trace", action="store_true", help="draw the decoding order")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Load, decode, print."""
    from s2d2_lmeval.cli.checkpoints import open_model
    from s2d2_lmeval.cli.console import begin

    if args.json or not sys.stderr.isatty():
        begin()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, tokenizer, options = open_model(
        args.model, _options(args), device=args.device, dtype=args.dtype, revision=args.revision
    )
    config = model.config(options)
    if "stop_token_ids" not in options and tokenizer.eos_token_id is not None:
        config = config.replace(stop_token_ids=tuple(dict.fromkeys((*config.stop_token_ids, tokenizer.eos_token_id))))
    prompt_ids = encode(tokenizer, prompt, chat=args.chat, system=args.system)
    started = time.perf_counter()
    generation = model.generate([prompt_ids], config)[0]
    seconds = time.perf_counter() - started
    if args.json:
        answer = as_dict(generation, tokenizer, config, model, prompt_ids, seconds)
        if args.trace:
            answer["steps"] = [asdict(step) for step in generation.steps]
        print(json.dumps(answer, ensure_ascii=False))
        return 0
    _show(generation, tokenizer, config, model, len(prompt_ids), seconds, trace=args.trace)
    return 0


def encode(tokenizer: Any, prompt: str, *, chat: bool | None = None, system: str | None = None) -> list[int]:
    """Token ids of ``prompt``, as a user's message in the chat template or as it is.

    :param chat: None means: if the tokenizer has a template.
    :raises RequestError: when a template is asked for and there is none.
    """
    from s2d2_lmeval.harness.templates import limited

    templated = bool(tokenizer.chat_template) if chat is None else chat
    if not templated:
        if system is not None:
            raise RequestError("--system needs the chat template; leave out --no-chat, or put it into the prompt.")
        return list(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise RequestError("This tokenizer has no chat template; use --no-chat.")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    with limited():
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def as_dict(
    generation: Generation,
    tokenizer: Any,
    config: DecodingConfig,
    model: BlockDiffusionModel,
    prompt_ids: list[int],
    seconds: float,
) -> dict[str, Any]:
    """Everything about a generation but its steps, as plain values."""
    return {
        "text": tokenizer.decode(generation.token_ids, skip_special_tokens=True),
        "token_ids": generation.token_ids,
        "prompt_token_ids": prompt_ids,
        "finish_reason": generation.finish_reason,
        "stats": {**generation.stats, "seconds": seconds},
        "decoding_order": generation.decoding_order,
        "decoding": config.to_dict(),
        "promise": config.promise,
        "family": model.facts.family,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.attention,
    }


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What --option and the arguments of their own say; a contradiction is refused."""
    options = parse_options(args.option)
    for option in ("decoder", "max_new_tokens", "seed"):
        value = getattr(args, option)
        if value is None:
            continue
        if options.get(option, value) != value:
            raise ConfigError(f"--{option} {value} and --option {option}={shown(options[option])}: give one.")
        options[option] = value
    return options


def _show(
    generation: Generation,
    tokenizer: Any,
    config: DecodingConfig,
    model: BlockDiffusionModel,
    prompt_length: int,
    seconds: float,
    *,
    trace: bool,
) -> None:
    from s2d2_lmeval.cli.console import make_console, printable

    console = make_console()
    text = tokenizer.decode(generation.token_ids, skip_special_tokens=True)
    console.print(printable(text), markup=False, emoji=False, soft_wrap=True)
    console.print()
    console.print(statistics_table(generation, config, model, prompt_length, seconds))
    if trace:
        console.print()
        draw(console, generation, tokenizer, model, config, prompt_length)


def draw(
    console: Console,
    generation: Generation,
    tokenizer: Any,
    model: BlockDiffusionModel,
    config: DecodingConfig,
    prompt_length: int,
) -> None:
    """Print the picture of a generation's decoding order."""
    from s2d2_lmeval.cli.checkpoints import token_text
    from s2d2_lmeval.cli.console import has_color
    from s2d2_lmeval.cli.picture import picture

    lines = picture(
        generation.steps,
        lambda token: token_text(tokenizer, token),
        mask_token_id=model.facts.mask_token_id,
        stop_token_ids=config.stop_token_ids,
        prompt_length=prompt_length,
        width=console.width,
        color=has_color(console),
    )
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    if not lines:
        console.print(f"decoder {config.decoder} leaves no trace of its steps", style="dim")


def statistics_table(
    generation: Generation, config: DecodingConfig, model: BlockDiffusionModel, prompt_length: int, seconds: float
) -> Table:
    """The statistics of one request."""
    from rich.table import Table

    stats = generation.stats
    forwards = ", ".join(
        f"{int(stats[name])} {name.removesuffix('_forwards')}"
        for name in ("prefill_forwards", "draft_forwards", "verify_forwards", "commit_forwards")
        if stats.get(name)
    )
    new = int(stats["new_tokens"])
    rows = [
        ("new tokens", f"{new} after a prompt of {prompt_length}; ended by {_ENDED[generation.finish_reason]}"),
        ("forwards", f"{int(stats['nfe'])} ({forwards or 'none'})"),
    ]
    if "tokens_per_forward" in stats:
        both = f"{stats['tokens_per_forward']:.2f}"
        if stats["prefill_forwards"] and "tokens_per_decode_forward" in stats:
            both += f", {stats['tokens_per_decode_forward']:.2f} without forwards that only run the prompt"
        rows.append(("tokens per forward", both))
    if "acceptance" in stats:
        accepted, drafted = int(stats["accepted"]), int(stats["drafted"])
        rows.append(("accepted", f"{accepted} of {drafted} drafted tokens ({stats['acceptance']:.0%})"))
    if "routed" in stats:
        rows.append(("verified", f"{stats['routed']:.0%} of the drafts"))
    rate = f"{new / seconds:.1f} tokens/s" if seconds else "-"
    rows.append(("time", f"{seconds:.2f} s, {rate}, first call included"))
    rows.append(("decoder", f"{config.decoder}, {config.layout}"))
    rows.append(("promise", config.promise))
    rows.append(("on", f"{model.device}, {str(model.dtype).removeprefix('torch.')}, attention {model.attention}"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


_ENDED = {"stop": "a stop token", "stop_string": "a stop string", "length": "the limit"}
