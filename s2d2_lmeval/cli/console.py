"""What the subcommands share in talking to a terminal."""

from __future__ import annotations

import os
import shutil
import sys
from typing import IO

from rich.console import Console


def make_console(file: IO[str] | None = None) -> Console:
    """A console on stdout, as wide as the terminal; where there is none, wide enough for the tables and the pictures
    of a trace.
    """
    terminal = (file or sys.stdout).isatty()
    columns = shutil.get_terminal_size().columns if terminal or "COLUMNS" in os.environ else 140
    return Console(file=file, width=max(columns, 60), highlight=False)


def has_color(console: Console) -> bool:
    """Whether colours come out: a terminal, and NO_COLOR not set."""
    return console.color_system is not None and not console.no_color


def printable(text: str) -> str:
    """``text``, its control characters but newlines and tabs spelled out: a model must not steer the terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def hide_loading_bars() -> None:
    """Keep transformers' bars of weights and downloads off the terminal."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
