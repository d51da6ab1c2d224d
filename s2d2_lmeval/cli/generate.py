"""Complete one prompt and show its cost; with --trace, also the order in which tokens were decided.

Without --prompt, a conversation: a line is a prompt, the answer appears as it is decoded. Ctrl-C ends an answer, Ctrl-D
the conversation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import add_shared, nonempty, parse_options, whole
from s2d2_lmeval.errors import ConfigError, RequestError, shown

if TYPE_CHECKING:
    from rich.console import Console

    from s2d2_lmeval.decoding.generation import Generation
    from s2d2_lmeval.decoding.options.config import DecodingConfig
    from s2d2_lmeval.model import BlockDiffusionModel
    from s2d2_lmeval.streaming import Stream

SUMMARY = "complete one prompt, or converse; --stream, block by block; --trace draws the decoding order"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", "-m", type=nonempty, required=True, metavar="PATH", help='folder, hub id, or "toy"')
    parser.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; - reads stdin; none: a conversation")
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
    parser.add_argument("--stream", action="store_true", help="print the answer block by block")
    parser.add_argument("--json", action="store_true", help="print only one JSON object")


def run(args: argparse.Namespace) -> int:
    """Load, decode, print."""
    from s2d2_lmeval.cli.checkpoints import encode, open_model
    from s2d2_lmeval.cli.console import begin, make_console, pairs, printable
    from s2d2_lmeval.prompts import with_stops

    if args.stream and args.json:
        raise ConfigError("--stream and --json: give one; an object is printed whole.")
    if args.prompt is None and (args.json or args.trace):
        raise ConfigError("--json and --trace show one answer: give its --prompt.")

    if args.json or not sys.stderr.isatty():
        begin()
    model, tokenizer, options = open_model(
        args.model, _options(args), device=args.device, dtype=args.dtype, revision=args.revision
    )
    config = with_stops(model.config(options), options, tokenizer)
    console = make_console()

    def write(piece: str) -> None:
        console.print(printable(piece), markup=False, emoji=False, soft_wrap=True, end="")

    if args.prompt is None:
        converse(Conversation(model, tokenizer, config, args.chat, args.system), write)
        return 0
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    prompt_ids = encode(tokenizer, prompt, chat=args.chat, system=args.system)
    answer = Answer(model, tokenizer, config, prompt_ids, write if args.stream else None)
    if args.json:
        steps = {"steps": [asdict(step) for step in answer.generation.steps]} if args.trace else {}
        print(json.dumps({**answer.as_dict(), **steps}, ensure_ascii=False))
        return 0
    console.print("" if args.stream else printable(answer.text), markup=False, emoji=False, soft_wrap=True)
    console.print()
    console.print(pairs(list(answer.statistics().items()), {"style": "bold"}))
    if args.trace:
        console.print()
        answer.draw(console)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options from --option and from dedicated arguments; contradictions are refused."""
    options = parse_options(args.option)
    for option in ("decoder", "max_new_tokens", "seed"):
        value = getattr(args, option)
        if value is None:
            continue
        if options.get(option, value) != value:
            raise ConfigError(f"--{option} {value} and --option {option}={shown(options[option])}: give one.")
        options[option] = value
    return options


@dataclass
class Conversation:
    """Turns of a user and a model: in the chat template if there is one (or ``chat`` says so), else each on its own."""

    model: BlockDiffusionModel
    tokenizer: Any
    config: DecodingConfig
    chat: bool | None = None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, prompt: str) -> Iterator[str]:
        """The answer to the next turn, in pieces; what was said so far of an interrupted one belongs to it."""
        from s2d2_lmeval.prompts import encode

        templated = bool(self.tokenizer.chat_template) if self.chat is None else self.chat
        if templated and self.system is not None and not self.messages:
            self.messages.append({"role": "system", "content": self.system})
        self.messages.append({"role": "user", "content": prompt})
        asked = encode(self.tokenizer, self.messages if templated else prompt)
        said = {"role": "assistant", "content": ""}
        self.messages.append(said)
        for piece in self.model.stream(asked, self.config):
            said["content"] += piece
            yield piece


