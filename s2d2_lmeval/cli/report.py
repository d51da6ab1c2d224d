"""The report of a study: tables, figures, and one self-contained HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "tables, figures and a page from the results of a sweep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the results of `s2d2-lmeval sweep`")
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="output folder (default: DIR/report)")


def run(args: argparse.Namespace) -> int:
    """Write the report, and show its tables."""
    from rich.text import Text

    from s2d2_lmeval.cli.console import columns_that_fit, make_console, table
    from s2d2_lmeval.studies.report import tables
    from s2d2_lmeval.studies.report.page import write_report

    console = make_console()
    with console.status("drawing"):
        results, written = write_report(args.folder, args.output)
    for (model, task), rows in results.groups().items():
        header, lines = tables.cells(tables.columns_of(rows, unsaid=True), rows)
        fits = columns_that_fit(header, lines, console.width)
        shown, bold = [line[:fits] for line in lines], [row.on_front for row in rows]
        console.print(table(header[:fits], shown, title=f"{model}, {task}", bold=bold))
        if fits < len(header):
            console.print(Text(f"Not shown: {', '.join(header[fits:])}; they are in tables.md.", "dim"))
        console.print(Text(f"{tables.about(rows)}. Bold: on the Pareto front of accuracy and speed.", "dim"))
        console.print(table(*tables.aup(rows)))
    for problem in results.problems:
        console.print(Text(problem, "yellow"))
    console.print(f"Written to {written[0]} and its folder.", markup=False, soft_wrap=True)
    return 0
