"""`s2d2-lmeval bench --launches`: a bar while counting, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from s2d2_lmeval.model import BlockDiffusionModel
    from s2d2_lmeval.studies.bench.launches import Row


def count_all(
    console: Console,
    model: BlockDiffusionModel,
    entries: Mapping[str, Mapping[str, Any]],
    work: Mapping[int, Sequence[Sequence[int]]],
) -> list[Row]:
    """The row of every entry (name -> options) and batch (-> prompts)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from s2d2_lmeval.studies.bench.launches import count_launches

    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("counting", total=len(entries) * len(work))
        for name, options in entries.items():
            for batch, prompts in work.items():
                progress.update(bar, description=f"{name}, batch {batch}")
                rows.append({"name": name, **count_launches(model, options, batch, prompts)})
                progress.advance(bar)
    return rows


def launch_table(rows: Sequence[Row]) -> Any:
    """The rows; means over decode steps, then the faults. Narrow enough for a terminal of 80 columns."""
    from rich.text import Text

    from s2d2_lmeval.cli.console import table

    per_step = ("launches_outside", "launches_replayed", "uploads", "reads", "blocking")
    header = ["decoder", "batch", "out", "in", "up", "down", "waits", "replay", "faults", "tokens"]
    lines = []
    for row in rows:
        faults = row["capture_faults"] + row["device_mismatches"] + row["races"]
        if "error" in row:
            cells = ["–"] * (len(per_step) + 1)
            said = Text(row["error"], style="red", overflow="ellipsis", no_wrap=True)
        else:
            cells = [*(f"{row[name]:.1f}" for name in per_step), f"{row['replayed_share']:.0%}"]
            said = Text("same") if row["same_tokens"] else Text("differ", style="red")
        lines.append([row["name"], str(row["batch"]), *cells, str(faults), said])
    title = "Per decode step: launches outside graphs and in them, transfers, other waits"
    texts = [0, len(header) - 1]
    return table(header, lines, texts=texts, sections=True, title=title, collapse_padding=True, pad_edge=False)
