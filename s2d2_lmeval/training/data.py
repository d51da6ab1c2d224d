"""The texts that a drafter learns from: prompts, and the target's own answers to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import TrainingError
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.training.checkpointing import writing

ANSWERS = "answers.jsonl"
PER_CALL = 4
"""Prompts that are answered in one go, for each row in flight."""
SHORTEST = 3
"""Tokens of an answer that has something to guess."""


@dataclass(frozen=True)
class Text:
    """Token ids of a prompt and of the target's answer."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def answered(
    model: Callable[[], BlockDiffusionModel],
    prompts: Sequence[list[int]],
    folder: Path,
    options: Mapping[str, Any],
    max_new_tokens: int,
    on_answered: Callable[[int], None],
) -> list[Text]:
    """The target's own answers to ``prompts`` by the decoder ``ar``, with ``options`` (``temperature``, ``seed``).

    They are kept in :data:`ANSWERS` in ``folder``, a whole call at a time, and what is there is not answered again;
    ``model`` is loaded only if anything is left. ``on_answered`` is told how many there are.

    Raises:
        TrainingError: answers there to other prompts.
    """
    path = folder / ANSWERS
    found = list(_read(path))[: len(prompts)]
    if [text.prompt for text in found] != [list(prompt) for prompt in prompts[: len(found)]]:
        raise TrainingError(f"{path} holds answers to other prompts; give another folder, or remove it.")
    on_answered(len(found))
    if len(found) < len(prompts):
        target = model()
        step = PER_CALL * target.max_batch
        how = {"decoder": "ar", "do_sample": options["temperature"] > 0, **options}
        for first in range(len(found), len(prompts), step):
            asked = [list(prompt) for prompt in prompts[first : first + step]]
            seeds = list(range(first, first + len(asked)))
            said = target.generate(asked, how, max_new_tokens=max_new_tokens, seeds=seeds)
            texts = [Text(prompt, one.token_ids) for prompt, one in zip(asked, said, strict=True)]
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(vars(text)) + "\n" for text in texts))
            found += texts
            on_answered(len(found))
    return found


def _read(path: Path) -> Iterator[Text]:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        if line.endswith("\n"):  # the last line of a run that was killed may be cut off
            yield Text(**json.loads(line))
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")


def divided(texts: Sequence[Text], held_out: int) -> tuple[list[Text], list[Text]]:
    """Texts to learn from, and the first ``held_out`` to measure on, at most a fifth; those with nothing to guess are
    left out.

    Raises:
        TrainingError: too few texts.
    """
    usable = [text for text in texts if len(text.answer) >= SHORTEST]
    if len(usable) < 2:
        raise TrainingError(
            f"{len(texts)} answers, {len(usable)} of at least {SHORTEST} tokens: that is nothing to learn from. Give "
            "more prompts."
        )
    count = max(1, min(held_out, len(usable) // 5))
    return usable[count:], usable[:count]
