"""Checks before the first model is loaded: tasks, options, the results folder."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.errors import CheckpointError, ConfigError, S2D2Error, StudyError
from s2d2_lmeval.harness.arguments import GenerationArguments
from s2d2_lmeval.harness.identity import HUB_ONLY, code_version, of_plain, with_files
from s2d2_lmeval.harness.upstream import redacted
from s2d2_lmeval.studies.files import MANIFEST, read_manifest
from s2d2_lmeval.studies.points import LOADED, Axis, Point, Task, model_identity
from s2d2_lmeval.studies.store import write_whole
from s2d2_lmeval.studies.study import Study
from s2d2_lmeval.studies.tasks import check_metric, load_tasks, prepare, task_manager, what_is_asked


@dataclass(frozen=True)
class Job(Point):
    """A point to evaluate, with the model's identity, the results folder, and the locations of tasks and data.

    A stored result counts only if ``settings`` and :func:`s2d2_lmeval.studies.tasks.what_is_asked` match.
    Plain data: it can be sent to another process.
    """

    identity: str
    code: str
    folder: Path = Path()
    settings: Mapping[str, Any] = field(default_factory=dict)
    data_dir: str | None = None
    include_path: Sequence[str] = ()
    unsafe_code: bool = False

    @cached_property
    def definition(self) -> dict[str, Any]:
        """Everything that an answer of the point depends on, except the documents.

        Those are checked at evaluation: each sample is stored with its prompt.
        """
        unnamed = (*LOADED, *HUB_ONLY, "revision")  # the identity says it better
        arguments = {key: value for key, value in self.model_args.items() if key not in unnamed}
        options = {SYNONYMS.get(key, key): value for key, value in self.decoding_options.items()}
        task = self.task.model_dump(exclude={"metric", "limit"})
        return {
            "model": {"identity": self.identity, "arguments": arguments},
            "options": with_files(options),
            "task": {**task, "gen_kwargs": with_files(self.task.gen_kwargs)},
            "batch_size": self.batch_size,
            "code": self.code,
            **({"repeat": self.repeat} if self.repeat else {}),
        }

    @cached_property
    def digest(self) -> str:
        """The point's name, and that of its file."""
        return of_plain(self.definition)

    @property
    def path(self) -> Path:
        """The point's file."""
        return self.folder / "points" / f"{self.digest}.jsonl"

    @property
    def samples(self) -> int:
        """How many answers it has: documents, and repeats of each."""
        return int(self.settings["samples"])


