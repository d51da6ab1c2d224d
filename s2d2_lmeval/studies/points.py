"""The parts of a study: tasks, searches and points.

A field's description says what it accepts; error messages and the JSON schema for editors use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import shown
from s2d2_lmeval.harness.arguments import nearest
from s2d2_lmeval.harness.identity import of_source

MOST_POINTS = 10_000
MOST_ROWS = 1 << 16

LOADED = ("pretrained", "draft", "draft_adapter", "tokenizer", "peft")
"""Model arguments that name a folder or a hub id."""


def named(value: Any) -> Any:
    """A mapping of names; numbers are taken as names."""
    if not isinstance(value, Mapping):
        return value
    for key in value:
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise ValueError(f"the name {shown(key)} should be in quotes.")
    names = {str(key): one for key, one in value.items()}
    if len(names) < len(value):
        raise ValueError("two names are the same.")
    return names


def named_models(raw: Any) -> Any:
    """Name -> model arguments; also accepts a list of names or paths."""
    raw = [raw] if isinstance(raw, str) else raw
    if isinstance(raw, list) and all(isinstance(source, str) for source in raw):
        by_name = {source.rstrip("/").rpartition("/")[2]: source for source in raw}
        if len(by_name) < len(raw):
            raise ValueError("two end in the same name; give them names: models: {NAME: {pretrained: …}}.")
        raw = by_name
    if not isinstance(raw, Mapping):
        return raw
    return {name: {"pretrained": given} if isinstance(given, str) else given or {} for name, given in raw.items()}


def check_options(options: Mapping[str, Any], where: str = "") -> None:
    """Refuse names that are not decoding options; other checks depend on the checkpoint.

    Raises:
        ValueError: with the closest option.
    """
    names = DecodingConfig.option_names()
    for option in options:
        if option == "seed":
            raise ValueError(f"{where}seed is not for here; give seeds to the study.")
        if option not in names:
            raise ValueError(f"{where}{shown(option)} is not a decoding option.{nearest(option[:80], names)}")


def _one_line(name: str) -> str:
    if not name.isprintable():
        raise ValueError(f"{shown(name)} should be one line of at most 200 characters.")
    return name


Value = TypeVar("Value")
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]
Named = Annotated[dict[Name, Value], BeforeValidator(named)]
Options = Annotated[dict[str, Any], BeforeValidator(named)]
Rows = Annotated[int, Field(ge=1, le=MOST_ROWS)]
Number = int | float
Objective = Literal["accuracy", "tokens_per_second", "tokens_per_forward"]


class Keys(BaseModel):
    """Keys of a study file: extra keys and other types are refused, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TaskSettings(Keys):
    """How the harness evaluates tasks: the settings of ``lm_eval``."""

    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="a number of documents, at least 1")
    num_fewshot: Annotated[int, Field(ge=0, le=MOST_ROWS)] | None = Field(None, description="a number of examples")
    apply_chat_template: bool | str = Field(False, description="true, false or the name of a template")
    fewshot_as_multiturn: bool = Field(True, description="true or false")
    system_instruction: Text | None = Field(None, description="text")
    gen_kwargs: Options = Field({}, description="a mapping, {OPTION: VALUE}")


class Task(TaskSettings):
    """A task. ``metric`` is the report's accuracy; the task's first metric by default."""

    task: Text = Field(description="the name of a task, a group or a tag")
    metric: Text | None = Field(None, description="METRIC or METRIC,FILTER")


class Axis(Keys):
    """An axis of a search: from ``low`` to ``high``, or ``choices``."""

    low: Number | None = Field(None, description="a number")
    high: Number | None = Field(None, description="a number above low")
    step: Number | None = Field(None, description="a number")
    log: bool = Field(False, description="true or false")
    choices: list[str | Number | bool | None] | None = Field(None, description="a list of at least one value")

    @property
    def given(self) -> dict[str, Any]:
        """The axis as it is written."""
        return self.model_dump(exclude_unset=True)

    @property
    def example(self) -> Any:
        """A value from the axis."""
        return self.choices[0] if self.choices else self.low

    def distribution(self) -> Any:
        """The axis as an optuna distribution.

        Raises:
            ValueError: if optuna is missing, or rejects it.
        """
        try:
            import optuna.distributions as of
        except ImportError:
            raise ValueError("it needs the package optuna: pip install 's2d2-lmeval[sweep]'.") from None
        try:
            if self.choices:
                return of.CategoricalDistribution(self.choices)
            if isinstance(self.low, int) and isinstance(self.high, int):
                return of.IntDistribution(**{"step": 1, **self.given})
            return of.FloatDistribution(**self.given)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ValueError(f"optuna does not take this axis: {str(error)[:300]}") from None

    @model_validator(mode="after")
    def _makes_sense(self) -> Axis:
        if "choices" in self.given:
            if len(self.given) > 1 or not self.choices:
                raise ValueError("choices stand alone: a list of at least one value.")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("it needs low below high, or choices.")
        self.distribution()
        return self


class Search(Keys):
    """Thresholds to search for (:mod:`s2d2_lmeval.studies.search`); all objectives are maximized."""

    trials: Annotated[int, Field(ge=1, le=MOST_POINTS)] = Field(description="a whole number from 1 to 10000")
    space: Named[Axis] = Field(description="{low: …, high: …} or {choices: […]} for each option", min_length=1)
    decoding: Options = Field({}, description="a mapping, {OPTION: VALUE}, of what is not searched")
    objectives: list[Objective] = Field(
        ["accuracy", "tokens_per_second"],
        description="some of accuracy, tokens_per_second and tokens_per_forward, each once",
        min_length=1,
    )
    parallel: Rows = Field(1, description="a whole number from 1: trials at a time")
    seed: Annotated[int, Field(ge=0, le=1 << 31)] = Field(0, description="a whole number from 0")

    @model_validator(mode="after")
    def _makes_sense(self) -> Search:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("an objective is there twice.")
        for option in self.space:
            if option in self.decoding:
                raise ValueError(f"{option} is in the space and beside it; keep one of them.")
        check_options({**self.decoding, **self.space})
        return self


@dataclass(frozen=True)
class Point:
    """One model with one decoding configuration on one task under one seed, once."""

    model: str
    model_args: Mapping[str, Any]
    decoding: str
    options: Mapping[str, Any]
    task: Task
    seed: int
    batch_size: int | str
    repeat: int = field(default=0, kw_only=True)
    """Which of the timings of the same thing."""

    @property
    def label(self) -> str:
        """For people."""
        seed = f", seed {self.seed}" if self.seed else ""
        again = f", repeat {self.repeat}" if self.repeat else ""
        return f"{self.model}, {self.task.task}, {self.decoding}{seed}{again}"

    @property
    def decoding_options(self) -> dict[str, Any]:
        """All of the decoder's options, including the seed."""
        return {**self.options, "seed": self.seed}


def model_identity(arguments: Mapping[str, Any]) -> str:
    """The sources in model arguments: the checkpoint, and any drafter, tokenizer and adapters."""
    loaded = [key for key in LOADED if arguments.get(key) not in (None, "")]
    return ", ".join(f"{key}={of_source(key, arguments)}" for key in loaded)
