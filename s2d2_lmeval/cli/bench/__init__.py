"""Measure decoders on this machine: tokens per second, tokens per forward, and where the time goes.

Everything compared runs in one process on the same weights. Each line is the median over repeats after a warm-up; on a
CPU the repeats are interleaved, so that drift in the machine's speed affects all alike.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import add_shared, nonempty, parse_options, real, whole
from s2d2_lmeval.errors import ConfigError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from s2d2_lmeval.model import BlockDiffusionModel
    from s2d2_lmeval.studies.bench.measuring import Measurement, Workload

WIDE = 130
"""Terminal width in columns that fits the whole table."""

SUMMARY = "measure decoders, schedules and batches on this machine"

_CLOCKS = {"wall": "wall clock", "cpu": "processor time"}

COMPARED = "ar,dynamic,s2d2,s2d2:reference,s2d2:lookahead,sliding"

_NUMBERS = {
    "block_length": (16, "of block decoders"),
    "prompts": (16, "how many"),
    "prompt_length": (64, "of random prompts"),
    "new_tokens": (64, "per prompt"),
    "repeats": (3, "measured runs of each"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    model = "a checkpoint, or sdar-100m, sdar-1.7b or sdar-8b for random weights of that shape (default: toy)"
    parser.add_argument("--model", type=nonempty, default="toy", help=model)
    parser.add_argument(
        "--draft", type=nonempty, metavar="PATH", help="its DFlash drafter, or toy, or random for random weights"
    )
    decoders = f"comma-separated DECODER[:SCHEDULE][+OPTION=VALUE…] (default: {COMPARED})"
    parser.add_argument("--decoders", metavar="LIST", help=decoders)
    parser.add_argument("--batch", metavar="LIST", help="rows in flight (default: 1,8)")
    for name, (default, what) in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=whole(), help=f"{what} (default: {default})")
    script = "replace logits by a script in which this share of drafted tokens is correct; for random weights"
    parser.add_argument("--scripted_acceptance", type=real(0, 1), metavar="RATE", help=script)
    parser.add_argument(
        "--answers",
        action="store_true",
        help="for the toy: answer --prompts held-out problems of each corpus, and show accuracy, tokens/forward and "
        "how many answers equal the first decoder's, instead of times",
    )
    parser.add_argument(
        "--launches",
        action="store_true",
        help="on a pretend GPU: count a step's launches, transfers, waits and replays, and what a GPU would refuse; of "
        "every decoder and schedule, in batches of 1,8,32, 24 new tokens of a few more prompts than rows",
    )
    parser.add_argument("--no_baselines", action="store_true", help="leave out the plain transformers loops")
    parser.add_argument("--device", help="cuda, cpu, … (default: cuda if there is one)")
    parser.add_argument("--dtype", help="dtype of the weights (default: bfloat16 on CUDA, else float32)")
    add_shared(parser, "--threads")
    cpu = "cpu: CPU time of this process, for a shared machine; use with --threads 1 on a CPU"
    parser.add_argument("--clock", choices=tuple(_CLOCKS), default="wall", help=cpu)
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw tokens per second (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write files."""
    import torch

    from s2d2_lmeval.cli.console import begin
    from s2d2_lmeval.harness.loading import choose_device
    from s2d2_lmeval.runtime import clock

    if args.answers and args.model != "toy":
        raise ConfigError("--answers scores the toy's held-out problems: use --model toy, or an evaluation for others.")
    _fill_in(args)
    console = begin(args.threads)
    clock.choose(args.clock)
    device = torch.device(choose_device(args.device, None))
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"--dtype {shown(args.dtype)} is not a floating point type; try float32 or bfloat16.")
    plain, model = _models(args.model, args.draft, device, dtype)
    if args.launches:
        report = _show_launches(args, model, console)
    else:
        report = _show_answers(args, model, console) if args.answers else _show_speed(args, plain, model, console)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written to {args.output}.")
    if args.plot and not args.answers:
        from s2d2_lmeval.studies.bench.measuring import plot

        about = report["environment"]
        plot(report["measurements"], f"{args.model} on {about['device']}, {about['dtype']}", args.plot)
        console.print(f"Drawn to {args.plot}.")
    return 0


