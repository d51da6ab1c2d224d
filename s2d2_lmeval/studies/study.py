"""A study: models, decoding configurations, tasks and seeds, read from a YAML file and checked before anything runs.

::

    name: routing
    models:
      sdar-8b: {pretrained: JetLM/SDAR-8B-Chat, dtype: bfloat16}
    tasks:
      - s2d2_gsm8k
      - {task: gsm8k, num_fewshot: 5, metric: "exact_match,flexible-extract"}
    decoding:
      ar: {decoder: ar}
      dynamic: {decoder: dynamic, grid: {confidence_threshold: [0.8, 0.9]}}
      s2d2: {preset: sdar-b}
    seeds: [0]
    batch_size: 8
    apply_chat_template: true

Every model is evaluated with every decoding configuration on every task under every seed: a *point* each.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from s2d2_lmeval.decoding.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness.arguments import nearest, sort_arguments

_NOT_HERE = ("custom_generate", "custom_model_class", "max_batch", "batch_size", "device")


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


_TASK_SETTINGS = tuple(one.name for one in fields(Task) if one.name not in ("task", "metric"))


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
        """Everything that the point's results depend on. How many documents are evaluated is not part of it."""
        task = {name: value for name, value in asdict(self.task).items() if name not in ("metric", "limit")}
        arguments = {name: value for name, value in self.model_args.items() if name != "pretrained"}
        return {
            "model": {"identity": identity, "arguments": arguments},
            "options": {SYNONYMS.get(name, name): value for name, value in self.decoding_options.items()},
            "task": task,
            "batch_size": self.batch_size,
            "code": code,
        }

    def digest(self, identity: str, code: str) -> str:
        """The name of the point's file."""
        text = json.dumps(self.definition(identity, code), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """What :func:`read_study` makes of a file; ``raw`` is its content."""

    name: str
    models: Mapping[str, Mapping[str, Any]]
    tasks: tuple[Task, ...]
    decoding: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...] = (0,)
    batch_size: int | str = 8
    baselines: Mapping[str, str] = field(default_factory=dict)
    data_dir: str | None = None
    include_path: tuple[str, ...] = ()
    search: Search | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)

    def points(self) -> list[Point]:
        """All points, those of a model together."""
        return [
            self.point(model, name, options, task, seed)
            for model in self.models
            for task in self.tasks
            for name, options in self.decoding.items()
            for seed in self.seeds
        ]

    def point(self, model: str, decoding: str, options: Mapping[str, Any], task: Task, seed: int) -> Point:
        """One of them."""
        return Point(model, self.models[model], decoding, dict(options), task, seed, self.batch_size)


_KEYS = (
    *("name", "models", "tasks", "decoding", "seeds", "batch_size", "baselines", "data_dir", "include_path", "search"),
    *_TASK_SETTINGS,
)


