"""Two runs of the harness on the same documents: paired differences, and what differed between the runs.

A run is what ``lm_eval --output_path FOLDER --log_samples`` writes: ``results_TIME.json``, and beside it
``samples_TASK_TIME.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import StudyError, first_line, shown
from s2d2_lmeval.studies.report.statistics import difference_interval, paired_p_value
from s2d2_lmeval.studies.store import is_number

MADE_BY_DECODING = "decode"
"""The filter of the packaged tasks whose metrics are decoding figures."""

FIGURES = ("tokens_per_forward", "acceptance", "acceptance_length")
_OF_THE_MACHINE = ("device", "dtype", "attention", "threads", "torch", "transformers")
_ASKED_BY = ("limit", "num_fewshot", "gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed")


@dataclass(frozen=True)
class Run:
    """A run's results file and its content."""

    path: Path
    results: Mapping[str, Any]

    @property
    def tasks(self) -> list[str]:
        """Tasks with scores."""
        return list(self.results["configs"])

    def samples(self, task: str) -> Iterator[dict[str, Any]]:
        """The documents of a task, one per filter.

        Raises:
            StudyError: if they were not kept, or cannot be read.
        """
        path = self.path.with_name(f"samples_{task}_{self.path.stem.removeprefix('results_')}.jsonl")
        try:
            with path.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)
        except FileNotFoundError:
            raise StudyError(
                f"{path.name} is not beside {self.path}: run lm_eval with --log_samples, which keeps every document."
            ) from None
        except (OSError, ValueError) as error:
            raise StudyError(f"{path} cannot be read: {first_line(error)}.") from None


@dataclass(frozen=True)
class Difference:
    """A metric of a task in two runs: its means over the documents of both, and the second less the first with a 95 %
    interval and the p-value of a paired test. ``documents`` are those that differ: number, values, answers.
    """

    task: str
    metric: str
    count: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    documents: tuple[tuple[int, float, float, str, str], ...]


def read_run(path: Path) -> Run:
    """The run in ``path``: a results file, or a folder, of which the newest counts.

    Raises:
        StudyError: if there is none, or it cannot be read.
    """
    found = [path] if path.is_file() else sorted(path.rglob("results_*.json"), key=lambda one: one.name)
    if not found:
        raise StudyError(f"{path} holds no results of lm_eval (results_….json): give what --output_path was.")
    try:
        results = json.loads(found[-1].read_text(encoding="utf-8"))
        missing = {"results", "configs", "config"} - results.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise StudyError(f"{found[-1]} cannot be read: {first_line(error)}.") from None
    if missing:
        raise StudyError(f"{found[-1]} is not a result of lm_eval: it has no {min(missing)}.")
    return Run(found[-1], results)


def compare(first: Run, second: Run, *, other_prompts: bool = False) -> list[Difference]:
    """The paired differences of two runs, for every metric of every task that both have.

    Args:
        other_prompts: also where the documents were put to the models in other words.

    Raises:
        StudyError: if the runs are not comparable: no task in common, another version of a task, other documents or,
            unless ``other_prompts``, other prompts.
    """
    both = [task for task in first.tasks if task in second.tasks]
    if not both:
        raise StudyError(f"the runs have no task in common: {', '.join(first.tasks)} and {', '.join(second.tasks)}.")
    found: list[Difference] = []
    for task in both:
        versions = [run.results.get("versions", {}).get(task) for run in (first, second)]
        if versions[0] != versions[1]:
            raise StudyError(f"{task} is of version {versions[0]} in one run and {versions[1]} in the other.")
        found += _of_task(task, first, second, other_prompts)
    return found


def _of_task(task: str, first: Run, second: Run, other_prompts: bool) -> Iterator[Difference]:
    sides = [_by_filter(run.samples(task)) for run in (first, second)]
    for name in sides[0].keys() & sides[1].keys() - {MADE_BY_DECODING}:
        one, other = sides[0][name], sides[1][name]
        shared = sorted(one.keys() & other.keys())
        if not shared:
            raise StudyError(f"{task}: the runs have no document in common.")
        for document in shared:
            _check_same(task, one[document], other[document], other_prompts)
        for metric in one[shared[0]]["metrics"]:
            pairs = [(one[document].get(metric), other[document].get(metric)) for document in shared]
            if all(is_number(value) for pair in pairs for value in pair):
                yield _difference(task, f"{metric},{name}", {d: (one[d], other[d]) for d in shared}, metric)


