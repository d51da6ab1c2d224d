"""From a checkpoint and prompts to an adapter by which the checkpoint drafts for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2d2_lmeval.errors import TrainingError
from s2d2_lmeval.families import Facts, checkpoint_facts, load_checkpoint
from s2d2_lmeval.families.drafts import digest
from s2d2_lmeval.families.facts import AUTOREGRESSIVE
from s2d2_lmeval.families.files import resolve, weight_files
from s2d2_lmeval.model import BlockDiffusionModel, load
from s2d2_lmeval.training.adapter import AdaptedModel, Form
from s2d2_lmeval.training.card import card
from s2d2_lmeval.training.checkpointing import replaced, writing
from s2d2_lmeval.training.data import Text, answered, divided
from s2d2_lmeval.training.processes import Processes
from s2d2_lmeval.training.trainer import Recipe, Trainer


@dataclass(frozen=True)
class Answers:
    """How the target answers: ``rows`` side by side, at ``temperature``, up to ``max_new_tokens``."""

    rows: int = 8
    temperature: float = 0.0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Watcher:
    """Is told how many prompts are answered, which share of the training is done, and every record of the log."""

    answered: Callable[[int], None] = lambda count: None
    trained: Callable[[float], None] = lambda share: None
    looked: Callable[[dict[str, Any]], None] = lambda record: None


def adapt(
    source: str,
    prompts: Sequence[list[int]],
    folder: Path,
    form: Form,
    recipe: Recipe,
    answers: Answers,
    *,
    about: str = "prompts",
    held_out: int = 32,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train a draft adapter for the checkpoint ``source`` on its own answers to ``prompts``, and write it to
    ``folder`` at every look; the same call goes on with a run that was stopped.

    Args:
        about: what the prompts are, for the card.

    Returns:
        The last record of the log.

    Raises:
        TrainingError: something to train that cannot be trained.
    """
    watcher = watcher or Watcher()
    facts = checkpoint_facts(source, revision)
    check(source, facts, form, prompts, answers.max_new_tokens)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    processes = Processes()
    options: dict[str, Any] = {"device": processes.device or device, "dtype": dtype, "revision": revision}

    def target() -> BlockDiffusionModel:
        return load(source, max_batch=answers.rows, **options)

    def answer() -> list[Text]:
        how: dict[str, Any] = {
            "temperature": answers.temperature,
            "max_new_tokens": answers.max_new_tokens,
            "seed": recipe.seed,
        }
        return answered(target, prompts, folder, on_answered=watcher.answered, **how)

    texts = answer() if processes.rank == 0 else []
    processes.wait()
    learnt, kept = divided(texts or answer(), held_out)
    model, _ = load_checkpoint(source, **options)
    adapted = AdaptedModel(model, form, recipe.seed)
    base = digest(weight_files(resolve(source), revision=revision))

    def looked(record: dict[str, Any]) -> None:
        adapted.save(folder, base, source)
        written = card(source, about, form, recipe, answers.temperature, len(learnt), trainer.records)
        replaced(folder / "README.md", written.encode())
        watcher.looked(record)

    trainer = Trainer(adapted, learnt, kept, recipe, folder, processes, looked, watcher.trained)
    torch.manual_seed(recipe.seed)
    return trainer.run()


def check(source: str, facts: Facts, form: Form, prompts: Sequence[list[int]], new: int) -> None:
    """Refuse what cannot be adapted; TrainingError."""
    if facts.scheme != AUTOREGRESSIVE:
        raise TrainingError(
            f"{source} ({facts.family}) drafts for itself already. Adapters are trained for autoregressive checkpoints."
        )
    if not prompts:
        raise TrainingError("there is no prompt to learn from; give a file or a task that has some.")
    longest = max(map(len, prompts))
    if longest + new + form.window > facts.max_context:
        raise TrainingError(
            f"a prompt of {longest} tokens, {new} new ones and a window of {form.window} do not fit the "
            f"{facts.max_context} positions of {source}. Leave long prompts out with --max_prompt."
        )
