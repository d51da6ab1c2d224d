"""The report of a study: one self-contained HTML page, figures, and tables for papers and READMEs."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.harness.identity import of_plain
from s2d2_lmeval.studies.report import plots, tables
from s2d2_lmeval.studies.report.page_data import data_of, swept_options
from s2d2_lmeval.studies.report.results import Results, Row, read_results
from s2d2_lmeval.studies.report.search import searches
from s2d2_lmeval.studies.report.statistics import speed_interval
from s2d2_lmeval.studies.store import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOLDEN_ANGLE = 137.508
"""Degrees between the hues of one configuration and the next, which keeps any number of them apart."""


def write_report(folder: Path, output: Path | None = None) -> tuple[Results, list[Path]]:
    """Read the results in ``folder``, and write their report.

    Args:
        output: the output folder; ``folder/report`` by default.

    Returns:
        The results, and the written files, the page first.

    Raises:
        StudyError: if there are no results.
    """
    results = read_results(folder)
    if not plots.can_draw():
        results.problems.append(plots.NEEDED)
    output = output or folder / "report"
    figures = Figures(output / "figures")
    page = output / "index.html"
    written = [page, output / "tables.md", output / "tables.tex", output / "results.json"]
    write_whole(page, _page(results, folder, figures))
    write_whole(written[1], _markdown(results))
    write_whole(written[2], "\n\n".join(tables.latex(rows) for rows in results.groups().values()) + "\n")
    rows = [
        {k: v for k, v in asdict(row).items() if k not in ("orders", "pieces", "scores", "texts")}
        for row in results.rows
    ]
    content = {"name": results.name, "rows": rows, "problems": results.problems, "manifest": dict(results.manifest)}
    write_whole(written[3], json.dumps(content, indent=1) + "\n")
    return results, [*written, *figures.files]


class Figures:
    """Figures as files (PNG, and PDF for papers) and inline for the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []

    def add(self, name: str, caption: str, draw: Callable[..., Figure | None], *of: Any) -> list[dict[str, str]]:
        """A list of one entry for the template; empty where there is no figure."""
        figure = draw(*of) if plots.can_draw() else None
        if figure is None:
            return []
        from matplotlib import pyplot, rc_context

        kinds: dict[str, dict[str, Any]] = {
            "png": {"dpi": 160},
            "pdf": {"dpi": 160},
            "svg": {"metadata": {"Date": None}},
        }
        drawn = {}
        for suffix, options in kinds.items():
            with rc_context(plots.STYLE):
                figure.savefig(file := io.BytesIO(), format=suffix, **options)
            drawn[suffix] = file.getvalue()
        pyplot.close(figure)
        for suffix in ("png", "pdf"):
            self.files.append(self.folder / f"{_file_name(name)}.{suffix}")
            write_whole(self.files[-1], drawn[suffix])
        data = base64.b64encode(drawn["svg"]).decode()
        return [{"data": f"data:image/svg+xml;base64,{data}", "alt": name, "caption": caption}]


