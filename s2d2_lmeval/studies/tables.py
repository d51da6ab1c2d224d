"""The rows of a study as cells, and the cells as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from s2d2_lmeval.studies.results import KINDS, Row

DIFFERENCE = "vs. baseline"
HEADER = (
    *("decoding", "accuracy", "95 % interval", DIFFERENCE, "p", "tokens/forward", "tokens/s", "× ar", "× baseline"),
    *("accepted", "forwards", *KINDS),
)
"""``vs. baseline`` is the difference in accuracy; ``forwards`` and its kinds are means per answer."""

SIGNIFICANT = 0.05


def cells(row: Row) -> list[str]:
    """The cells of :data:`HEADER`."""
    if row.difference is not None:
        difference, p_value = f"{100 * row.difference:+.1f}", f"{row.p_value:.2g}"
    else:
        difference, p_value = ("", "")
    known = not isnan(row.low)
    return [
        row.decoding,
        f"{100 * row.accuracy:.1f}",
        f"{100 * row.low:.1f}–{100 * row.high:.1f}" if known else "",
        difference,
        p_value,
        "" if isnan(row.tokens_per_forward) else f"{row.tokens_per_forward:.2f}",
        "" if isnan(row.tokens_per_second) else f"{row.tokens_per_second:.1f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in (row.speedup_over_ar, row.speedup_over_baseline)),
        "" if row.acceptance is None else f"{100 * row.acceptance:.0f} %",
        f"{row.nfe:.1f}",
        *(f"{row.forwards[kind]:.1f}" if row.forwards[kind] else "" for kind in KINDS),
    ]


def filled(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of ``rows``, without the columns that are empty in every row."""
    lines = [cells(row) for row in rows]
    columns = [place for place in range(len(HEADER)) if any(line[place] for line in lines)]
    return [HEADER[place] for place in columns], [[line[place] for place in columns] for line in lines]


def about(rows: Sequence[Row]) -> str:
    """What the rows of a table have in common."""
    first = rows[0]
    baseline = next((row.baseline for row in rows if row.baseline), "")
    seeds = f", seeds {', '.join(map(str, first.seeds))}" if len(first.seeds) > 1 else ""
    tuned = f"; the baseline is {baseline}" if baseline else ""
    return f"{first.metric} over {first.documents} documents{seeds}, {first.batch} requests in flight{tuned}"


def markdown(rows: Sequence[Row]) -> str:
    """A table; the front is in bold."""
    header, table = filled(rows)
    lines = []
    for row, line in zip(rows, table, strict=True):
        first, *rest = (cell.replace("|", "\\|") for cell in line)
        lines.append([f"**{first}**" if row.on_front else first, *rest])
    return in_markdown(header, lines)


def in_markdown(header: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Cells as a Markdown table; the first ``texts`` columns hold text, the others numbers."""
    rule = [":--" if column < texts else "--:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


_ESCAPED = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "×": r"$\times$",
    "–": "--",
    "<": r"$<$",
    ">": r"$>$",
}


def escaped(text: str) -> str:
    """``text`` for LaTeX."""
    return "".join(_ESCAPED.get(letter, letter) for letter in text)


def latex(rows: Sequence[Row]) -> str:
    """A table in the manner of booktabs; the front is in bold."""
    header, table = filled(rows)
    caption = f"{rows[0].model}, {rows[0].task}: {about(rows)}. Bold: on the accuracy--speed front."
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}[t]\centering\small",
        rf"\caption{{{escaped(caption).replace('----', '--')}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(map(escaped, header)) + r" \\",
        r"\midrule",
    ]
    for row, line in zip(rows, table, strict=True):
        shown = [escaped(cell) for cell in line]
        if row.on_front:
            shown[0] = rf"\textbf{{{shown[0]}}}"
        lines.append(" & ".join(shown) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])
