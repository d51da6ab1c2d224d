"""What has to be known, and to be right, before the first model is loaded: tasks, options, the folder of results."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2d2_lmeval.decoding.config import DecodingConfig
from s2d2_lmeval.errors import CheckpointError, ConfigError, StudyError
from s2d2_lmeval.harness.generation_arguments import GenerationArguments
from s2d2_lmeval.harness.identity import code_version, of_source
from s2d2_lmeval.studies.store import write_whole
from s2d2_lmeval.studies.study import Point, Study, Task, example

MANIFEST = "study.json"


@dataclass(frozen=True)
class Job:
    """A point to evaluate, and what it takes: its file, where tasks and data are, how many documents it has.

    Plain data: it can be sent to another process.
    """

    point: Point
    identity: str
    code: str
    path: Path
    documents: int
    data_dir: str | None
    include_path: tuple[str, ...]
    unsafe_code: bool

    @property
    def digest(self) -> str:
        """The point's name."""
        return self.path.stem

    @property
    def definition(self) -> dict[str, Any]:
        """What the results belong to."""
        return self.point.definition(self.identity, self.code)

    def settings(self) -> dict[str, Any]:
        """What a result must have been made with to be the wanted one, besides the definition."""
        return {"documents": self.documents}


def task_manager(data_dir: str | None, include_path: Iterable[str], names: Iterable[str]) -> Any:
    """The harness's task index: our tasks and those of ``include_path``, and the harness's own where a name is theirs
    (indexing them takes seconds).
    """
    from lm_eval.tasks import TaskManager

    from s2d2_lmeval.cli.tasks import include_path as ours
    from s2d2_lmeval.cli.tasks import register

    register()
    folders = [str(ours()), *include_path]
    metadata = {"s2d2_data_dir": data_dir} if data_dir else {}
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if all(name in manager.all_tasks for name in names):
        return manager
    return TaskManager(include_path=folders, metadata=metadata)


def load_tasks(manager: Any, name: str) -> dict[str, Any]:
    """Name -> task object, for a task, a group or a tag.

    :raises StudyError: for a name that the harness does not know.
    """
    if name not in manager.all_tasks:
        from s2d2_lmeval.harness.arguments import nearest

        raise StudyError(
            f"tasks: the harness knows no {name}.{nearest(name, manager.all_tasks)} For tasks of your own give "
            "include_path."
        )
    if hasattr(manager, "load"):
        return dict(manager.load([name])["tasks"])
    return _flat(manager.load_task_or_group(name))  # lm_eval before 0.4.12


