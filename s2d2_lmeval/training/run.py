"""From a checkpoint and prompts to what drafts for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import TrainingError
from s2d2_lmeval.families import Facts, checkpoint_facts, load_checkpoint
from s2d2_lmeval.families.drafts import digest
from s2d2_lmeval.families.files import resolve, weight_files
from s2d2_lmeval.model import load
from s2d2_lmeval.training.card import card
from s2d2_lmeval.training.checkpointing import replaced, writing
from s2d2_lmeval.training.data import Text, answered, divided
from s2d2_lmeval.training.processes import Processes
from s2d2_lmeval.training.student import Trainable
from s2d2_lmeval.training.trainer import Recipe, Trainer


@dataclass(frozen=True)
class Target:
    """The checkpoint that is drafted for: folder or hub id, and how it is loaded."""

    source: str
    revision: str | None = None
    device: str | None = None
    dtype: str = "auto"

    def loading(self, processes: Processes) -> dict[str, Any]:
        """How this process loads it."""
        device = processes.device or self.device
        return {"revision": self.revision, "device": device, "dtype": self.dtype}

    def digest(self) -> str:
        """Of the weights."""
        return digest(weight_files(resolve(self.source), revision=self.revision))


@dataclass(frozen=True)
class Answers:
    """How the target answers: ``rows`` side by side, at ``temperature``, up to ``max_new_tokens``. The first
    ``held_out`` are to measure on. ``about`` says for the card what the prompts are.
    """

    rows: int = 8
    temperature: float = 0.0
    max_new_tokens: int = 256
    held_out: int = 32
    about: str = "prompts"


@dataclass(frozen=True)
class Watcher:
    """Is told how many prompts are answered, which share of the training is done, and every record of the log."""

    answered: Callable[[int], None] = lambda count: None
    trained: Callable[[float], None] = lambda share: None
    looked: Callable[[dict[str, Any]], None] = lambda record: None


def train(
    target: Target,
    prompts: Sequence[list[int]],
    folder: Path,
    form: Trainable,
    recipe: Recipe,
    answers: Answers | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train ``form`` for ``target`` on its own answers to ``prompts`` (token ids), and write it to ``folder`` at every
    look; the same call goes on with a run that was stopped. Returns the last record of the log.

    Raises:
        TrainingError: something to train that cannot be trained.
    """
    answers, watcher = answers or Answers(), watcher or Watcher()
    facts = checkpoint_facts(target.source, target.revision)
    check(target.source, facts, form, prompts, answers.max_new_tokens)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    processes = Processes()
    loading = target.loading(processes)

    def answer() -> list[Text]:
        rows, how = answers.rows, {"temperature": answers.temperature, "seed": recipe.seed}
        model = partial(load, target.source, max_batch=rows, **loading)
        return answered(model, prompts, folder, how, answers.max_new_tokens, watcher.answered)

    texts = answer() if processes.rank == 0 else []
    processes.wait()
    learnt, kept = divided(texts or answer(), answers.held_out)
    student = form.student(*load_checkpoint(target.source, **loading), recipe.seed)
    base = target.digest()

    def looked(record: dict[str, Any]) -> None:
        student.save(folder, base, target.source)
        about = (
            f"{len(learnt)} {'sampled' if answers.temperature else 'greedy'} answers of the model to {answers.about}"
        )
        replaced(folder / "README.md", card(target.source, about, form, recipe, trainer.records).encode())
        watcher.looked(record)

    trainer = Trainer(student, form, learnt, kept, recipe, folder, base, processes, looked, watcher.trained)
    return trainer.run()


def check(source: str, facts: Facts, form: Trainable, prompts: Sequence[list[int]], new: int) -> None:
    """Refuse what cannot be trained; TrainingError."""
    form.check(source, facts)
    if not prompts:
        raise TrainingError("there is no prompt to learn from; give a file or a task that has some.")
    longest = max(map(len, prompts))
    if longest + new + form.window > facts.max_context:
        raise TrainingError(
            f"a prompt of {longest} tokens, {new} new ones and a draft of {form.window} do not fit the "
            f"{facts.max_context} positions of {source}. Leave long prompts out with --max_prompt."
        )
