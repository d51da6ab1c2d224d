"""From a folder of point files to rows: a configuration of a model on a task, its seeds together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.runtime.statistics import ratios
from s2d2_lmeval.studies.manifest import read_manifest
from s2d2_lmeval.studies.statistics import holm, interval, paired_p_value, pareto
from s2d2_lmeval.studies.store import Line, PointRecord, read_point

KINDS = ("prefill", "draft", "verify", "commit")
PLAIN_DECODERS = ("static", "dynamic", "sequential", "entropy_bounded", "editing", "pipelined")
"""Decoders that may be the tuned baseline: denoising without verification."""


@dataclass(frozen=True)
class Row:
    """One configuration of a model on a task.

    ``accuracy`` with its 95 % interval is a mean over documents and seeds; ``forwards`` are means per answer;
    ``acceptance`` is accepted over drafted tokens (None without a verifier) and ``acceptance_lengths`` counts
    verifications by how many tokens they accepted; ``difference`` and ``p_value`` (adjusted for the number of
    comparisons) are against ``baseline``, the tuned configuration without verification, on the same documents.
    """

    model: str
    task: str
    decoding: str
    options: Mapping[str, Any]
    decoder: str
    metric: str
    seeds: tuple[int, ...]
    documents: int
    accuracy: float
    low: float
    high: float
    new_tokens: float
    tokens_per_forward: float
    tokens_per_second: float
    nfe: float
    forwards: Mapping[str, float]
    acceptance: float | None
    acceptance_lengths: Mapping[int, int]
    environment: Mapping[str, Any]
    batch: str
    notes: tuple[str, ...] = ()
    orders: Sequence[tuple[str, list[list[int]]]] = ()
    scores: Mapping[int, list[float]] = field(default_factory=dict, repr=False)
    baseline: str = ""
    difference: float | None = None
    p_value: float | None = None
    speedup_over_ar: float | None = None
    speedup_over_baseline: float | None = None
    on_front: bool = False


@dataclass(frozen=True)
class Results:
    """All rows of a folder, what could not be shown (``problems``), and what the folder is of (``manifest``)."""

    name: str
    rows: list[Row]
    problems: list[str]
    manifest: Mapping[str, Any]

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        """(model, task) -> its rows."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.model, row.task), []).append(row)
        return groups