def read_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """The study in ``path``; ``overrides`` take the place of keys of the file.

    :raises StudyError: for a file that cannot be read, a key that is none, or values that make no study; ConfigError
        for decoding options that no decoder would take.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"{path} cannot be read as a study: {error}") from None
    if not isinstance(raw, dict):
        raise StudyError(f"{path} holds no study: write keys such as models, tasks and decoding.")
    return make_study({"name": path.stem, **raw, **{k: v for k, v in (overrides or {}).items() if v is not None}})


def make_study(raw: Mapping[str, Any]) -> Study:
    """The study that a mapping of keys describes; see :func:`read_study`."""
    _known(raw, _KEYS, "the study")
    for name in ("models", "tasks"):
        if not raw.get(name):
            raise StudyError(f"the study names no {name}.")
    search = _search(raw["search"]) if raw.get("search") else None
    decoding = _decodings(raw.get("decoding") or {})
    if not decoding and search is None:
        raise StudyError("the study names no decoding configurations, and searches for none: give decoding or search.")
    seeds = tuple(raw.get("seeds", (0,)))
    if not seeds or not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) < len(seeds):
        raise StudyError(f"seeds: {list(seeds)} should be different whole numbers.")
    batch_size = raw.get("batch_size", 8)
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise StudyError(f"batch_size: {batch_size!r} should be a number of rows in flight, or auto.")
    baselines = dict(raw.get("baselines") or {})
    _known(baselines, ("ar", "dynamic"), "baselines")
    for kind, name in baselines.items():
        if name not in decoding:
            raise StudyError(f"baselines: {kind} is {name}, but no decoding has that name.{nearest(name, decoding)}")
    include = raw.get("include_path") or ()
    return Study(
        name=str(raw.get("name", "study")),
        models=_models(raw["models"]),
        tasks=_tasks(raw),
        decoding=decoding,
        seeds=seeds,
        batch_size=batch_size,
        baselines=baselines,
        data_dir=raw.get("data_dir"),
        include_path=(include,) if isinstance(include, str) else tuple(include),
        search=search,
        raw=dict(raw),
    )


def _known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise StudyError(f"{name} is no key of {where}.{nearest(str(name), known)} Known: {', '.join(known)}.")


def _models(raw: Any) -> dict[str, dict[str, Any]]:
    """Name -> model arguments; a list of names or paths stands for itself."""
    if not isinstance(raw, dict):
        several = raw if isinstance(raw, list) else [raw]
        raw = {str(source).rstrip("/").rpartition("/")[2]: {"pretrained": source} for source in several}
        if len(raw) < len(several):
            raise StudyError("two models end in the same name; give them names: models: {NAME: {pretrained: …}}.")
    models = {}
    for name, arguments in raw.items():
        given = {"pretrained": arguments} if isinstance(arguments, str) else dict(arguments or {})
        for refused in _NOT_HERE:
            if refused in given:
                raise StudyError(f"models: {name}: {refused} is not for a study; see batch_size and decoding.")
        source = given.pop("pretrained", None)
        own = {key: given[key] for key in ("dtype", "revision") if key in given}
        sorted_arguments = sort_arguments(source, {key: value for key, value in given.items() if key not in own})
        options = [key for key in sorted_arguments.decoding if key not in ("block_length", "block_size")]
        if options:
            raise StudyError(f"models: {name}: {options[0]} is a decoding option; put it under decoding.")
        models[str(name)] = {"pretrained": source, **given}
    return models


def _tasks(raw: Mapping[str, Any]) -> tuple[Task, ...]:
    common = {name: raw[name] for name in _TASK_SETTINGS if name in raw}
    listed = raw["tasks"] if isinstance(raw["tasks"], list) else [raw["tasks"]]
    tasks = []
    for entry in listed:
        settings = {"task": entry} if isinstance(entry, str) else dict(entry)
        _known(settings, ("task", "metric", *_TASK_SETTINGS), "a task")
        if "task" not in settings:
            raise StudyError(f"tasks: {settings} has no task: NAME.")
        tasks.append(Task(**{**common, **settings}))
    twice = [task.task for task in tasks if sum(other.task == task.task for other in tasks) > 1]
    if twice:
        raise StudyError(f"tasks: {twice[0]} is there twice; make two studies of it.")
    for task in tasks:
        if task.limit is not None and (not isinstance(task.limit, int) or task.limit < 1):
            raise StudyError(f"limit: {task.limit!r} should be a number of documents.")
    return tuple(tasks)


def _decodings(raw: Any) -> dict[str, dict[str, Any]]:
    """Name -> options, grids spelled out; every one checked as far as it can be without a model."""
    if not isinstance(raw, dict):
        raise StudyError("decoding: write NAME: {decoder: …, OPTION: …} for each configuration.")
    decodings: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for name, entry in raw.items():
        for full_name, options in _grid(str(name), dict(entry or {})):
            if "seed" in options:
                raise StudyError(f"decoding: {full_name}: seed is not for here; give seeds to the study.")
            check_options(full_name, options)
            if full_name in decodings:
                raise StudyError(f"decoding: two configurations are called {full_name}.")
            content = json.dumps({SYNONYMS.get(k, k): v for k, v in options.items()}, sort_keys=True, default=str)
            if content in names:
                raise StudyError(f"decoding: {full_name} is the same as {names[content]}; remove one of them.")
            names[content] = full_name
            decodings[full_name] = options
    return decodings


def _grid(name: str, entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    axes = entry.pop("grid", None)
    if axes is None:
        yield name, entry
        return
    if (
        not isinstance(axes, dict)
        or not axes
        or not all(isinstance(values, list) and values for values in axes.values())
    ):
        raise StudyError(f"decoding: {name}: grid should map options to lists of values.")
    for axis in axes:
        if axis in entry:
            raise StudyError(f"decoding: {name}: {axis} is in the grid and beside it; keep one of them.")
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        yield f"{name} {' '.join(f'{axis}={value}' for axis, value in chosen.items())}", {**entry, **chosen}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse names that are no decoding option. Everything else depends on the checkpoint
    (:func:`s2d2_lmeval.studies.planning.check_decodings`).

    :raises StudyError: naming the configuration.
    """
    known = DecodingConfig.option_names()
    for option in options:
        if option not in known:
            raise StudyError(f"decoding: {name}: {option} is not a decoding option.{nearest(str(option), known)}")


def _search(raw: Any) -> Search:
    if not isinstance(raw, dict):
        raise StudyError("search: write trials, space and decoding.")
    _known(raw, [one.name for one in fields(Search)], "search")
    for name in ("trials", "space"):
        if not raw.get(name):
            raise StudyError(f"search has no {name}.")
    search = Search(**{**raw, "objectives": tuple(raw.get("objectives", Search.objectives))})
    known = ("accuracy", "tokens_per_second", "tokens_per_forward")
    for objective in search.objectives:
        if objective not in known:
            raise StudyError(
                f"search: {objective} is no objective.{nearest(objective, known)} Known: {', '.join(known)}."
            )
    for option, axis in search.space.items():
        if not isinstance(axis, dict):
            raise StudyError(f"search: {option}: write {{low: …, high: …}} or {{choices: […]}}.")
        _known(axis, ("low", "high", "log", "step", "choices"), f"search: {option}")
        if "choices" in axis:
            if len(axis) > 1 or not axis["choices"]:
                raise StudyError(f"search: {option}: choices stand alone, and there is at least one.")
        elif not ("low" in axis and "high" in axis and axis["low"] < axis["high"]):
            raise StudyError(f"search: {option}: needs low below high.")
    check_options("search", {**search.decoding, **{name: example(axis) for name, axis in search.space.items()}})
    return search


def example(axis: Mapping[str, Any]) -> Any:
    """A value from an axis of a search."""
    return axis["choices"][0] if "choices" in axis else axis["low"]
