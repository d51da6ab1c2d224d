"""Terminal output shared by the subcommands."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Sequence
from typing import IO, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


def make_console(file: IO[str] | None = None) -> Console:
    """A console on stdout, as wide as the terminal; without one, wide enough for tables and trace pictures."""
    terminal = (file or sys.stdout).isatty()
    columns = shutil.get_terminal_size().columns if terminal or "COLUMNS" in os.environ else 140
    return Console(file=file, width=max(columns, 60), highlight=False)


def begin(threads: int | None = None) -> Console:
    """A console for a command that loads models: without transformers' progress bars, ``threads`` threads for torch."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    return make_console()


def table(
    header: Sequence[str],
    lines: Sequence[Sequence[str | Text]],
    *,
    texts: Collection[int] = (0,),
    sections: bool = False,
    bold: Sequence[bool] = (),
    **options: Any,
) -> Table:
    """A table for the terminal. Columns ``texts`` hold text, the others numbers.

    Args:
        sections: group lines with the same first cell, and show it once.
        bold: whether each line is bold.
    """
    framed = Table(**{"box": box.SIMPLE_HEAD, "title_justify": "left", "title_style": "bold", **options})
    for column, name in enumerate(header):
        framed.add_column(name, justify="left" if column in texts else "right")
    for place, line in enumerate(lines):
        last = sections and place + 1 < len(lines) and lines[place + 1][0] != line[0]
        repeated = sections and place > 0 and lines[place - 1][0] == line[0]
        cells = [cell if isinstance(cell, Text) else Text(cell) for cell in (["", *line[1:]] if repeated else line)]
        framed.add_row(*cells, end_section=last, style="bold" if bold and bold[place] else "")
    return framed


def columns_that_fit(header: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> int:
    """How many columns of a :func:`table`, from the left, are shown uncut on ``width`` characters; at least two."""
    room, margin = width - 2, 2
    for column, name in enumerate(header):
        room -= max(map(cell_len, (name, *(line[column] for line in lines)))) + margin
        if room < 0:
            return max(column, 2)
    return len(header)


def pairs(lines: Sequence[Sequence[str | Text]], *columns: dict[str, Any]) -> Table:
    """Names and values without a frame; ``columns`` styles the first ones."""
    plain = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for column in (*columns, {}):
        plain.add_column(**column)
    for line in lines:
        plain.add_row(*line)
    return plain


def has_color(console: Console) -> bool:
    """Whether colours are used: on a terminal, unless NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


def printable(text: str) -> str:
    """``text`` with control characters escaped, except newlines and tabs: a model must not control the terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def size(count: float) -> str:
    """A number of bytes in readable form."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
