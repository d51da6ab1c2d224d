"""Make an autoregressive checkpoint draft for itself: train an adapter that only its drafts go through.

The checkpoint answers prompts, and a LoRA learns to guess several tokens of these answers at once. With it the decoder
`sliding` gives the checkpoint's own answers in fewer forwards. The same command goes on with a run that was stopped.

examples:
  s2d2-lmeval adapt Qwen/Qwen2.5-1.5B-Instruct --prompts gsm8k --window 8 --minutes 60 --out qwen-drafts
  s2d2-lmeval adapt ./model --prompts prompts.jsonl --steps 5000 --out drafts
  accelerate launch -m s2d2_lmeval adapt ./model --prompts prompts.jsonl --minutes 60 --out drafts
  lm_eval --model s2d2 --model_args pretrained=./model,draft_adapter=drafts --tasks gsm8k
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import add_shared, nonempty, real, whole

if TYPE_CHECKING:
    from rich.progress import Progress

    from s2d2_lmeval.training.adapt import Watcher

SUMMARY = "train an adapter by which an autoregressive checkpoint drafts for itself"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=nonempty, metavar="CHECKPOINT", help="folder or hub id")
    prompts = (
        'a text file with one prompt per line, .jsonl with "prompt" or "messages", or tasks of the harness, whose '
    )
    prompts += "training documents are used"
    parser.add_argument("--prompts", type=nonempty, required=True, metavar="FILE|TASKS", help=prompts)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the adapter, log and card")
    time = parser.add_mutually_exclusive_group(required=True)
    time.add_argument("--minutes", type=real(0.01, 1e6), help="of training, after the prompts are answered")
    time.add_argument("--steps", type=whole(1, 10**9), help="of training; ends the same on every machine of a kind")
    parser.add_argument("--window", type=whole(2, 64), default=8, help="how far drafts look ahead (%(default)s)")
    parser.add_argument("--rank", type=whole(1, 1024), default=16, help="of the LoRA (%(default)s)")
    masks = "a trained vector for each place, or random tokens as in Uno (%(default)s)"
    parser.add_argument("--masks", choices=("vectors", "noise"), default="vectors", help=masks)
    answers = parser.add_argument_group("answers")
    answers.add_argument("--limit", type=whole(), default=2000, help="prompts (%(default)s)")
    answers.add_argument("--max_prompt", type=whole(), default=1024, help="leave out longer prompts (%(default)s)")
    answers.add_argument("--max_new_tokens", "-n", type=whole(3), default=256, help="of an answer (%(default)s)")
    answers.add_argument("--temperature", type=real(0, 10), default=0.0, help="of the answers (greedy)")
    add_shared(answers, "--rows", "--chat")
    files = "folder with the tasks' files, for machines without a connection"
    answers.add_argument("--data_dir", type=nonempty, metavar="DIR", help=files)
    steps = parser.add_argument_group("training")
    steps.add_argument("--texts", type=whole(), default=1, help="answers in a forward (%(default)s)")
    steps.add_argument("--windows", type=whole(), default=16, help="windows in an answer (%(default)s)")
    steps.add_argument("--accumulate", type=whole(), default=1, help="forwards in a step (%(default)s)")
    steps.add_argument("--rate", type=real(1e-7, 1), default=1e-3, help="learning rate (%(default)s)")
    steps.add_argument("--held_out", type=whole(), default=32, help="answers to measure on (%(default)s)")
    steps.add_argument("--look", type=real(0, 1e6), default=60.0, help="seconds between looks at them (%(default)s)")
    steps.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    add_shared(parser, "--revision", "--threads")


def run(args: argparse.Namespace) -> int:
    """Answer, train, write."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from s2d2_lmeval.cli.console import begin
    from s2d2_lmeval.training.adapt import Answers, Target, adapt
    from s2d2_lmeval.training.adapter import Form
    from s2d2_lmeval.training.trainer import Recipe

    console = begin(args.threads)
    prompts, vocabulary = _prompts(args)
    longer = sum(len(prompt) > args.max_prompt for prompt in prompts)
    if longer:
        console.print(f"{longer} of {len(prompts)} prompts are longer than {args.max_prompt} tokens and left out")
    prompts = [prompt for prompt in prompts if len(prompt) <= args.max_prompt]
    noise = (0, vocabulary) if args.masks == "noise" else None
    named = ("minutes", "steps", "texts", "windows", "accumulate", "rate", "seed", "look")
    recipe = Recipe(**{name: getattr(args, name) for name in named})
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        adapt(
            Target(args.model, args.revision, args.device, args.dtype),
            prompts,
            args.out,
            Form(args.window, args.rank, noise),
            recipe,
            Answers(args.rows, args.temperature, args.max_new_tokens, args.held_out, about=args.prompts),
            _watcher(progress, len(prompts)),
        )
    console.print(f"written to {args.out}; use it with draft_adapter={args.out}")
    return 0


def _prompts(args: argparse.Namespace) -> tuple[list[list[int]], int]:
    """Token ids of the prompts, in the chat template if the tokenizer has one; and how many tokens it has."""
    from s2d2_lmeval.cli.prompts import read_prompts, training_prompts
    from s2d2_lmeval.families.files import resolve
    from s2d2_lmeval.prompts import encode, tokenizer_of

    path = Path(args.prompts).expanduser()
    if path.exists() or path.suffix in (".jsonl", ".txt"):
        given = read_prompts(path, args.limit, messages=True)
    else:
        given = training_prompts(args.prompts, args.limit, args.data_dir)
    tokenizer = tokenizer_of(resolve(args.model), {} if args.revision is None else {"revision": args.revision})
    chat = bool(tokenizer.chat_template) if args.chat is None else args.chat
    asked = [[{"role": "user", "content": one}] if chat and isinstance(one, str) else one for one in given]
    return [encode(tokenizer, one) for one in asked], len(tokenizer)


def _watcher(progress: Progress, prompts: int) -> Watcher:
    """Shows how far answers and training are, and each look at held-out answers."""
    from s2d2_lmeval.training.adapt import Watcher

    answering = progress.add_task("answering", total=prompts, said=f"{prompts} prompts")
    training = progress.add_task("training", total=1.0, said="")

    def looked(record: dict[str, Any]) -> None:
        accepted = f"{record['accepted_per_draft']:.2f} accepted per draft"
        progress.update(training, said=accepted)
        progress.console.print(f"step {record['step']}: {accepted}, loss {record['loss']}", markup=False)

    return Watcher(
        answered=lambda count: progress.update(answering, completed=count),
        trained=lambda share: progress.update(training, completed=share),
        looked=looked,
    )
