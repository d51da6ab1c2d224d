"""The report of a study: one self-contained HTML page, figures, and tables for papers and READMEs."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.harness.identity import of_plain
from s2d2_lmeval.studies.report import plots, tables
from s2d2_lmeval.studies.report.results import Results, Row, read_results
from s2d2_lmeval.studies.store import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


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
    write_whole(page, _page(results, figures))
    write_whole(written[1], _markdown(results))
    write_whole(written[2], "\n\n".join(tables.latex(rows) for rows in results.groups().values()) + "\n")
    rows = [{k: v for k, v in asdict(row).items() if k not in ("orders", "scores")} for row in results.rows]
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
        from matplotlib import pyplot

        kinds: dict[str, dict[str, Any]] = {
            "png": {"dpi": 160},
            "pdf": {"dpi": 160},
            "svg": {"metadata": {"Date": None}},
        }
        drawn = {}
        for suffix, options in kinds.items():
            figure.savefig(file := io.BytesIO(), format=suffix, **options)
            drawn[suffix] = file.getvalue()
        pyplot.close(figure)
        for suffix in ("png", "pdf"):
            self.files.append(self.folder / f"{_file_name(name)}.{suffix}")
            write_whole(self.files[-1], drawn[suffix])
        data = base64.b64encode(drawn["svg"]).decode()
        return [{"data": f"data:image/svg+xml;base64,{data}", "alt": name, "caption": caption}]


def _page(results: Results, figures: Figures) -> str:
    from jinja2 import Environment

    models = list(dict.fromkeys(row.model for row in results.rows))
    template = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        name=results.name,
        rows=len({(row.model, row.decoding) for row in results.rows}),
        models=len(models),
        written=time.strftime("%Y-%m-%d %H:%M"),
        problems=results.problems,
        overview=[{"name": model, "figures": _overview(results, model, figures)} for model in models],
        groups=[_group(rows, figures) for rows in results.groups().values()],
        environment=[*results.rows[-1].environment.items(), ("code", results.manifest["code"])],
        study=json.dumps(results.manifest.get("study"), indent=1, ensure_ascii=False),
    )


def _overview(results: Results, model: str, figures: Figures) -> list[dict[str, str]]:
    by_task = {task: rows for (name, task), rows in results.groups().items() if name == model}
    drawn = []
    for speed, words in plots.SPEEDS.items():
        caption = f"Accuracy over {words}; bars are 95 % intervals."
        drawn += figures.add(f"{model} accuracy and {speed}", caption, plots.accuracy_and_speed, by_task, speed)
    return drawn


def _group(rows: Sequence[Row], figures: Figures) -> dict[str, Any]:
    name = f"{rows[0].model} {rows[0].task}"
    header, lines = tables.cells(tables.COLUMNS, rows)
    lengths = "How many drafted tokens each verification accepted."
    order = "The order in which one answer was decided."
    return {
        "model": rows[0].model,
        "task": rows[0].task,
        "about": tables.about(rows),
        "headline": headline(rows),
        "header": header,
        "difference": header.index(tables.DIFFERENCE) if tables.DIFFERENCE in header else None,
        "lines": [
            {"cells": line, "front": row.on_front, "verdict": _verdict(row)}
            for row, line in zip(rows, lines, strict=True)
        ],
        "notes": [f"{row.decoding}: {note}." for row in rows for note in row.notes],
        "figures": [
            *figures.add(f"{name} acceptance", lengths, plots.acceptance_histogram, rows),
            *figures.add(f"{name} order", order, plots.decoding_order, rows),
        ],
    }


def _verdict(row: Row) -> str:
    if row.p_value is None or row.difference is None or row.p_value >= tables.SIGNIFICANT:
        return ""
    return "better" if row.difference > 0 else "worse"


def headline(rows: Sequence[Row]) -> dict[str, str]:
    """The fastest configuration that is at least as accurate as ar and as the baseline."""
    names = {row.baseline for row in rows if row.baseline}
    bases = [row for row in rows if row.decoding in names or row.decoder == "ar"]
    least = max((row.accuracy for row in bases), default=max(row.accuracy for row in rows))
    fastest = max((row for row in rows if row.accuracy >= least), key=lambda row: row.tokens_per_second)
    speed = f"{fastest.tokens_per_second:.0f} tokens/s"
    if fastest.speedup_over_ar is not None and fastest.decoder != "ar":
        speed = f"{fastest.speedup_over_ar:.2f}× ar"
    return {"speed": speed, "text": f"{fastest.decoding}: accuracy {100 * fastest.accuracy:.1f} %"}


def _markdown(results: Results) -> str:
    parts = [f"# {results.name}"]
    for (model, task), rows in results.groups().items():
        parts += [f"## {model}, {task}", f"{tables.about(rows)}; bold: on the accuracy–speed front"]
        parts.append(tables.markdown(rows))
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
