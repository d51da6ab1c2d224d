"""What the page's script works with: the numbers of the tables, and the documents on which configurations differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import Any

from s2d2_lmeval.decoding.generation import MARK_NAMES
from s2d2_lmeval.studies.report import plots
from s2d2_lmeval.studies.report.results import Row
from s2d2_lmeval.studies.report.statistics import speed_interval
from s2d2_lmeval.studies.report.varied import model_args, varied_options

LONGEST_TEXT = 1500
MOST_TEXT = 250_000
"""Characters of answers in one page."""


def numbers_of(rows: Sequence[Row], hues: Mapping[str, int], models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of a model on a task, for charts: ``number`` is that of the table's line."""
    varied = varied_options(rows)
    entries = [
        {
            "number": number,
            "name": row.decoding,
            "decoder": row.decoder,
            "hue": hues[row.decoding],
            "accuracy": _finite(row.accuracy),
            "low": _finite(row.low),
            "high": _finite(row.high),
            "speed": _finite(row.tokens_per_second),
            "paces": [_finite(bound) for bound in row.paces],
            "timings": list(speed_interval(row.timings)) if len(row.timings) > 1 else None,
            "parallel": _finite(row.tokens_per_forward),
            "options": {name: row.options[name] for name in varied if name in row.options},
            "args": model_args(row, models),
        }
        for number, row in enumerate(rows)
    ]
    return {"metric": rows[0].metric.partition(",")[0], "rows": entries}


def documents_of(rows: Sequence[Row], room: int) -> tuple[dict[str, Any], int]:
    """The documents that not all of ``rows`` score alike, with the answers (first seed) of each, in at most ``room``
    characters; an answer that several gave is there once. Returns them and the room that is left.
    """
    texts: dict[str, int] = {}
    documents = []
    for document in sorted({document for row in rows for document in row.scores}):
        answered = [(number, row) for number, row in enumerate(rows) if document in row.scores]
        scores = {number: sum(row.scores[document]) / len(row.scores[document]) for number, row in answered}
        if len(set(scores.values())) < 2:
            continue
        written = {number: _shortened(row.texts.get(document, "")) for number, row in answered}
        more = {text for text in written.values() if text not in texts}
        room -= sum(map(len, more))
        if room < 0:
            break
        for text in written.values():
            texts.setdefault(text, len(texts))
        numbers = {number: texts[text] for number, text in written.items()}
        documents.append({"document": document, "scores": scores, "texts": numbers})
    return {"documents": documents, "texts": list(texts)}, room


def order_of(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The tokens of one answer under some configurations, each with the step that decided it and how; None where they
    were not kept.
    """
    found = plots.with_order(rows)
    if found is None:
        return None
    document, chosen = found
    told = [
        {
            "number": next(number for number, other in enumerate(rows) if other is row),
            "places": [
                [step + 1, mark, text]
                for (_, step, mark), text in sorted(
                    zip(order, row.pieces[document], strict=True), key=lambda one: one[0]
                )
            ],
        }
        for row, order in chosen
        if len(row.pieces.get(document, ())) == len(order)
    ]
    return {"document": document, "marks": MARK_NAMES, "rows": told} if told else None


def data_of(
    groups: Sequence[Sequence[Row]], hues: Mapping[str, int], models: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The data of every section of the page."""
    room = MOST_TEXT
    for rows in groups:
        documents, room = documents_of(rows, room)
        yield {**numbers_of(rows, hues, models), **documents, "order": order_of(rows)}


def swept_options(rows: Sequence[Row]) -> list[str]:
    """The varied options that are numbers."""
    return [name for name in varied_options(rows) if sum(_is_number(row.options.get(name)) for row in rows) > 1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float) -> float | None:
    return None if isnan(value) else value


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