class Plan:
    """A study in a folder, with loaded and checked tasks, identified models and named points."""

    def __init__(
        self, study: Study, folder: Path, *, unsafe_code: bool = False, anew: bool = False, preview: bool = False
    ) -> None:
        """
        Args:
            unsafe_code: tasks that run what a model wrote may be evaluated.
            anew: continue in a folder with results of other code or other weights, which stay but do not count.
            preview: only show the plan: missing documents or model configurations are ``unknown`` rather than refused.

        Raises:
            StudyError: for anything that would make a point fail or mix results.
        """
        self.folder = folder
        self.unsafe_code = unsafe_code
        self.settings: dict[str, dict[str, Any]] = {}
        self.unknown: list[str] = []
        with quiet():
            self.study = study.model_copy(update={"tasks": self._expand(study, preview)})
        self.unknown += _check_decodings(self.study)
        self.code = code_version()
        self.identities = {} if preview else {name: model_identity(given) for name, given in study.models.items()}
        self._check_folder(anew)
        self.named: dict[str, Job] = {}

    def _expand(self, study: Study, preview: bool) -> list[Task]:
        """Expand groups and tags to single tasks with their requests."""
        manager = task_manager(study.data_dir, study.include_path, [task.task for task in study.tasks])
        expanded: list[Task] = []
        for task in study.tasks:
            try:
                loaded = load_tasks(manager, task.task)
            except S2D2Error as error:
                if not preview or task.task not in manager.all_tasks:
                    raise
                self.unknown.append(str(error))
                expanded.append(task)
                continue
            for name, one in loaded.items():
                expanded.append(task.model_copy(update={"task": name}))
                self._check_task(study, one, expanded[-1])
                prepare(one, task)
                self.settings[name] = what_is_asked(one, expanded[-1])
        for name, count in Counter(task.task for task in expanded).items():
            if count > 1:
                raise StudyError(f"tasks: {name} is there twice; make two studies of it.")
        return expanded

    def _check_task(self, study: Study, task: Any, settings: Task) -> None:
        name = settings.task
        if task.get_config("output_type") != "generate_until":
            raise StudyError(f"tasks: {name} generates nothing, so decoding makes no difference to it.")
        if getattr(task, "UNSAFE_CODE", False) and not self.unsafe_code:
            raise StudyError(f"tasks: {name} runs what the model wrote; allow that with --confirm_run_unsafe_code.")
        check_metric(task, settings)
        asked = {**(task.get_config("generation_kwargs") or {}), **settings.gen_kwargs}
        try:
            options = GenerationArguments.parse(asked).options
        except ConfigError as error:
            raise StudyError(f"tasks: {name}: {error}") from None
        of_task = {SYNONYMS.get(option, option): value for option, value in options.items()}
        for decoding, options in _configurations(study, lambda axis: None).items():
            for option, value in options.items():
                wins = of_task.get(SYNONYMS.get(option, option), value)
                if wins != value:
                    raise StudyError(
                        f"decoding: {decoding} sets {option}={value}, but task {name} sets {option}={wins}, "
                        f"which would win. Use another task, or give this one gen_kwargs: {{{option}: {value}}}."
                    )

    def _check_folder(self, anew: bool) -> None:
        """Refuse a folder with results of other code or other weights."""
        manifest = read_manifest(self.folder)
        if manifest is None or anew:
            return
        if manifest["code"] != self.code:
            raise StudyError(
                f"{self.folder} holds results of code version {manifest['code']}, and this is {self.code}: side by "
                "side they would be compared. Use another folder, or --anew to start again in this one (what is there "
                "stays on disk, but does not count)."
            )
        for name, identity in manifest["models"].items():
            if name in self.identities and self.identities[name] != identity:
                raise StudyError(
                    f"{self.folder} holds results of another model {name} ({identity}; now {self.identities[name]}). "
                    "Use another folder, another name, or --anew."
                )

    def jobs(self, points: Iterable[Point]) -> list[Job]:
        """``points`` with their files; they are part of the study from now on.

        Raises:
            StudyError: if two of them are identical.
        """
        study, jobs = self.study, []
        for point in points:
            job = Job(
                **vars(point),
                identity=self.identities[point.model],
                code=self.code,
                folder=self.folder,
                settings=self.settings[point.task.task],
                data_dir=study.data_dir,
                include_path=study.include_path,
                unsafe_code=self.unsafe_code,
            )
            other = self.named.setdefault(job.digest, job)
            if other != job:
                raise StudyError(f"{job.label} is the same point as {other.label}; remove one of them.")
            jobs.append(job)
        self.write_manifest()
        return jobs

    def write_manifest(self) -> None:
        """Write the folder's ``study.json``.

        Raises:
            StorageError: if it cannot be written.
        """
        named = ("model", "decoding", "options", "seed", "repeat")
        content = {
            "study": redacted(self.study.raw),
            "name": self.study.name,
            "code": self.code,
            "models": self.identities,
            "baselines": self.study.baselines,
            "metrics": {task.task: task.metric for task in self.study.tasks},
            "tasks": self.settings,
            "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "points": {
                digest: {"task": point.task.task, **{name: getattr(point, name) for name in named}}
                for digest, point in self.named.items()
            },
        }
        write_whole(self.folder / MANIFEST, json.dumps(content, indent=1, default=str) + "\n")


def _configurations(study: Study, sought: Callable[[Axis], Any]) -> dict[str, Mapping[str, Any]]:
    """The study's decoding configurations; for a search, ``sought`` maps each axis to a value."""
    if study.search is None:
        return dict(study.decoding)
    chosen = {option: sought(axis) for option, axis in study.search.space.items()}
    return {**study.decoding, "search": {**study.search.decoding, **chosen}}


_OF_FACTS = ("revision", "mask_token_id", "block_length", "family", "draft_adapter", *HUB_ONLY)


def _check_decodings(study: Study) -> list[str]:
    """Refuse decoding options that a model's family does not take; from its config.json, before weights are loaded.

    Returns:
        A sentence for each model that cannot be checked now.
    """
    unknown = []
    for model, arguments in study.models.items():
        facts = _facts(arguments)
        if facts is None:
            unknown.append(f"model {model}: which options it takes is known only when it is loaded.")
            continue
        for decoding, options in _configurations(study, lambda axis: axis.example).items():
            _check_fit(f"decoding: {decoding} does not go with model {model}", options, facts)
    return unknown


def _check_fit(where: str, options: Mapping[str, Any], facts: Any) -> None:
    try:
        DecodingConfig.from_options(options, facts)
    except ConfigError as error:
        raise StudyError(f"{where}: {error}") from None


def _facts(arguments: Mapping[str, Any]) -> Any:
    """A checkpoint's facts from its configuration files.

    None if the files are not enough (a drafter) or not available now: loading will tell.
    """
    from s2d2_lmeval.families import checkpoint_facts

    if {"draft", "block_size"} & arguments.keys():
        return None
    given = {key: arguments[key] for key in _OF_FACTS if key in arguments}
    try:
        return checkpoint_facts(arguments["pretrained"], adapter=arguments.get("peft"), **given)
    except CheckpointError:
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's messages: there is a table."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lm_eval", "lm_eval.s2d2", "s2d2_lmeval"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