def _flat(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for key, value in loaded.items():
        tasks.update(_flat(value) if isinstance(value, Mapping) else {str(key): value})
    return tasks


class Plan:
    """A study in a folder: its tasks loaded and checked, its models identified, its points named."""

    def __init__(self, study: Study, folder: Path, *, unsafe_code: bool = False, anew: bool = False) -> None:
        """
        :param unsafe_code: tasks that run what a model wrote may be evaluated.
        :param anew: go on in a folder whose results are of other code or other weights; those stay, but do not count.
        :raises StudyError: for anything that would make a point fail or mix results.
        """
        self.study = study
        self.folder = folder
        self.unsafe_code = unsafe_code
        self.documents: dict[str, int] = {}
        with quiet():
            self.tasks = self._expand()
        self.study = replace(study, tasks=tuple(self.tasks))
        check_decodings(self.study)
        self.code = code_version()
        self.identities = {
            name: of_source(arguments["pretrained"], arguments) for name, arguments in study.models.items()
        }
        self._check_folder(anew)
        self.named: dict[str, Point] = {}

    def _expand(self) -> list[Task]:
        """Single tasks in place of groups and tags, their documents counted."""
        study = self.study
        manager = task_manager(study.data_dir, study.include_path, [task.task for task in study.tasks])
        expanded = []
        for task in study.tasks:
            loaded = load_tasks(manager, task.task)
            for name, one in loaded.items():
                self._check_task(name, one, task)
                length = len(list(one.eval_docs)) if not hasattr(one.eval_docs, "__len__") else len(one.eval_docs)
                self.documents[name] = min(length, task.limit) if task.limit else length
                expanded.append(replace(task, task=name))
        twice = {task.task for task in expanded if sum(other.task == task.task for other in expanded) > 1}
        if twice:
            raise StudyError(f"tasks: {sorted(twice)[0]} comes in twice.")
        return expanded

    def _check_task(self, name: str, task: Any, settings: Task) -> None:
        if task.get_config("output_type") != "generate_until":
            raise StudyError(f"tasks: {name} generates nothing, so decoding makes no difference to it.")
        if getattr(task, "UNSAFE_CODE", False) and not self.unsafe_code:
            raise StudyError(f"tasks: {name} runs what the model wrote; allow that with --confirm_run_unsafe_code.")
        asked = {**(task.get_config("generation_kwargs") or {}), **settings.gen_kwargs}
        try:
            of_task = GenerationArguments.parse(asked).options
        except ConfigError as error:
            raise StudyError(f"tasks: {name}: {error}") from None
        for decoding, options in self._configurations():
            for option, value in options.items():
                wins = of_task.get(option, value)
                if wins != value:
                    raise StudyError(
                        f"decoding: {decoding} sets {option}={value}, but task {name} sets {option}={wins}, "
                        f"which would win. Use another task, or give this one gen_kwargs: {{{option}: {value}}}."
                    )

    def _configurations(self) -> list[tuple[str, Mapping[str, Any]]]:
        search = self.study.search
        sought = [("search", {**search.decoding, **dict.fromkeys(search.space)})] if search is not None else []
        return [*self.study.decoding.items(), *sought]

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
        """``points`` with their files; they become part of the study from here on.

        :raises StudyError: when two of them are one and the same.
        """
        jobs = []
        for point in points:
            digest = point.digest(self.identities[point.model], self.code)
            other = self.named.setdefault(digest, point)
            if other is not point and other != point:
                raise StudyError(f"{point.label} is the same point as {other.label}; remove one of them.")
            jobs.append(
                Job(
                    point=point,
                    identity=self.identities[point.model],
                    code=self.code,
                    path=self.folder / "points" / f"{digest}.jsonl",
                    documents=self.documents[point.task.task],
                    data_dir=self.study.data_dir,
                    include_path=self.study.include_path,
                    unsafe_code=self.unsafe_code,
                )
            )
        self._write_manifest()
        return jobs

    def _write_manifest(self) -> None:
        content = {
            "study": dict(self.study.raw),
            "name": self.study.name,
            "code": self.code,
            "models": self.identities,
            "baselines": dict(self.study.baselines),
            "metrics": {task.task: task.metric for task in self.study.tasks},
            "documents": self.documents,
            "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "points": {
                digest: {
                    "model": point.model,
                    "task": point.task.task,
                    "decoding": point.decoding,
                    "options": dict(point.options),
                    "seed": point.seed,
                }
                for digest, point in self.named.items()
            },
        }
        write_whole(self.folder / MANIFEST, json.dumps(content, indent=1, default=str) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder of results is of; None for a folder without.

    :raises StudyError: when it cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not {"code", "models", "points"} <= manifest.keys():
            raise ValueError("keys are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise StudyError(
            f"{path} cannot be read ({error}). Move it away and run the sweep again: the results under "
            f"{folder / 'points'} are found by their names."
        ) from None
    return dict(manifest)


def check_decodings(study: Study) -> None:
    """Refuse decoding options that a model's family does not take; from its config.json, before weights are loaded.

    :raises StudyError: naming model and configuration.
    """
    search = study.search
    sought = {}
    if search is not None:
        sought["search"] = {**search.decoding, **{option: example(axis) for option, axis in search.space.items()}}
    for name, arguments in study.models.items():
        facts = _facts(arguments)
        for decoding, options in {**study.decoding, **sought}.items() if facts is not None else ():
            _check_fit(name, facts, decoding, options)


def _check_fit(model: str, facts: Any, decoding: str, options: Mapping[str, Any]) -> None:
    try:
        DecodingConfig.from_options(options, facts)
    except ConfigError as error:
        raise StudyError(f"decoding: {decoding} does not go with model {model}: {error}") from None


def _facts(arguments: Mapping[str, Any]) -> Any:
    """A checkpoint's facts from its configuration files.

    None where they are more than the files say (a drafter, facts that are given), or where the files cannot be had now:
    loading will tell.
    """
    if {"draft", "mask_token_id", "block_length", "peft"} & arguments.keys():
        return None
    from s2d2_lmeval.families import checkpoint_facts

    try:
        return checkpoint_facts(arguments["pretrained"], arguments.get("revision"), family=arguments.get("family"))
    except CheckpointError:
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's messages: there is a table."""
    names = ("lm_eval", "lm_eval.s2d2", "s2d2_lmeval")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