def _fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on what is measured."""
    if args.launches:
        without = ("answers", "scripted_acceptance", "no_baselines", "repeats", "device", "plot")
        given = [f"--{name}" for name in without if getattr(args, name)]
        if given:
            raise ConfigError(
                f"--launches counts on a pretend GPU, and does not take {', '.join(given)}; leave it out."
            )
        # The operations are small, and time does not count.
        args.device, args.batch, args.threads = "cpu", args.batch or "1,8,32", args.threads or 1
        args.new_tokens, args.prompt_length = args.new_tokens or 24, args.prompt_length or 24
        return
    args.batch, args.decoders = args.batch or "1,8", args.decoders or COMPARED
    for name, (default, _) in _NUMBERS.items():
        setattr(args, name, getattr(args, name) or default)


def _show_launches(args: argparse.Namespace, model: BlockDiffusionModel, console: Any) -> dict[str, Any]:
    """What steps ask of a GPU; returns the content of the file."""
    from s2d2_lmeval.cli.bench.launches import count_all, launch_table
    from s2d2_lmeval.harness.report import environment
    from s2d2_lmeval.studies.bench.launches import every_entry

    entries = args.decoders.split(",") if args.decoders else every_entry(model)
    options = {entry: {**_options(entry, args), "max_new_tokens": args.new_tokens} for entry in entries}
    batches = _numbers(args.batch)
    work = {batch: _workload(args, model, args.prompts or batch + batch // 4 + 2).prompts for batch in batches}
    rows = count_all(console, model, options, work)
    console.print(launch_table(rows))
    return {
        "settings": {name: str(value) for name, value in vars(args).items() if name != "run"},
        "environment": environment(model.device, model.dtype, model.attention),
        "launches": rows,
    }


def _show_speed(
    args: argparse.Namespace, plain: PreTrainedModel | None, model: BlockDiffusionModel, console: Any
) -> dict[str, Any]:
    """Measure what was requested, baselines first, and print it; returns the content of the file."""
    from s2d2_lmeval.harness.report import environment
    from s2d2_lmeval.studies.bench import measuring
    from s2d2_lmeval.studies.bench.random_weights import Script, follow_script

    work = _workload(args, model, args.prompts)
    script = None
    if args.scripted_acceptance is not None:
        script = Script(args.scripted_acceptance, model.facts.vocab_size)
        model = follow_script(model, script)
    contenders, batches = [], _numbers(args.batch)
    if not args.no_baselines and plain is not None:
        for batch in batches:
            contenders += [measuring.transformers_generate(plain, batch, kind, work) for kind in (None, "static")]
        contenders.append(measuring.plain_loop(plain, model.facts.mask_token_id, args.block_length, script, work))
    for entry in args.decoders.split(","):
        contenders += [measuring.decoder(model, entry, _options(entry, args), batch, work) for batch in batches]
    with console.status("measuring") as status:
        found = measuring.measure_all(contenders, args.repeats, model.device.type != "cuda", status.update)
    about = environment(model.device, model.dtype, model.attention)
    floor = measuring.floor_milliseconds(model.hf_model)
    console.print(_table(found, console.width))
    console.print(
        f"{args.model} on {about['device']}, {about['dtype']}, {about['threads']} threads, torch {about['torch']}, "
        f"transformers {about['transformers']}; {len(work.prompts)} prompts, {args.new_tokens} new tokens each, median "
        f"of {args.repeats} by the {_CLOCKS[args.clock]}. The floor reads the weights once: {floor:.2f} ms."
    )
    if script is not None:
        console.print(
            f"[bold]Scripted:[/bold] the full model runs, then its logits are replaced so that "
            f"{args.scripted_acceptance:.0%} of drafted tokens are correct. Only timings are meaningful, not tokens."
        )
    return {
        "settings": {name: str(value) for name, value in vars(args).items() if name != "run"},
        "scripted": script is not None,
        "environment": about,
        "floor_milliseconds": floor,
        "measurements": found,
    }


def _show_answers(args: argparse.Namespace, model: BlockDiffusionModel, console: Any) -> dict[str, Any]:
    """Accuracy and tokens per forward by corpus, one line per decoder; returns the content of the file."""
    from rich.box import HEAVY_HEAD

    from s2d2_lmeval.cli.console import table
    from s2d2_lmeval.studies.bench.answers import answer

    batch, entries = _numbers(args.batch)[0], args.decoders.split(",")
    found = {}
    for entry in entries:
        with console.status(entry):
            found[entry] = answer(model, _options(entry, args), batch, args.prompts)
    first = found[entries[0]]
    expected = [text for one in first for text in one["texts"]]
    lines = []
    for name, several in found.items():
        equal = sum(map(list.__eq__, expected, (text for one in several for text in one["texts"])))
        cells = [f"{one['accuracy']:.3f} / {one['tokens_per_forward']:.2f}" for one in several]
        queries = sum(one["queries"] for one in several) / len(several)
        lines.append([name, *cells, f"{queries:.1f}", f"{equal} of {len(expected)}"])
    header = ["decoder", *(one["corpus"] for one in first), "queries/forward", f"equal to {entries[0]}"]
    title = f"Accuracy / tokens per forward, batch {batch}, {args.prompts} problems each"
    console.print(table(header, lines, title=title, box=HEAVY_HEAD))
    kept = [{"name": name, **one, "texts": None} for name, several in found.items() for one in several]
    return {"batch": batch, "answers": kept}


def _models(
    name: str, draft: str | None, device: Any, dtype: Any
) -> tuple[PreTrainedModel | None, BlockDiffusionModel]:
    """The plain transformers model, if there is one, and the package's on the same weights."""
    from s2d2_lmeval.model import load
    from s2d2_lmeval.studies.bench.random_weights import SHAPES, random_model, with_random_drafter

    if name in SHAPES:
        plain = random_model(name, device, dtype)
        if draft not in (None, "random"):
            raise ConfigError(f"--draft {shown(draft)} was not made for {name}; give random, or leave it out.")
        if draft is not None:
            return None, with_random_drafter(plain)
        return plain, load(plain, family="sdar", mask_token_id=plain.config.vocab_size - 1, block_length=4)
    model = load(name, dtype=dtype, device=device, draft=draft)
    if draft is not None or model.facts.token_shift or model.facts.scheme != "block":
        return None, model
    from s2d2_lmeval.families import adopt

    plain, _ = adopt(model.hf_model, family=model.facts.family)
    plain.config._attn_implementation = "sdpa"
    return plain, model