def _by_filter(samples: Iterator[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Filter -> document's number -> sample."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["filter"], {})[sample["doc_id"]] = sample
    return found


def _check_same(task: str, one: Mapping[str, Any], other: Mapping[str, Any], other_prompts: bool) -> None:
    if one["doc_hash"] != other["doc_hash"]:
        raise StudyError(f"{task}: document {one['doc_id']} is another one in each run; were they given other data?")
    if one["prompt_hash"] != other["prompt_hash"] and not other_prompts:
        raise StudyError(
            f"{task}: document {one['doc_id']} was put in other words to each model (chat template, examples, system "
            "instruction): --other_prompts compares the runs all the same."
        )


def _difference(
    task: str, label: str, pairs: Mapping[int, tuple[Mapping[str, Any], Mapping[str, Any]]], metric: str
) -> Difference:
    values = {document: (float(one[metric]), float(other[metric])) for document, (one, other) in pairs.items()}
    first, second = ([[pair[side]] for pair in values.values()] for side in (0, 1))
    mean, other_mean = (sum(value for (value,) in side) / len(side) for side in (first, second))
    low, high = difference_interval(second, first)
    differing = tuple(
        (document, *values[document], _answer(one), _answer(other))
        for document, (one, other) in pairs.items()
        if values[document][0] != values[document][1]
    )
    p_value = paired_p_value(second, first)
    difference = other_mean - mean
    return Difference(task, label, len(values), mean, other_mean, difference, low, high, p_value, differing)


def _answer(sample: Mapping[str, Any]) -> str:
    """What the model wrote, or chose."""
    answers = sample.get("resps") or [[""]]
    return str(answers[0][0] if isinstance(answers[0], list) and answers[0] else answers[0])


def what_differed(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """(setting, first's value, second's) of everything by which the runs differ, apart from what came out. Options that
    only one of two decoders has go with the decoder, and are left out.
    """
    settings = [dict(_settings(run.results)) for run in (first, second)]
    decoding = [dict(_decoding(run.results)) for run in (first, second)]
    names = dict.fromkeys([*settings[0], *settings[1]])
    pairs = [(name, settings[0].get(name), settings[1].get(name)) for name in names]
    pairs += [(name, value, decoding[1][name]) for name, value in decoding[0].items() if name in decoding[1]]
    written = [(name, *(value if isinstance(value, str) else shown(value) for value in pair)) for name, *pair in pairs]
    return list(dict.fromkeys((name, one, other) for name, one, other in written if one != other))


def _settings(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    config = results["config"]
    yield "lm_eval --model", config.get("model")
    arguments = config.get("model_args") or {}
    yield from arguments.items() if isinstance(arguments, Mapping) else [("model_args", arguments)]
    yield from ((name, config.get(name)) for name in _ASKED_BY)
    yield from (
        (name, results.get(name)) for name in ("system_instruction", "chat_template_sha", "fewshot_as_multiturn")
    )
    yield "lm_eval", results.get("lm_eval_version")
    yield from _machine(results).items()


def _decoding(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options in force, of the first of the run's tasks."""
    for one in (results["config"].get("s2d2") or {}).get("configurations", [])[:1]:
        yield from one.get("decoding", one.get("options", {})).items()


def _machine(results: Mapping[str, Any]) -> dict[str, Any]:
    about = results["config"].get("s2d2") or {}
    found = {name: value for name, value in about.get("environment", {}).items() if name in _OF_THE_MACHINE}
    return {**found, "rows_in_flight": about["rows_in_flight"]} if "rows_in_flight" in about else found


def figures(first: Run, second: Run) -> list[tuple[str, str, float, float]]:
    """(task, figure, first's, second's): decoding figures that both runs have; tokens per second only of one machine
    and number of requests in flight.
    """
    about = [run.results["config"].get("s2d2") or {} for run in (first, second)]
    found = []
    for task in first.tasks:
        one, other = (side.get("tasks", {}).get(task, {}) for side in about)
        found += [(task, name, one[name], other[name]) for name in FIGURES if name in one and name in other]
    one, other = (side.get("totals", {}) for side in about)
    speed = "tokens_per_second"
    if speed in one and speed in other and _machine(first.results) == _machine(second.results):
        found.append(("in all", speed, one[speed], other[speed]))
    return found
