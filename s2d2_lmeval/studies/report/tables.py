"""Tables: their columns, and the rows of a study as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

from s2d2_lmeval.studies.report.results import KINDS, Row
from s2d2_lmeval.studies.report.statistics import speed_interval
from s2d2_lmeval.studies.report.varied import AUP_COLUMNS, aup_by_decoder, option_columns

Cells = list[list[str]]
DIFFERENCE = "vs. baseline"
SIGNIFICANT = 0.05


def shown(value: float | None, form: str, scale: float = 1) -> str:
    """``scale * value`` in a format; empty if unknown."""
    return "" if value is None or isnan(value) else format(scale * value, form)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "decoding": lambda row: row.decoding,
    "accuracy": lambda row: f"{100 * row.accuracy:.1f}",
    "95 % interval": lambda row: "" if isnan(row.low) else f"{100 * row.low:.1f}–{100 * row.high:.1f}",
    DIFFERENCE: lambda row: shown(row.difference, "+.1f", 100),
    "p": lambda row: shown(row.p_value, ".2g"),
    "tokens/forward": lambda row: shown(row.tokens_per_forward, ".2f"),
    "tokens/s": lambda row: shown(row.tokens_per_second, ".1f"),
    "95 % of tokens/s": lambda row: (
        "" if len(row.timings) < 2 else "{:.1f}–{:.1f}".format(*speed_interval(row.timings))
    ),
    "× ar": lambda row: shown(row.speedup_over_ar, ".2f"),
    "× baseline": lambda row: shown(row.speedup_over_baseline, ".2f"),
    "accepted": lambda row: "" if row.acceptance is None else f"{100 * row.acceptance:.0f} %",
    "forwards": lambda row: f"{row.nfe:.1f}",
    **{kind: lambda row, kind=kind: shown(row.forwards[kind] or None, ".1f") for kind in KINDS},  # type: ignore[misc]
}
"""``vs. baseline`` is the difference in accuracy; ``forwards`` and its kinds are means per answer."""


def columns_of(rows: Sequence[Row], *, unsaid: bool = False) -> dict[str, Callable[[Row], str]]:
    """:data:`COLUMNS`, and what was varied among ``rows``; ``unsaid``: what the name does not say, and next to it."""
    varied = option_columns(rows, unsaid=unsaid)
    return {"decoding": COLUMNS["decoding"], **varied, **COLUMNS} if unsaid else {**COLUMNS, **varied}


def cells(columns: Mapping[str, Callable[[Any], str]], entries: Sequence[Any]) -> tuple[list[str], Cells]:
    """Header and cells: one line per entry, without columns that are empty in every line."""
    lines = [[cell(entry) for cell in columns.values()] for entry in entries]
    used = [place for place in range(len(columns)) if any(line[place] for line in lines)]
    return [list(columns)[place] for place in used], [[line[place] for place in used] for line in lines]


def about(rows: Sequence[Row]) -> str:
    """What the rows of a table have in common."""
    first = rows[0]
    baseline = next((row.baseline for row in rows if row.baseline), "")
    seeds = f", seeds {', '.join(map(str, first.seeds))}" if len(first.seeds) > 1 else ""
    tuned = f"; the baseline is {baseline}" if baseline else ""
    flight = f"{first.batch} requests in flight, {timed(rows)}"
    return f"{first.metric} over {first.documents} documents{seeds}, {flight}{tuned}"


def timed(rows: Sequence[Row]) -> str:
    """How often the rows of a table were timed."""
    least = min(len(row.timings) for row in rows)
    return "timed once" if least < 2 else f"timed {least} times in turn"


def markdown(rows: Sequence[Row]) -> str:
    """A table; the front is in bold."""
    header, table = cells(columns_of(rows), rows)
    for row, line in zip(rows, table, strict=True):
        line[:] = [cell.replace("|", "\\|") for cell in line]
        line[0] = f"**{line[0]}**" if row.on_front else line[0]
    return in_markdown(header, table)


def aup(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """Accuracy under parallelism of every decoder among ``rows``, as header and cells."""
    return cells(AUP_COLUMNS, aup_by_decoder(rows))


def in_markdown(header: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Cells as a Markdown table; the first ``texts`` columns hold text, the others numbers."""
    rule = [":--" if column < texts else "--:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


_ESCAPED = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "×": r"$\times$",
        "–": "--",
        "<": r"$<$",
        ">": r"$>$",
    }
)


def latex(rows: Sequence[Row]) -> str:
    """A booktabs table, with the Pareto front in bold."""
    header, table = cells(columns_of(rows), rows)
    caption = f"{rows[0].model}, {rows[0].task}: {about(rows)}. Bold: on the accuracy–speed front."
    lines = [[cell.translate(_ESCAPED) for cell in line] for line in (header, *table)]
    for row, line in zip(rows, lines[1:], strict=True):
        line[0] = rf"\textbf{{{line[0]}}}" if row.on_front else line[0]
    top, *body = (" & ".join(line) + r" \\" for line in lines)
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}[t]\centering\small",
            rf"\caption{{{caption.translate(_ESCAPED)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            *(r"\toprule", top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"),
        ]
    )