def _workload(args: argparse.Namespace, model: BlockDiffusionModel, prompts: int) -> Workload:
    """Held-out problems for the toy, random tokens for anything else; RequestError where the context is too short."""
    from s2d2_lmeval.prompts import refuse_undecodable
    from s2d2_lmeval.studies.bench.measuring import Workload

    if args.model == "toy":
        from tokenizers import Tokenizer

        from s2d2_lmeval.toy import checkpoint_path, held_out

        tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
        found = [tokenizer.encode(problem.prompt).ids for problem in held_out("arithmetic")[:prompts]]
    else:
        rng, words = random.Random(0), range(model.facts.vocab_size // 2)
        found = [rng.choices(words, k=args.prompt_length) for _ in range(prompts)]
    for index, ids in enumerate(found):  # transformers' loops would go on past the context
        refuse_undecodable(index, ids, args.new_tokens, model.max_context, model.facts)
    return Workload(found, args.new_tokens)


def _numbers(text: str) -> list[int]:
    try:
        return [whole()(part) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--batch: {error}. Give whole numbers separated by commas, such as 1,8.") from None


def _options(entry: str, args: argparse.Namespace) -> dict[str, Any]:
    """``s2d2:lookahead+acceptance=greedy`` as decoding options."""
    from s2d2_lmeval.decoding.options.reading import names_of

    head, *given = entry.split("+")
    decoder, _, schedule = head.partition(":")
    options: dict[str, Any] = {"decoder": decoder}
    if schedule:
        options["schedule"] = schedule
    if args.block_length is not None and "block_length" in names_of(decoder, base="dynamic"):
        options["block_length"] = args.block_length
    return {**options, **parse_options(given)}


def _table(found: Sequence[Measurement], width: int) -> Any:
    """The measurements; a narrow terminal leaves out some columns, which the file keeps."""
    from s2d2_lmeval.cli.console import table
    from s2d2_lmeval.studies.report.tables import shown

    columns: dict[str, Callable[[Measurement], str]] = {
        "decoder": lambda one: one["name"],
        "batch": lambda one: str(one["batch"]),
        "tokens/s": lambda one: f"{one['tokens_per_second']:.1f}",
        "over plain": lambda one: shown(one["over_plain"], ".2f"),
        "decode tokens/s": lambda one: shown(one["decode_tokens_per_second"], ".1f"),
        "tokens/forward": lambda one: shown(one["tokens_per_forward"], ".2f"),
        "ms/forward": lambda one: shown(one["milliseconds"], ".2f"),
        "over floor": lambda one: shown(one["over_floor"], ".2f"),
        "outside model": lambda one: shown(one["outside"], ".0%"),
        "forwards": lambda one: " ".join(f"{kind} {count}" for kind, count in one["forwards"].items()),
    }
    if width < WIDE:
        for name in ("decode tokens/s", "over floor", "outside model", "forwards"):
            del columns[name]
    lines = [[cell(one) for cell in columns.values()] for one in found]
    return table(list(columns), lines, texts=[0, 9], title="Decoders")