def converse(conversation: Conversation, write: Callable[[str], Any]) -> None:
    """Read prompts and ``write`` answers until the input ends."""
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            write("\n")
            return
        if not prompt:
            continue
        pieces = conversation.answer(prompt)
        try:
            for piece in pieces:
                write(piece)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            write(" …")
        except RequestError as error:
            del conversation.messages[-2:]
            write(str(error))
        write("\n")


@dataclass
class Answer:
    """A model's completion of one prompt, and how to show it; ``write`` gets its text while it is decoded."""

    model: BlockDiffusionModel
    tokenizer: Any
    config: DecodingConfig
    prompt_ids: list[int]
    write: Callable[[str], Any] | None = None

    def __post_init__(self) -> None:
        from s2d2_lmeval.streaming import pieces

        started = time.perf_counter()
        if self.write is None:
            self._decode(None)
        else:
            for piece in pieces(self.tokenizer, self.config, self.config.max_new_tokens, self._decode):
                self.write(piece)
        self.seconds = time.perf_counter() - started
        self.text = self.tokenizer.decode(self.generation.token_ids, skip_special_tokens=True)
        self.dtype = str(self.model.dtype).removeprefix("torch.")

    def _decode(self, stream: Stream | None) -> Generation:
        stop = None if stream is None else stream.stop
        self.generation = self.model.generate([self.prompt_ids], self.config, stop=stop)[0]
        return self.generation

    def as_dict(self) -> dict[str, Any]:
        """Everything except the steps, as plain values."""
        generation, model = self.generation, self.model
        return {
            "text": self.text,
            "token_ids": generation.token_ids,
            "prompt_token_ids": self.prompt_ids,
            "finish_reason": generation.finish_reason,
            "stats": {**generation.stats, "seconds": self.seconds},
            "decoding_order": generation.decoding_order,
            "decoding": self.config.to_dict(),
            "promise": self.config.promise,
            "family": model.facts.family,
            "device": str(model.device),
            "dtype": self.dtype,
            "attention": model.attention,
        }

    def statistics(self) -> dict[str, str]:
        """The cost, in words."""
        stats, seconds = self.generation.stats, self.seconds
        counts = {kind: int(stats.get(f"{kind}_forwards", 0)) for kind in ("prefill", "draft", "verify", "commit")}
        forwards = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        new, ended = int(stats["new_tokens"]), _ENDED[self.generation.finish_reason]
        rows = {
            "new tokens": f"{new} after a prompt of {len(self.prompt_ids)}; ended by {ended}",
            "forwards": f"{int(stats['nfe'])} ({forwards or 'none'})",
        }
        if "tokens_per_forward" in stats:
            rows["tokens per forward"] = f"{stats['tokens_per_forward']:.2f}"
            if stats["prefill_forwards"] and "tokens_per_decode_forward" in stats:
                without = f", {stats['tokens_per_decode_forward']:.2f} without prompt-only forwards"
                rows["tokens per forward"] += without
        if "acceptance" in stats:
            counted = f"{int(stats['accepted'])} of {int(stats['drafted'])} drafted tokens"
            rows["accepted"] = f"{counted} ({stats['acceptance']:.0%})"
        if "routed" in stats:
            rows["verified"] = f"{stats['routed']:.0%} of the drafts"
        rate = f"{new / seconds:.1f} tokens/s" if seconds else "-"
        return {
            **rows,
            "time": f"{seconds:.2f} s, {rate}, first call included",
            "decoder": f"{self.config.decoder}, {self.config.layout}",
            "promise": self.config.promise,
            "on": f"{self.model.device}, {self.dtype}, attention {self.model.attention}",
        }

    def draw(self, console: Console) -> None:
        """Print the picture of the decoding order."""
        from s2d2_lmeval.cli.console import has_color

        drawn = self.model.draw(self.generation, console.width, has_color(console))
        for line in drawn.lines:
            console.print(line, no_wrap=True, overflow="crop", crop=True)
        if not drawn.lines:
            nothing = "nothing was decoded" if not self.generation.stats["nfe"] else "this decoder leaves no trace"
            console.print(nothing, style="dim")


_ENDED = {"stop": "a stop token", "stop_string": "a stop string", "length": "the limit"}
