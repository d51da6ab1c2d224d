"""From a folder of point files to rows: a configuration of a model on a task, its seeds together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.statistics import ratios
from s2d2_lmeval.studies.files import read_manifest
from s2d2_lmeval.studies.points import named_models
from s2d2_lmeval.studies.report.statistics import front, holm, interval, paired_p_value, speed_interval
from s2d2_lmeval.studies.store import Line, PointRecord, read_point

KINDS = ("prefill", "draft", "verify", "commit")


@dataclass
class Row:
    """One configuration of a model on a task.

    ``accuracy`` with its 95 % interval is a mean over documents and seeds; ``forwards`` are means per answer;
    ``acceptance`` is accepted over drafted tokens (None without a verifier) and ``acceptance_lengths`` counts
    verifications by how many tokens they accepted; ``difference`` and ``p_value`` (adjusted for the number of
    comparisons) are against ``baseline``, the tuned configuration without verification, on the same documents.
    ``timings`` are the tokens per second of every repeat. ``pace``, with its 95 % interval ``paces``, is the tokens per
    second by which rows are ranked: rows of a decoder that took the same forwards share their timings, since only noise
    parts them.
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
    pieces: Mapping[str, list[str]] = field(default_factory=dict, repr=False)
    scores: Mapping[int, list[float]] = field(default_factory=dict, repr=False)
    texts: Mapping[int, str] = field(default_factory=dict, repr=False)
    baseline: str = ""
    difference: float | None = None
    p_value: float | None = None
    speedup_over_ar: float | None = None
    speedup_over_baseline: float | None = None
    timings: tuple[float, ...] = ()
    pace: float = float("nan")
    paces: tuple[float, float] = (float("nan"), float("nan"))
    on_front: bool = False


@dataclass(frozen=True)
class Results:
    """All rows of a folder, what could not be shown (``problems``), and what the folder is of (``manifest``)."""

    name: str
    rows: list[Row]
    problems: list[str]
    manifest: Mapping[str, Any]

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """The model arguments of the study by name; empty where the manifest does not say."""
        return named_models((self.manifest.get("study") or {}).get("models") or {})

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        """(model, task) -> its rows."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.model, row.task), []).append(row)
        return groups


def read_results(folder: Path) -> Results:
    """All complete results in ``folder``.

    Raises:
        StudyError: if there are none.
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
        key = about["model"], about["task"], about["decoding"]
        label = f"{', '.join(key)}, seed {about['seed']}"
        if record.unreadable:
            problems.append(f"{label}: {len(record.unreadable)} unreadable lines were skipped.")
        if record.failure is not None:
            problems.append(f"{label} failed: {record.failure['error']}")
        elif not record.is_complete():
            problems.append(f"{label} is not complete ({len(record.samples)} samples); run the sweep again.")
        else:
            together.setdefault(key, []).append((about, record.of_the_result()))
    others = len(list((folder / "points").glob("*.jsonl"))) - len(manifest["points"])
    if others > 0:
        problems.append(f"{others} files are of points that are no longer part of the study, and are not shown.")
    rows = []
    for key, several in together.items():
        try:
            rows.append(_row(key, several, (manifest.get("metrics") or {}).get(key[1])))
        except StudyError as error:  # noqa: PERF203
            problems.append(f"{', '.join(key)}: {error}")
    if not rows:
        raise StudyError(f"{folder} holds no complete point yet. " + " ".join(problems[:3]))
    results = Results(manifest.get("name", folder.name), rows, problems, manifest)
    for group in results.groups().values():
        _compare(group, manifest.get("baselines", {}))
    return results