def read_results(folder: Path) -> Results:
    """Everything that is complete in ``folder``.

    :raises StudyError: when there is nothing.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise StudyError(
            f"{folder} holds no study ({folder / 'study.json'} is missing); run `s2d2-lmeval sweep` first."
        )
    together: dict[tuple[str, str, str], list[tuple[Line, PointRecord]]] = {}
    problems = []
    for digest, about in manifest["points"].items():
        record = read_point(folder / "points" / f"{digest}.jsonl")
        label = f"{about['model']}, {about['task']}, {about['decoding']}, seed {about['seed']}"
        if record.unreadable:
            problems.append(f"{label}: {len(record.unreadable)} unreadable lines were skipped.")
        if record.failure is not None:
            problems.append(f"{label} failed: {record.failure['error']}")
        elif not record.is_complete():
            problems.append(f"{label} is not complete ({len(record.samples)} samples); run the sweep again.")
        else:
            key = about["model"], about["task"], about["decoding"]
            together.setdefault(key, []).append((about, record.of_the_result()))
    others = len(list((folder / "points").glob("*.jsonl"))) - len(manifest["points"])
    if others > 0:
        problems.append(f"{others} files are of points that are no longer part of the study, and are not shown.")
    rows = [row for key, several in together.items() if (row := _row_or_problem(key, several, manifest, problems))]
    if not rows:
        raise StudyError(f"{folder} holds no complete point yet. " + " ".join(problems[:3]))
    return Results(manifest.get("name", folder.name), compare(rows, manifest.get("baselines", {})), problems, manifest)


def _row_or_problem(
    key: tuple[str, str, str],
    several: Sequence[tuple[Line, PointRecord]],
    manifest: Mapping[str, Any],
    problems: list[str],
) -> Row | None:
    try:
        return _row(key, several, manifest)
    except StudyError as error:
        problems.append(f"{', '.join(key)}: {error}")
        return None


def accuracy_of(record: PointRecord, metric: str | None) -> tuple[str, float, dict[int, float]]:
    """What a task calls accuracy: its full name, the value, and each document's where it has one.

    :param metric: ``metric`` or ``metric,filter``; the first of the task's ``metric_list`` if not given.
    :raises StudyError: when there is no such metric.
    """
    assert record.result is not None
    metrics, documents = record.result["metrics"], record.result["documents"]
    filters = [name for name in record.result["filters"] if name != "decode"] or record.result["filters"]
    wanted = metric or next(iter(record.result["metric_list"]), None)
    names = [wanted] if wanted and "," in wanted else [f"{wanted},{name}" for name in filters]
    for name in names:
        if name in metrics:
            return name, float(metrics[name]), {int(place): value for place, value in documents.get(name, ())}
    known = ", ".join(name for name in metrics if "_stderr" not in name)
    raise StudyError(f"there is no metric {wanted}; the task has: {known}. Name one as metric: under tasks.")


def _row(key: tuple[str, str, str], several: Sequence[tuple[Line, PointRecord]], manifest: Mapping[str, Any]) -> Row:
    model, task, decoding = key
    metric = (manifest.get("metrics") or {}).get(task)
    scored = [accuracy_of(record, metric) for _, record in several]
    scores: dict[int, list[float]] = {}
    for _, _, values in scored:
        for document, value in values.items():
            scores.setdefault(document, []).append(value)
    samples = [sample for _, record in several for sample in record.samples.values()]
    sums: Counter[str] = Counter()
    for sample in samples:
        sums.update({name: value for name, value in sample["stats"].items() if isinstance(value, (int, float))})
    rates = ratios({**sums, "seconds": sum(record.decoding_seconds for _, record in several)})
    low, high = interval(list(scores.values()))
    lengths = Counter(length for sample in samples for length in sample["accepted"])
    segments = [segment for _, record in several for segment in record.segments.values()]
    return Row(
        model=model,
        task=task,
        decoding=decoding,
        options=several[0][0]["options"],
        decoder=str((segments[-1].get("decoding") or {}).get("decoder", "")),
        metric=scored[0][0],
        seeds=tuple(about["seed"] for about, _ in several),
        documents=len(scores),
        accuracy=sum(value for _, value, _ in scored) / len(scored),
        low=low,
        high=high,
        new_tokens=sums["new_tokens"] / len(samples),
        tokens_per_forward=rates.get("tokens_per_forward", float("nan")),
        tokens_per_second=rates.get("tokens_per_second", float("nan")),
        nfe=sums["nfe"] / len(samples),
        forwards={kind: sums[f"{kind}_forwards"] / len(samples) for kind in KINDS},
        acceptance=rates.get("acceptance"),
        acceptance_lengths=dict(sorted(lengths.items())),
        environment=segments[-1]["environment"],
        batch="/".join(sorted({str(segment["rows"]) for segment in segments})),
        notes=_notes(several, segments),
        orders=[(str(sample["document"]), sample["order"]) for sample in samples if sample.get("order")],
        scores=scores,
    )


def _notes(several: Sequence[tuple[Line, PointRecord]], segments: Sequence[Line]) -> tuple[str, ...]:
    """What makes the times or counts of a row worth less."""
    notes = []
    decoding = segments[-1].get("decoding") or {}
    if (
        decoding.get("decoder") == "sliding"
        and decoding.get("share_budget", True)
        and decoding.get("acceptance") != "rejection"
    ):
        notes.append("rows share their budgets: counts of forwards depend on which were in flight together")
    interruptions = sum(max(0, len(record.segments) - 1) for _, record in several)
    if interruptions:
        notes.append(f"interrupted {interruptions} times: tokens per second are a lower bound")
    for _, record in several:
        notes += [f"memory ran out, {line['rows']} rows went on" for line in record.memory]
    if len({str(sorted(segment["environment"].items())) for segment in segments}) > 1:
        notes.append("run in more than one environment")
    return tuple(dict.fromkeys(notes))


def compare(rows: Sequence[Row], baselines: Mapping[str, str]) -> list[Row]:
    """The rows with speed-ups, paired tests and fronts, each within its model and task."""
    compared: list[Row] = []
    for key in dict.fromkeys((row.model, row.task) for row in rows):
        group = [row for row in rows if (row.model, row.task) == key]
        ar = _named(group, baselines.get("ar")) or next((row for row in group if row.decoder == "ar"), None)
        tuned = _named(group, baselines.get("dynamic")) or _tuned(group)
        front = pareto([(row.tokens_per_second, row.accuracy) for row in group])
        group = [
            replace(
                _against(row, tuned),
                on_front=on_front,
                speedup_over_ar=_ratio(row, ar),
                speedup_over_baseline=_ratio(row, tuned),
            )
            for row, on_front in zip(group, front, strict=True)
        ]
        tested = [row for row in group if row.p_value is not None]
        adjusted = dict(
            zip((row.decoding for row in tested), holm([row.p_value or 0.0 for row in tested]), strict=True)
        )
        compared += [replace(row, p_value=adjusted.get(row.decoding)) for row in group]
    return compared


def _named(group: Sequence[Row], name: str | None) -> Row | None:
    return next((row for row in group if row.decoding == name), None)


def _tuned(group: Sequence[Row]) -> Row | None:
    """The baseline at its best: of the configurations without verification the most accurate, then the fastest."""
    plain = [row for row in group if row.decoder in PLAIN_DECODERS]
    return max(plain, key=lambda row: (row.accuracy, row.tokens_per_second), default=None)


def _against(row: Row, baseline: Row | None) -> Row:
    if baseline is None or baseline is row:
        return row
    shared = [document for document in row.scores if document in baseline.scores]
    first, second = ([one.scores[document] for document in shared] for one in (row, baseline))
    if not shared:
        return replace(row, baseline=baseline.decoding)
    means = [sum(values) / len(values) for several in (first, second) for values in several]
    difference = (sum(means[: len(shared)]) - sum(means[len(shared) :])) / len(shared)
    p_value = paired_p_value(first, second)
    return replace(row, baseline=baseline.decoding, difference=difference, p_value=p_value)


def _ratio(row: Row, base: Row | None) -> float | None:
    """Tokens per second over another row's, measured on the same hardware; None otherwise."""
    if base is None or not base.tokens_per_second:
        return None
    if row.environment.get("device") != base.environment.get("device"):
        return None
    return row.tokens_per_second / base.tokens_per_second