def _page(results: Results, folder: Path, figures: Figures) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    template = Environment(autoescape=True).from_string(_beside("report.html.jinja"))
    models = {row.model for row in results.rows}
    names = list(dict.fromkeys(row.decoding for row in results.rows))
    hues = {name: round(place * GOLDEN_ANGLE) % 360 for place, name in enumerate(names)}
    groups = list(results.groups().values())
    data = list(data_of(groups, hues, results.models))
    for model in sorted(models):
        by_task = {rows[0].task: rows for rows in groups if rows[0].model == model}
        for speed, words in plots.SPEEDS.items():
            figures.add(f"{model} accuracy and {speed}", words, plots.accuracy_and_speed, by_task, speed)
    found = [figures.add(*one) for one in searches(folder, results.manifest)]
    return template.render(
        name=results.name,
        searched=[figure for several in found for figure in several],
        rows=len({(row.model, row.decoding) for row in results.rows}),
        models=len(models),
        written=time.strftime("%Y-%m-%d %H:%M"),
        problems=results.problems,
        groups=[_group(rows, data, figures) for rows, data in zip(groups, data, strict=True)],
        data=data,
        environment=[*results.rows[-1].environment.items(), ("code", results.manifest["code"])],
        study=json.dumps(results.manifest.get("study"), indent=1, ensure_ascii=False),
        style=Markup(_beside("report.css")),
        script=Markup(_beside("report.js")),
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _group(rows: Sequence[Row], data: Mapping[str, Any], figures: Figures) -> dict[str, Any]:
    name = f"{rows[0].model} {rows[0].task}"
    header, lines = tables.cells(tables.columns_of(rows), rows)
    lengths = "How many drafted tokens each verification accepted."
    order = "The order in which one answer was decided."
    baseline = next((place for place, row in enumerate(rows) if row.decoding in {one.baseline for one in rows}), 0)
    other = next((place for place, row in enumerate(rows) if row.on_front and place != baseline), int(baseline == 0))
    drawn = figures.add(f"{name} order", order, plots.decoding_order, rows)
    return {
        "model": rows[0].model,
        "task": rows[0].task,
        "anchor": _file_name(name),
        "about": tables.about(rows),
        "timed": tables.timed(rows),
        "headline": headline(rows),
        "header": header,
        "difference": header.index(tables.DIFFERENCE) if tables.DIFFERENCE in header else None,
        "swept": swept_options(rows),
        "lines": [
            {"cells": line, "front": row.on_front, "verdict": _verdict(row), "args": one["args"], "color": _color(one)}
            for row, line, one in zip(rows, lines, data["rows"], strict=True)
        ],
        "aup": tables.aup(rows),
        "best": f"{100 * max(row.accuracy for row in rows):.1f} %",
        "documents": data["documents"],
        "sides": (baseline, other),
        "order": data["order"],
        "notes": [f"{row.decoding}: {note}." for row in rows for note in row.notes],
        "figures": [
            *figures.add(f"{name} acceptance", lengths, plots.acceptance_histogram, rows),
            *(() if data["order"] else drawn),
        ],
    }


def _color(entry: Mapping[str, Any]) -> str:
    return f"--hue: {entry['hue']}; --full: {'0%' if entry['decoder'] == 'ar' else '68%'}"


def _verdict(row: Row) -> str:
    if row.p_value is None or row.difference is None or row.p_value >= tables.SIGNIFICANT:
        return ""
    return "better" if row.difference > 0 else "worse"


def headline(rows: Sequence[Row]) -> dict[str, str]:
    """The configuration with the most tokens per forward that is at least as accurate as ar and as the baseline.

    Forwards are counted, and the same in every run; times are only told.
    """
    ar = next((row for row in rows if row.decoder == "ar"), None)
    names = {row.baseline for row in rows if row.baseline}
    bases = [row for row in rows if row.decoding in names or row.decoder == "ar"]
    least = max((row.accuracy for row in bases), default=max(row.accuracy for row in rows))
    best = max((row for row in rows if row.accuracy >= least), key=lambda row: (row.tokens_per_forward, row.pace))
    figure = f"{best.tokens_per_forward:.2f} tokens/forward"
    if ar is not None and best is not ar:
        figure = f"{best.tokens_per_forward / ar.tokens_per_forward:.2f}× ar's tokens/forward"
    timed = f"{tables.timed([best])}: {best.tokens_per_second:.0f} tokens/s"
    if len(best.timings) > 1:
        timed += " ({:.0f}–{:.0f})".format(*speed_interval(best.timings))
    if best.speedup_over_ar is not None and best is not ar:
        timed += f", {best.speedup_over_ar:.2f}× ar's"
    return {"speed": figure, "text": f"{best.decoding}: accuracy {100 * best.accuracy:.1f} %; {timed}"}


def _markdown(results: Results) -> str:
    parts = [f"# {results.name}"]
    for (model, task), rows in results.groups().items():
        parts += [f"## {model}, {task}", f"{tables.about(rows)}; bold: on the accuracy–speed front"]
        parts.append(tables.markdown(rows))
        parts += ["Accuracy under parallelism (AUP):", tables.in_markdown(*tables.aup(rows))]
        parts += [f"- {row.decoding}: {note}" for row in rows for note in row.notes]
    parts.append("\n".join(f"- {name}: {value}" for name, value in results.rows[-1].environment.items()))
    parts += [f"- {problem}" for problem in results.problems]
    return "\n\n".join(parts) + "\n"


def _file_name(name: str) -> str:
    """``name`` as the name of a file; other names have other files."""
    plain = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in name)
    if plain == name.replace(" ", "_") and len(plain) <= 100:
        return plain
    return f"{plain[:100]}-{of_plain(name)[:6]}"