def accuracy_of(record: PointRecord, metric: str | None) -> tuple[str, float, dict[int, float]]:
    """A task's accuracy: the metric's full name, its value, and each document's value if there is one.

    Args:
        metric: ``metric`` or ``metric,filter``; the first of the task's ``metric_list`` by default.

    Raises:
        StudyError: if there is no such metric.
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


def _row(key: tuple[str, str, str], several: Sequence[tuple[Line, PointRecord]], metric: str | None) -> Row:
    model, task, decoding = key
    repeats: dict[int, list[PointRecord]] = {}
    for about, record in several:
        repeats.setdefault(about.get("repeat", 0), []).append(record)
    # Repeats differ in their times alone.
    once = [(about, record) for about, record in several if about.get("repeat", 0) == min(repeats)]
    scored = [accuracy_of(record, metric) for _, record in once]
    scores: dict[int, list[float]] = {}
    for _, _, values in scored:
        for document, value in values.items():
            scores.setdefault(document, []).append(value)
    samples = [sample for _, record in once for sample in record.samples.values()]
    sums: Counter[str] = Counter()
    for sample in samples:
        sums.update({name: value for name, value in sample["stats"].items() if isinstance(value, (int, float))})
    rates = ratios(sums)
    timings = [_tokens_per_second(records) for records in repeats.values()]
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
        seeds=tuple(about["seed"] for about, _ in once),
        documents=len(scores),
        accuracy=sum(value for _, value, _ in scored) / len(scored),
        low=low,
        high=high,
        new_tokens=sums["new_tokens"] / len(samples),
        tokens_per_forward=rates.get("tokens_per_forward", float("nan")),
        tokens_per_second=_tokens_per_second([record for _, record in several]),
        timings=tuple(timings),
        nfe=sums["nfe"] / len(samples),
        forwards={kind: sums[f"{kind}_forwards"] / len(samples) for kind in KINDS},
        acceptance=rates.get("acceptance"),
        acceptance_lengths=dict(sorted(lengths.items())),
        environment=segments[-1]["environment"],
        batch="/".join(sorted({str(segment["rows"]) for segment in segments})),
        notes=(*_notes(several, segments), *_other_answers(several)),
        orders=[(str(sample["document"]), sample["order"]) for sample in samples if sample.get("order")],
        pieces={str(sample["document"]): sample["pieces"] for sample in samples if sample.get("pieces")},
        scores=scores,
        texts={sample["document"]: sample["text"] for sample in once[0][1].samples.values()},
    )


def _tokens_per_second(records: Sequence[PointRecord]) -> float:
    counts = {"new_tokens": sum(record.total("new_tokens") for record in records)}
    counts["seconds"] = sum(record.decoding_seconds for record in records)
    return ratios(counts).get("tokens_per_second", float("nan"))


def _notes(several: Sequence[tuple[Line, PointRecord]], segments: Sequence[Line]) -> tuple[str, ...]:
    """Caveats on the times or counts of a row."""
    notes = []
    decoding = segments[-1].get("decoding") or {}
    shares = decoding.get("share_budget", True) and decoding.get("acceptance") != "rejection"
    if decoding.get("decoder") == "sliding" and shares:
        notes.append("rows share their budgets: counts of forwards depend on which were in flight together")
    interruptions = sum(max(0, len(record.segments) - 1) for _, record in several)
    if interruptions:
        notes.append(f"interrupted {interruptions} times: tokens per second are a lower bound")
    for _, record in several:
        notes += [f"memory ran out, {line['rows']} rows went on" for line in record.memory]
    if len({str(sorted(segment["environment"].items())) for segment in segments}) > 1:
        notes.append("run in more than one environment")
    return tuple(dict.fromkeys(notes))


def _other_answers(several: Sequence[tuple[Line, PointRecord]]) -> tuple[str, ...]:
    """A note where repeats did not give the same answers."""
    texts: dict[Any, set[str]] = {}
    for about, record in several:
        for name, sample in record.samples.items():
            texts.setdefault((about["seed"], name), set()).add(sample["text"])
    differ = sum(len(one) > 1 for one in texts.values())
    return (f"{differ} answers differ between repeats: the first one's count",) if differ else ()


def _compare(group: Sequence[Row], baselines: Mapping[str, str]) -> None:
    """Give the rows of a model on a task their speed-ups, paired tests and front."""
    named = {row.decoding: row for row in group}
    # The tuned baseline: the most accurate configuration without verification, then the fastest.
    plain = [row for row in group if row.decoder in DECODERS and DECODERS[row.decoder].plain]
    tuned = max(plain, key=lambda row: (row.accuracy, row.tokens_per_second), default=None)
    tuned = named.get(baselines.get("dynamic", ""), tuned)
    ar = named.get(baselines.get("ar", ""), next((row for row in group if row.decoder == "ar"), None))
    alike: dict[Any, list[Row]] = {}
    for row in group:
        alike.setdefault((row.decoder, row.new_tokens, *row.forwards.values()), []).append(row)
    for rows in alike.values():
        timings = [timing for row in rows for timing in row.timings]
        for row in rows:
            row.pace = _mean(timings)
            row.paces = speed_interval(timings) if len(row.timings) > 1 else (row.pace, row.pace)
    for row, on_front in zip(group, front([(row.paces, row.accuracy) for row in group]), strict=True):
        row.on_front = on_front
        row.speedup_over_ar, row.speedup_over_baseline = _ratio(row, ar), _ratio(row, tuned)
        if tuned is None or tuned is row:
            continue
        row.baseline = tuned.decoding
        both = [(row.scores[document], tuned.scores[document]) for document in row.scores if document in tuned.scores]
        if both:
            own, other = zip(*both, strict=True)
            row.difference = (sum(map(_mean, own)) - sum(map(_mean, other))) / len(both)
            row.p_value = paired_p_value(own, other)
    tested = [row for row in group if row.p_value is not None]
    for row, p_value in zip(tested, holm([row.p_value or 0.0 for row in tested]), strict=True):
        row.p_value = p_value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ratio(row: Row, base: Row | None) -> float | None:
    """Tokens per second over another row's, measured on the same hardware; None otherwise."""
    if base is None or not base.tokens_per_second or row.environment.get("device") != base.environment.get("device"):
        return None
    return row.tokens_per_second / base.tokens_per_second
