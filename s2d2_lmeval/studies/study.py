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

Every combination of model, decoding configuration, task and seed is a *point*.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.decoding.options.option import kind_of
from s2d2_lmeval.errors import StudyError, shown
from s2d2_lmeval.harness.arguments import nearest, sort_arguments
from s2d2_lmeval.harness.identity import of_plain
from s2d2_lmeval.studies import points as parts
from s2d2_lmeval.studies.files import read_yaml, refuse_exotic
from s2d2_lmeval.studies.points import (
    MOST_POINTS,
    Axis,
    Named,
    Options,
    Point,
    Search,
    Task,
    TaskSettings,
    named_models,
)

Baseline = Literal["ar", "dynamic"]

_NOT_HERE = ("custom_generate", "custom_model_class", "max_batch", "batch_size", "device")
_OF_THE_MODEL = ("block_length", "block_size")
_TEXTS = ("pretrained", "dtype", "revision")


def _folder_name(name: str) -> str:
    if name in (".", "..") or set(name) & set("/\\"):
        raise ValueError(f"{name} is not the name of a folder; leave out slashes, or choose the place with --output.")
    return name


def _check_models(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for model, given in models.items():
        for key, value in given.items():
            if key in _NOT_HERE:
                raise ValueError(f"{model}: {key} is not for a study; see batch_size and decoding.")
            if key in _TEXTS and value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{model}: {key}: {shown(value)} should be text.")
        rest = {key: value for key, value in given.items() if key not in _TEXTS}
        for key in sort_arguments(given.get("pretrained"), rest).decoding:
            if key not in _OF_THE_MODEL:
                raise ValueError(f"{model}: {key} is a decoding option; put it under decoding.")
    return models


def _tasks(raw: Any, info: Any) -> Any:
    """A list of tasks, each with the study's settings for those that it does not set itself."""
    common = {key: value for key, value in info.data.items() if key in TaskSettings.model_fields}
    listed = raw if isinstance(raw, list) else [raw]
    given = [{"task": one} if isinstance(one, str) else one for one in listed]
    return [{**common, **one} if isinstance(one, Mapping) else one for one in given]


def _without_grids(decodings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Expand grids, and check every configuration as far as possible without a model."""
    spelled: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for short, entry in decodings.items():
        for full_name, options in _spelled_out(short, entry):
            parts.check_options(options, f"{full_name}: ")
            if full_name in spelled:
                raise ValueError(f"two configurations are called {full_name}.")
            content = of_plain({SYNONYMS.get(option, option): value for option, value in options.items()})
            if content in names:
                raise ValueError(f"{full_name} is the same as {names[content]}; remove one of them.")
            names[content] = full_name
            spelled[full_name] = options
    return spelled


def _spelled_out(short: str, entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rest = {option: value for option, value in entry.items() if option != "grid"}
    axes = parts.named(entry.get("grid"))
    if axes is None:
        return [(short, rest)]
    if not isinstance(axes, dict) or not axes or not all(isinstance(one, list) and one for one in axes.values()):
        raise ValueError(f"{short}: grid should map options to lists of values.")
    count = 1
    for axis, values in axes.items():
        if axis in rest:
            raise ValueError(f"{short}: {axis} is in the grid and beside it; keep one of them.")
        count = min(count * len(values), MOST_POINTS + 1)
    _refuse_too_many(count, f"the grid of {short}")
    chosen = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [
        (" ".join([short, *(f"{axis}={str(value)[:80]}" for axis, value in one.items())]), {**rest, **one})
        for one in chosen
    ]


def _refuse_too_many(count: int, what: str) -> None:
    if count > MOST_POINTS:
        raise ValueError(f"{what} has more than {MOST_POINTS} points; make it smaller, or several studies of it.")


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{shown(seeds)} should be a list of different whole numbers, such as [0, 1, 2].")
    return seeds


class Study(TaskSettings):
    """A study as read by :func:`read_study`, with expanded grids and the common settings in every task."""

    name: Annotated[parts.Name, AfterValidator(_folder_name)] = Field(
        "study", description="the name of a folder under out/"
    )
    models: Annotated[
        Named[Options],
        BeforeValidator(named_models, json_schema_input_type=str | list[str] | dict[str, str | dict[str, Any]]),
        AfterValidator(_check_models),
    ] = Field(description="a mapping, NAME: {pretrained: FOLDER or hub id} for each model", min_length=1)
    tasks: Annotated[list[Task], BeforeValidator(_tasks, json_schema_input_type=str | Task | list[str | Task])] = Field(
        description="names of tasks, or {task: NAME, limit: 100}", min_length=1
    )
    decoding: Annotated[Named[Options], AfterValidator(_without_grids)] = Field(
        {}, description="a mapping, NAME: {decoder: …, OPTION: …} for each configuration"
    )
    seeds: Annotated[list[int], AfterValidator(_different)] = Field(
        [0], description="a list of different whole numbers, such as [0, 1, 2]", min_length=1
    )
    repeats: Annotated[int, Field(ge=1, le=100)] = Field(
        1, description="a whole number from 1 to 100: how often each configuration is timed"
    )
    batch_size: parts.Rows | Literal["auto"] = Field(
        8, description="auto, or a number of rows in flight from 1 to 65536"
    )
    baselines: dict[Baseline, str] = Field({}, description="ar: NAME and dynamic: NAME, of configurations")
    data_dir: parts.Text | None = Field(None, description="a folder of benchmark files")
    include_path: Annotated[
        list[parts.Text],
        BeforeValidator(lambda one: [one] if isinstance(one, str) else one, json_schema_input_type=str | list[str]),
    ] = Field([], description="a folder of tasks of your own, or a list of them")
    search: Search | None = Field(None, description="a mapping of trials, space and decoding")
    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def raw(self) -> dict[str, Any]:
        """The file's own content."""
        return self._raw

    @model_validator(mode="after")
    def _makes_sense(self) -> Study:
        if not self.decoding and self.search is None:
            raise ValueError(
                "the study has no decoding configurations, and searches for none: give decoding or search."
            )
        for kind, name in self.baselines.items():
            if name not in self.decoding:
                near = nearest(name, self.decoding)
                raise ValueError(f"baselines: {kind} is {shown(name)}, but no decoding has that name.{near}")
        count = len(self.models) * len(self.tasks) * len(self.decoding) * len(self.seeds) * self.repeats
        _refuse_too_many(count, "the study")
        return self

    def points(self) -> list[Point]:
        """All points, those of a model together; repeats in turn, so that what slows a machine down for a while is not
        taken for a configuration's speed.
        """
        return [
            self.point(model, decoding, options, task, seed, repeat)
            for model in self.models
            for task in self.tasks
            for repeat in range(self.repeats)
            for decoding, options in self.decoding.items()
            for seed in self.seeds
        ]

    def point(
        self, model: str, decoding: str, options: Mapping[str, Any], task: Task, seed: int, repeat: int = 0
    ) -> Point:
        """One of them."""
        return Point(model, self.models[model], decoding, dict(options), task, seed, self.batch_size, repeat=repeat)

    def part(self, tasks: Sequence[str] | None, decoder: str | None) -> Study:
        """The study restricted to some tasks, and to the configurations of one decoder and of ar.

        Raises:
            StudyError: for a task or decoder that is not in the study.
        """
        names = [task.task for task in self.tasks]
        decoders = list(dict.fromkeys(str(options.get("decoder")) for options in self.decoding.values()))
        for flag, asked, known in (("task", tasks, names), ("decoder", decoder and [decoder], decoders)):
            for one in asked or ():
                if one not in known:
                    raise StudyError(f"--{flag} {one}: the study has {', '.join(known)}.{nearest(one, known)}")
        kept = (decoder, "ar")
        decoding = {n: given for n, given in self.decoding.items() if decoder is None or given.get("decoder") in kept}
        changes = {
            "tasks": [task for task in self.tasks if not tasks or task.task in tasks],
            "decoding": decoding,
            "baselines": {kind: name for kind, name in self.baselines.items() if name in decoding},
        }
        return self.model_copy(update=changes)


def read_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """The study in ``path``; ``overrides`` replace keys of the file.

    Raises:
        StudyError: for an unreadable file, an unknown key, or invalid values.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise StudyError(f"{path} holds no study: write keys such as models, tasks and decoding.")
    return make_study({"name": path.stem, **raw, **{k: v for k, v in (overrides or {}).items() if v is not None}})


def make_study(raw: Mapping[str, Any]) -> Study:
    """The study that a mapping of keys describes; see :func:`read_study`."""
    try:
        refuse_exotic(raw)
        study = Study.model_validate({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise StudyError(_sentence(next((e for e in errors if e["type"] in _KEYS), errors[0]))) from None
    except ValueError as error:
        raise StudyError(f"the study cannot be read: {error}.") from None
    study._raw.update(raw)
    return study


_INSIDE: dict[str, type[BaseModel]] = {"tasks": Task, "search": Search, "space": Axis}
_KEYS = ("extra_forbidden", "invalid_key")
_TAGS = ("bool", "str", "int", "float", "none", "constrained-int", "literal['auto']")
"""For a union of types, pydantic names the type that it tried."""


def _sentence(error: Mapping[str, Any]) -> str:
    """Pydantic's first finding as one sentence: the place, its value, and what it should be."""
    model: type[BaseModel] | None = Study
    where: list[str] = []
    expected = near = ""
    for part in error["loc"]:
        if part == "[key]":
            where.pop()
            expected = "ar or dynamic" if where == ["baselines"] else "a name of at most 200 characters"
        elif isinstance(part, str) and part not in _TAGS:
            if model is not None and part in model.model_fields:
                expected, model = model.model_fields[part].description or "", _INSIDE.get(part)
            where.append(part)
    if error["type"] in _KEYS and model is not None:
        known, unknown = list(model.model_fields), error["loc"][-1]
        near = f"{nearest(str(unknown)[:80], known)} Known: {', '.join(known)}"
        where = where[:-1] if isinstance(unknown, str) else where
        return ": ".join([*where, f"{shown(unknown)} is not a key of a {model.__name__.lower()}.{near}."])
    if error["type"] in ("missing", "too_short"):
        return f"{': '.join(where[:-1]) or 'the study'} has no {where[-1]}: it should be {expected}."
    if error["type"] == "value_error":
        return ": ".join([*where, str(error["ctx"]["error"])])
    if error["type"] == "literal_error":
        near = nearest(str(error["input"])[:80], re.findall(r"'(\w+)'", error["ctx"]["expected"]))
    return ": ".join([*where, f"{shown(error['input'])} should be {expected}.{near}"])


def schema() -> dict[str, Any]:
    """A JSON schema of study files, with every decoding option, for completion and validation in editors."""
    options = {field.name: _of_option(field) for field in DecodingConfig.fields()}
    options = dict(sorted({**options, **{name: options[target] for name, target in SYNONYMS.items()}}.items()))
    same = {name: {"$ref": f"#/$defs/Options/properties/{name}"} for name in options}
    grid = {name: {"type": "array", "items": one} for name, one in same.items()}
    whole = Study.model_json_schema()
    inside = whole["$defs"]
    inside["Options"] = {"type": "object", "properties": options, "additionalProperties": False}
    inside["Grid"] = {**inside["Options"], "properties": grid}
    inside["Decoding"] = {**inside["Options"], "properties": {**same, "grid": {"$ref": "#/$defs/Grid"}}}
    whole["properties"]["decoding"]["additionalProperties"] = {"$ref": "#/$defs/Decoding"}
    inside["Search"]["properties"]["decoding"] = {"$ref": "#/$defs/Options"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "title": "A study of s2d2-lmeval"}


def _of_option(field: Any) -> dict[str, Any]:
    about = field.metadata
    typed = {"bool": "boolean", "int": "integer", "float": "number"}.get(kind_of(field))
    limits = {"type": typed, "minimum": about["low"], "maximum": about["high"]} if typed else {}
    choices = about["choices"] and list(about["choices"])
    described = {"description": about["meaning"], **({"enum": choices} if choices else limits)}
    return {name: value for name, value in described.items() if value is not None}
