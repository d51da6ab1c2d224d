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

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness.arguments import nearest, sort_arguments
from s2d2_lmeval.harness.identity import of_plain
from s2d2_lmeval.studies.points import Point, Search, Task, example
from s2d2_lmeval.studies.reading import (
    LARGEST_NUMBER,
    known,
    mapping,
    name,
    read_yaml,
    refuse_exotic,
    shown,
    text,
    whole,
)

MOST_POINTS = 10_000
MOST_ROWS = 1 << 16
OBJECTIVES = ("accuracy", "tokens_per_second", "tokens_per_forward")

_NOT_HERE = ("custom_generate", "custom_model_class", "max_batch", "batch_size", "device")
_OF_THE_MODEL = ("block_length", "block_size")


_TASK_SETTINGS = tuple(one.name for one in fields(Task) if one.name not in ("task", "metric"))


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

    def __post_init__(self) -> None:
        count = len(self.models) * len(self.tasks) * len(self.decoding) * len(self.seeds)
        _refuse_too_many(count, "the study")

    def points(self) -> list[Point]:
        """All points, those of a model together."""
        return [
            self.point(model, decoding, options, task, seed)
            for model in self.models
            for task in self.tasks
            for decoding, options in self.decoding.items()
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
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise StudyError(f"{path} holds no study: write keys such as models, tasks and decoding.")
    return make_study({"name": path.stem, **raw, **{k: v for k, v in (overrides or {}).items() if v is not None}})


def make_study(raw: Mapping[str, Any]) -> Study:
    """The study that a mapping of keys describes; see :func:`read_study`."""
    try:
        refuse_exotic(raw)
    except ValueError as error:
        raise StudyError(f"the study cannot be read: {error}.") from None
    known(raw, _KEYS, "the study")
    for key in ("models", "tasks"):
        if not raw.get(key):
            raise StudyError(f"the study names no {key}.")
    search = _search(raw["search"]) if raw.get("search") else None
    decoding = _decodings(raw.get("decoding") or {})
    if not decoding and search is None:
        raise StudyError("the study names no decoding configurations, and searches for none: give decoding or search.")
    return Study(
        name=_name(raw.get("name", "study")),
        models=_models(raw["models"]),
        tasks=_tasks(raw),
        decoding=decoding,
        seeds=_seeds(raw.get("seeds", [0])),
        batch_size=_batch_size(raw.get("batch_size", 8)),
        baselines=_baselines(raw.get("baselines") or {}, decoding),
        data_dir=None if raw.get("data_dir") is None else text(raw["data_dir"], "data_dir"),
        include_path=_folders(raw.get("include_path") or ()),
        search=search,
        raw=dict(raw),
    )


def _name(value: Any) -> str:
    """The study's name, which is also that of its folder under ``out/``."""
    given = name(str(value) if isinstance(value, (int, float)) else value, "name")
    if given in (".", "..") or set(given) & set("/\\"):
        raise StudyError(f"name: {given} is no name of a folder; leave out slashes, or choose the place with --output.")
    return given


def _seeds(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value or len(set(map(str, value))) < len(value):
        raise StudyError(f"seeds: {shown(value)} should be a list of different whole numbers, such as [0, 1, 2].")
    return tuple(whole(seed, "seeds", -LARGEST_NUMBER + 1, LARGEST_NUMBER - 1, "whole numbers") for seed in value)


def _batch_size(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    return whole(value, "batch_size", 1, MOST_ROWS, "auto, or a number of rows in flight")


def _baselines(value: Any, decoding: Mapping[str, Any]) -> dict[str, str]:
    baselines = mapping(value, "baselines", "Write ar: NAME or dynamic: NAME.")
    known(baselines, ("ar", "dynamic"), "baselines")
    for kind, of in baselines.items():
        if of not in list(decoding):
            raise StudyError(
                f"baselines: {kind} is {shown(of)}, but no decoding has that name.{nearest(str(of), decoding)}"
            )
    return baselines


def _folders(value: Any) -> tuple[str, ...]:
    several = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text(one, "include_path", "It should be a folder, or a list of them.") for one in several)


def _models(raw: Any) -> dict[str, dict[str, Any]]:
    """Name -> model arguments; a list of names or paths stands for itself."""
    if not isinstance(raw, dict):
        several = [text(source, "models", _MODEL) for source in (raw if isinstance(raw, list) else [raw])]
        raw = {source.rstrip("/").rpartition("/")[2]: {"pretrained": source} for source in several}
        if len(raw) < len(several):
            raise StudyError("two models end in the same name; give them names: models: {NAME: {pretrained: …}}.")
    return {name(model, "models"): _model(model, given) for model, given in mapping(raw, "models", _MODEL).items()}


_MODEL = "Write NAME: {pretrained: FOLDER or hub id} for each model."


def _model(model: str, arguments: Any) -> dict[str, Any]:
    where = f"models: {model}"
    given = {"pretrained": arguments} if isinstance(arguments, str) else mapping(arguments or {}, where, _MODEL)
    for refused in _NOT_HERE:
        if refused in given:
            raise StudyError(f"{where}: {refused} is not for a study; see batch_size and decoding.")
    for key in ("pretrained", "dtype", "revision"):
        if given.get(key) is not None:
            text(given[key], f"{where}: {key}")
    own = ("pretrained", "dtype", "revision")
    rest = {key: value for key, value in given.items() if key not in own}
    options = [key for key in sort_arguments(given.get("pretrained"), rest).decoding if key not in _OF_THE_MODEL]
    if options:
        raise StudyError(f"{where}: {options[0]} is a decoding option; put it under decoding.")
    return given


def _tasks(raw: Mapping[str, Any]) -> tuple[Task, ...]:
    common = {key: raw[key] for key in _TASK_SETTINGS if key in raw}
    listed = raw["tasks"] if isinstance(raw["tasks"], list) else [raw["tasks"]]
    tasks = [_task(entry, common) for entry in listed]
    for task, count in Counter(task.task for task in tasks).items():
        if count > 1:
            raise StudyError(f"tasks: {task} is there twice; make two studies of it.")
    return tuple(tasks)


def _task(entry: Any, common: Mapping[str, Any]) -> Task:
    hint = "Write the name of a task, or {task: NAME, limit: 100}."
    own = {"task": entry} if isinstance(entry, str) else mapping(entry, "tasks", hint)
    known(own, ("task", "metric", *_TASK_SETTINGS), "a task")
    if "task" not in own:
        raise StudyError(f"tasks: {shown(own)} has no task: NAME.")
    task = Task(**{**common, **own})
    text(task.task, "tasks", hint)
    for key in ("metric", "system_instruction"):
        if getattr(task, key) is not None:
            text(getattr(task, key), key)
    if task.limit is not None:
        whole(task.limit, "limit", 1, LARGEST_NUMBER, "a number of documents")
    if task.num_fewshot is not None:
        whole(task.num_fewshot, "num_fewshot", 0, MOST_ROWS, "a number of examples")
    if not isinstance(task.apply_chat_template, (bool, str)) or not isinstance(task.fewshot_as_multiturn, bool):
        raise StudyError(
            "apply_chat_template should be true, false or the name of a template, fewshot_as_multiturn a bool."
        )
    mapping(task.gen_kwargs, "gen_kwargs", "Write {OPTION: VALUE}.")
    return task


def _decodings(raw: Any) -> dict[str, dict[str, Any]]:
    """Name -> options, grids spelled out; every one checked as far as it can be without a model."""
    hint = "Write NAME: {decoder: …, OPTION: …} for each configuration."
    decodings: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for short, entry in mapping(raw, "decoding", hint).items():
        given = mapping(entry or {}, f"decoding: {name(short, 'decoding')}", hint)
        for full_name, options in _grid(short, given):
            check_options(full_name, options)
            if full_name in decodings:
                raise StudyError(f"decoding: two configurations are called {full_name}.")
            content = of_plain({SYNONYMS.get(k, k): v for k, v in options.items()})
            if content in names:
                raise StudyError(f"decoding: {full_name} is the same as {names[content]}; remove one of them.")
            names[content] = full_name
            decodings[full_name] = options
    return decodings


def _grid(short: str, entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    axes = entry.pop("grid", None)
    if axes is None:
        yield short, entry
        return
    hint = f"decoding: {short}: grid should map options to lists of values."
    if not isinstance(axes, dict) or not axes:
        raise StudyError(hint)
    axes = mapping(axes, f"decoding: {short}: grid", "")
    count = 1
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            raise StudyError(hint)
        if axis in entry:
            raise StudyError(f"decoding: {short}: {axis} is in the grid and beside it; keep one of them.")
        count = min(count * len(values), MOST_POINTS + 1)
    _refuse_too_many(count, f"decoding: the grid of {short}")
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        yield f"{short} {' '.join(f'{axis}={shown(value)}' for axis, value in chosen.items())}", {**entry, **chosen}


def _refuse_too_many(count: int, what: str) -> None:
    if count > MOST_POINTS:
        raise StudyError(f"{what} has more than {MOST_POINTS} points; make it smaller, or several studies of it.")


def check_options(where: str, options: Mapping[str, Any]) -> None:
    """Refuse names that are no decoding option. Everything else depends on the checkpoint
    (:func:`s2d2_lmeval.studies.planning.check_decodings`).

    :raises StudyError: naming the configuration.
    """
    names = DecodingConfig.option_names()
    for option in options:
        if option == "seed":
            raise StudyError(f"decoding: {where}: seed is not for here; give seeds to the study.")
        if option not in names:
            raise StudyError(
                f"decoding: {where}: {shown(option)} is not a decoding option.{nearest(option[:80], names)}"
            )


def _search(raw: Any) -> Search:
    raw = mapping(raw, "search", "Write trials, space and decoding.")
    known(raw, [one.name for one in fields(Search)], "search")
    for key in ("trials", "space"):
        if not raw.get(key):
            raise StudyError(f"search has no {key}.")
    objectives = raw.get("objectives", Search.objectives)
    search = Search(
        trials=whole(raw["trials"], "search: trials", 1, MOST_POINTS),
        space={option: _axis(option, axis) for option, axis in mapping(raw["space"], "search: space", _AXIS).items()},
        decoding=mapping(raw.get("decoding") or {}, "search: decoding", "Write OPTION: VALUE."),
        objectives=tuple(objectives) if isinstance(objectives, (list, tuple)) else (objectives,),
        parallel=whole(raw.get("parallel", 1), "search: parallel", 1, MOST_ROWS),
        seed=whole(raw.get("seed", 0), "search: seed", 0, 1 << 31),
    )
    if not search.objectives or len(set(map(str, search.objectives))) < len(search.objectives):
        raise StudyError(f"search: objectives should be some of {', '.join(OBJECTIVES)}, each once.")
    for objective in search.objectives:
        if objective not in OBJECTIVES:
            raise StudyError(
                f"search: {shown(objective)} is no objective.{nearest(str(objective), OBJECTIVES)} "
                f"Known: {', '.join(OBJECTIVES)}."
            )
    both = [option for option in search.space if option in search.decoding]
    if both:
        raise StudyError(f"search: {both[0]} is in the space and beside it; keep one of them.")
    check_options("search", {**search.decoding, **{option: example(axis) for option, axis in search.space.items()}})
    return search


_AXIS = "Write {low: …, high: …} or {choices: […]} for each option."


def _axis(option: str, given: Any) -> dict[str, Any]:
    where = f"search: {option}"
    axis = mapping(given, where, _AXIS)
    known(axis, ("low", "high", "log", "step", "choices"), where)
    if "choices" in axis:
        choices = axis["choices"]
        if len(axis) > 1 or not isinstance(choices, list) or not choices or any(map(_is_nested, choices)):
            raise StudyError(f"{where}: choices stand alone: a list of at least one value.")
        return axis
    numbers = [axis.get(key) for key in ("low", "high", "step") if key in axis]
    if any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in numbers):
        raise StudyError(f"{where}: low, high and step are numbers.")
    if not ("low" in axis and "high" in axis and axis["low"] < axis["high"]):
        raise StudyError(f"{where}: needs low below high.")
    if not isinstance(axis.get("log", False), bool):
        raise StudyError(f"{where}: log is true or false.")
    return axis


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, dict))
