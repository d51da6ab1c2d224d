"""What a study is made of: tasks, searches, and points, each with everything that its answers depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from s2d2_lmeval.decoding.options.config import SYNONYMS
from s2d2_lmeval.harness.identity import HUB_ONLY, of_plain, of_source, with_files

_LOADED = ("pretrained", "draft", "tokenizer", "peft")
"""Model arguments that name a folder or a hub id."""


@dataclass(frozen=True)
class Task:
    """A task and how the harness is to evaluate it; the settings are those of ``lm_eval``.

    ``metric`` is what the report calls accuracy, as ``metric`` or ``metric,filter``; the task's first one if not given.
    """

    task: str
    metric: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """Thresholds to look for (see :mod:`s2d2_lmeval.studies.search`).

    ``space`` maps option names to ``{low, high[, log]}`` or ``{choices}``; ``decoding`` holds the fixed options.
    ``objectives`` are maximized. ``parallel`` trials are chosen and run at a time.
    """

    trials: int
    space: Mapping[str, Mapping[str, Any]]
    decoding: Mapping[str, Any] = field(default_factory=dict)
    objectives: tuple[str, ...] = ("accuracy", "tokens_per_second")
    parallel: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """One model with one decoding configuration on one task under one seed."""

    model: str
    model_args: Mapping[str, Any]
    decoding: str
    options: Mapping[str, Any]
    task: Task
    seed: int
    batch_size: int | str

    @property
    def label(self) -> str:
        """For people."""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.model}, {self.task.task}, {self.decoding}{seed}"

    @property
    def decoding_options(self) -> dict[str, Any]:
        """All of the decoder's options, the seed among them."""
        return {**self.options, "seed": self.seed}

    def definition(self, identity: str, code: str) -> dict[str, Any]:
        """Everything that an answer of the point depends on but the documents.

        Those are looked at when it is evaluated: each sample is kept with the prompt that it answers.
        """
        task = {key: value for key, value in asdict(self.task).items() if key not in ("metric", "limit")}
        unnamed = (*_LOADED, *HUB_ONLY, "revision")  # the identity says it better
        options = {SYNONYMS.get(key, key): value for key, value in self.decoding_options.items()}
        return {
            "model": {
                "identity": identity,
                "arguments": {key: value for key, value in self.model_args.items() if key not in unnamed},
            },
            "options": with_files(options),
            "task": {**task, "gen_kwargs": with_files(self.task.gen_kwargs)},
            "batch_size": self.batch_size,
            "code": code,
        }

    def digest(self, identity: str, code: str) -> str:
        """The name of the point's file."""
        return of_plain(self.definition(identity, code))


def model_identity(arguments: Mapping[str, Any]) -> str:
    """What model arguments load: the checkpoint, and every drafter, tokenizer and adapter that they name."""
    named = [key for key in _LOADED if arguments.get(key) not in (None, "")]
    return ", ".join(f"{key}={of_source(key, arguments)}" for key in named)


def example(axis: Mapping[str, Any]) -> Any:
    """A value from an axis of a search."""
    return axis["choices"][0] if "choices" in axis else axis["low"]
