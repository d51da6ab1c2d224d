"""Commands that train what drafts; what they share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.cli.values import add_shared, nonempty, real, whole

if TYPE_CHECKING:
    from rich.progress import Progress

    from s2d2_lmeval.training.run import Watcher
    from s2d2_lmeval.training.student import Trainable


def add_training(parser: argparse.ArgumentParser, rate: float) -> None:
    """Declare the arguments of every command that trains; ``rate`` is its learning rate."""
    parser.add_argument("model", type=nonempty, metavar="CHECKPOINT", help="folder or hub id")
    prompts = (
        'a text file with one prompt per line, .jsonl with "prompt" or "messages", or tasks of the harness, whose '
    )
    prompts += "training documents are used"
    parser.add_argument("--prompts", type=nonempty, required=True, metavar="FILE|TASKS", help=prompts)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of what is trained, log and card")
    time = parser.add_mutually_exclusive_group(required=True)
    time.add_argument("--minutes", type=real(0.01, 1e6), help="of training, after the prompts are answered")
    time.add_argument("--steps", type=whole(1, 10**9), help="of training; ends the same on every machine of a kind")
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
    steps.add_argument("--windows", type=whole(), default=16, help="drafts in an answer (%(default)s)")
    steps.add_argument("--accumulate", type=whole(), default=1, help="forwards in a step (%(default)s)")
    steps.add_argument("--rate", type=real(1e-7, 1), default=rate, help="learning rate (%(default)s)")
    weights = "places weigh less the later, or by what is still accepted there: D-PACE (%(default)s)"
    steps.add_argument("--weights", choices=("decay", "pace"), default="decay", help=weights)
    steps.add_argument("--held_out", type=whole(), default=32, help="answers to measure on (%(default)s)")
    steps.add_argument("--look", type=real(0, 1e6), default=60.0, help="seconds between looks at them (%(default)s)")
    steps.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    add_shared(parser, "--revision", "--threads")


def trained(args: argparse.Namespace, form: Callable[[int], Trainable], use: str) -> int:
    """Answer, train, write. ``form`` is that for so many tokens of vocabulary; ``use`` says how it is used."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from s2d2_lmeval.cli.console import begin
    from s2d2_lmeval.training.run import Answers, Target, train
    from s2d2_lmeval.training.trainer import Recipe

    console = begin(args.threads)
    prompts, vocabulary = _prompts(args)
    longer = sum(len(prompt) > args.max_prompt for prompt in prompts)
    if longer:
        console.print(f"{longer} of {len(prompts)} prompts are longer than {args.max_prompt} tokens and left out")
    prompts = [prompt for prompt in prompts if len(prompt) <= args.max_prompt]
    named = ("minutes", "steps", "texts", "windows", "accumulate", "rate", "seed", "look")
    recipe = Recipe(**{name: getattr(args, name) for name in named}, pace=args.weights == "pace")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        train(
            Target(args.model, args.revision, args.device, args.dtype),
            prompts,
            args.out,
            form(vocabulary),
            recipe,
            Answers(args.rows, args.temperature, args.max_new_tokens, args.held_out, about=args.prompts),
            _watcher(progress, len(prompts)),
        )
    console.print(f"written to {args.out}; use it with {use}")
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
    from s2d2_lmeval.training.run import Watcher

    answering = progress.add_task("answering", total=prompts, said=f"{prompts} prompts")
    training = progress.add_task("training", total=1.0, said="")

    def looked(record: dict[str, Any]) -> None:
        accepted = f"{record['accepted_per_draft']:.2f} accepted per draft"
        progress.update(training, said=accepted)
        loss = "" if record["loss"] is None else f", loss {record['loss']}"  # none before the first step
        progress.console.print(f"step {record['step']}: {accepted}{loss}", markup=False)

    return Watcher(
        answered=lambda count: progress.update(answering, completed=count),
        trained=lambda share: progress.update(training, completed=share),
        looked=looked,
    )
