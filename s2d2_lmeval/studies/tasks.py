"""Tasks of the harness with a study's settings, and what their results depend on besides answers."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import S2D2Error, StudyError, first_line
from s2d2_lmeval.harness.arguments import nearest
from s2d2_lmeval.harness.identity import of_plain
from s2d2_lmeval.studies.points import Task

FEWSHOT_SEED = 1234
"""The harness's own default: the same examples as from its command line."""


def task_manager(data_dir: str | None, include_path: Iterable[str], names: Iterable[str]) -> Any:
    """The harness's task index: our tasks and those of ``include_path``, and the harness's own where a name is theirs
    (indexing them takes seconds).
    """
    from lm_eval.tasks import TaskManager

    from s2d2_lmeval.harness.upstream import include_path as ours
    from s2d2_lmeval.harness.upstream import register

    register()
    folders = [str(ours()), *include_path]
    metadata = {"s2d2_data_dir": data_dir} if data_dir else {}
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if all(name in manager.all_tasks for name in names):
        return manager
    return TaskManager(include_path=folders, metadata=metadata)


def load_tasks(manager: Any, name: str) -> dict[str, Any]:
    """Name -> task object, for a task, a group or a tag.

    Raises:
        StudyError: for a name that the harness does not know, and a task that it cannot load.
    """
    if name not in manager.all_tasks:
        raise StudyError(
            f"tasks: the harness knows no {name}.{nearest(name, manager.all_tasks)} For tasks of your own give "
            "include_path."
        )
    advice = " Its documents come from the hub, or from a folder that you give as data_dir."
    with _refused(f"{name} cannot be loaded", advice):
        if hasattr(manager, "load"):
            return dict(manager.load([name])["tasks"])
        return _flat(manager.load_task_or_group(name))  # lm_eval before 0.4.12


@contextlib.contextmanager
def _refused(what: str, advice: str = "") -> Iterator[None]:
    """Turn any exception of a task's code into a message."""
    try:
        yield
    except S2D2Error:
        raise
    except Exception as error:
        raise StudyError(f"tasks: {what} ({type(error).__name__}: {first_line(error)}).{advice}") from error


def _flat(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for key, value in loaded.items():
        tasks.update(_flat(value) if isinstance(value, Mapping) else {str(key): value})
    return tasks


def prepare(task: Any, settings: Task) -> None:
    """Configure a task object as ``simple_evaluate`` does from its arguments."""
    if settings.gen_kwargs:
        task.set_config(key="generation_kwargs", value=dict(settings.gen_kwargs), update=True)
    # As in the harness: a task with 0 means 0.
    if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def how_prompts_are_built(settings: Task) -> dict[str, Any]:
    """The arguments of the harness's ``evaluate`` that change prompts."""
    return {
        "limit": settings.limit,
        "apply_chat_template": settings.apply_chat_template,
        "fewshot_as_multiturn": settings.fewshot_as_multiturn and bool(settings.apply_chat_template),
        "system_instruction": settings.system_instruction,
    }


def what_is_asked(task: Any, settings: Task) -> dict[str, Any]:
    """What a stored result must match to be a result of the (prepared) task in its current form.

    ``inputs`` is a digest of every document and of every request made of it. Chats are not rendered for it: templates
    are part of the tokenizer. ``scoring`` is one of what makes numbers of answers.

    Raises:
        StudyError: if the task cannot make its requests.
    """
    built = how_prompts_are_built(settings)
    template = {"chat_template": _as_it_is} if built["apply_chat_template"] else {}
    with _refused(f"{settings.task} cannot make its prompts"):
        task.build_all_requests(**{**built, "apply_chat_template": bool(template)}, **template)
    requests = [(one.doc_id, one.idx, one.repeats, one.doc, one.args) for one in task.instances]
    return {
        "documents": len({one.doc_id for one in task.instances}),
        "samples": sum(one.repeats or 1 for one in task.instances),
        "inputs": of_plain(requests),
        "scoring": _scoring(task),
    }


def _as_it_is(history: Any, add_generation_prompt: bool = True) -> str:
    """In place of a chat template."""
    return json.dumps([history, add_generation_prompt], default=lambda message: vars(message))


def _scoring(task: Any) -> str:
    from lm_eval import __version__

    config = task.config.to_dict(keep_callable=True)
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "s2d2_data_dir"}
    written = {Path(file) for one in (*_callables(config), type(task)) if (file := _file_of(one)) is not None}
    return of_plain(config, [(file.name, code_of(file)) for file in sorted(written)], __version__)


def _callables(value: Any) -> list[Callable[..., Any]]:
    if callable(value):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [found for one in inside for found in _callables(one)]


def _file_of(function: Any) -> str | None:
    """The source file of a function or class; None for those of the harness, which has a version."""
    module = getattr(function, "__module__", None) or ""
    try:
        return None if module.partition(".")[0] == "lm_eval" else inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return None


def code_of(path: Path) -> str:
    """What a Python file does: its syntax tree, without comments and docstrings."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return ast.dump(tree)


def check_metric(task: Any, settings: Task) -> None:
    """Refuse a metric that the task does not have, and a task without a first metric.

    Raises:
        StudyError: with the available metrics.
    """
    metrics, filters = [str(metric) for metric in task.aggregation()], [one.name for one in task._filters]
    listed = [entry["metric"] for entry in task.get_config("metric_list") or [] if isinstance(entry["metric"], str)]
    wanted = settings.metric or next(iter(listed), None)
    metric, _, chosen = (wanted or "").partition(",")
    if metric in metrics and (not chosen or chosen in filters):
        return
    known = ", ".join(f"{one},{of}" if len(filters) > 1 else one for one in metrics for of in filters)
    missing = f"has no metric {wanted}" if wanted else "names no metric first"
    raise StudyError(f"tasks: {settings.task} {missing}; give metric: one of {known}.{nearest(metric, metrics)}")
