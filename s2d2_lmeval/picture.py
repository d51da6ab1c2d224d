"""The decoding order of one request as a picture: a line per engine step, a cell per token of the block."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from s2d2_lmeval.decoding.generation import ACCEPTED, MARK_NAMES, Step


class State(Enum):
    """A kind of cell: its name, its symbol without colours, its style with colours, and its explanation."""

    def __init__(self, label: str, symbol: str, style: str, meaning: str) -> None:
        self.label, self.symbol, self.style, self.meaning = label, symbol, style, meaning

    PROMPT = ("prompt", ":", "dim", "given")
    EARLIER = ("earlier", "", "", "decided in an earlier step")
    MASK = ("mask", "", "dim", "still a mask")
    DRAFTED = ("drafted", "?", "italic bright_black", "drafted, on its way to the verifier")
    ACCEPTED = ("accepted", "+", "black on green", "drafted and accepted by the verifier")
    RESAMPLED = ("resampled", "~", "black on yellow", "rejected; what the verifier says instead")
    KEPT = ("kept", "=", "black on magenta", "rejected, but the draft stands (allow_resample=false)")
    RATIO = ("ratio", "%", "black on bright_cyan", "accepted after a rejection, by ratio")
    CONFIDENT = ("high confidence", "!", "black on bright_blue", "decided for its confidence, besides the verifier")
    DENOISED = ("denoised", "*", "black on cyan", "decided by the remasking strategy, unverified")
    CAUSAL = ("autoregressive", "&", "black on bright_green", "predicted by the text before it")
    EDITED = ("edited", "/", "black on bright_magenta", "decided before, replaced by another token")
    OTHER = ("other", "#", "black on white", "decided in another way")


class Picture:
    """Lines of text with colours: a notebook shows it in them, ``print`` without."""

    def __init__(self, lines: Sequence[Text]) -> None:
        self.lines = list(lines)

    def __str__(self) -> str:
        return "\n".join(line.plain.rstrip() for line in self.lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        width = max((line.cell_len for line in self.lines), default=1)
        console = Console(
            record=True,
            file=io.StringIO(),
            width=width,
            color_system="truecolor",
            force_terminal=True,
            force_jupyter=False,  # or rich shows in a notebook what is only recorded here
        )
        for line in self.lines:
            console.print(line, no_wrap=True)
        frame = '<pre style="font-family: monospace; line-height: 1.35; overflow-x: auto">{code}</pre>'
        return console.export_html(inline_styles=True, code_format=frame)


_OF_MARK = {state.label: state for state in State}
MASK, STOP = "·", "■"
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})
_WIDEST, _NARROWEST = 14, 4


@dataclass(frozen=True)
class Line:
    """One step: its number, its label, where its block starts, and (state, text) of each cell."""

    number: int
    label: str
    start: int
    cells: tuple[tuple[State, str], ...]


def picture(
    steps: Sequence[Step],
    token_text: Callable[[int], str],
    *,
    mask_token_id: int,
    prompt_length: int,
    stop_token_ids: Sequence[int] = (),
    width: int = 100,
    color: bool = True,
) -> list[Text]:
    """The lines of text that draw ``steps`` in ``width`` columns, with a legend at the end.

    Args:
        token_text: the text of a token id; see :func:`visible` for how it is shown.
        color: distinguish states by colour; otherwise by a symbol before each token.
    """
    stops = frozenset(stop_token_ids)
    lines = read_steps(steps, lambda token: STOP if token in stops else token_text(token), mask_token_id, prompt_length)
    if not lines:
        return []
    label_width = max(len(line.label) for line in lines)
    number_width = len(str(lines[-1].number))
    drawn: list[Text] = []
    for block in _blocks(lines):
        drawn += _draw_block(block, number_width, label_width, width, color)
    seen = {state for line in lines for state, _ in line.cells}
    stopped = any(shown == STOP for line in lines for _, shown in line.cells)
    return [*drawn, Text(), *legend(seen, color, stopped)]


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; the tokenizer's own spelling if the token is only part of a character."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if text and "\ufffd" not in text:
        return str(text)
    return str(tokenizer.convert_ids_to_tokens(token) or f"<{token}>")


def legend(states: set[State], color: bool, stopped: bool = False) -> list[Text]:
    """The meaning of each of the ``states`` that occur, one line each, and of the stop token's symbol."""
    entries = []
    for state in State:
        if state in states:
            sample = MASK if state is State.MASK else state.label if color else state.symbol + state.label
            entries.append((sample, state.style if color else "", state.meaning))
    if stopped:
        entries.append((STOP, "", "a stop token"))
    return [
        Text("  ").append(sample, style).append(" " * (17 - len(sample))).append(meaning, "dim")
        for sample, style, meaning in entries
    ]


def visible(text: str, limit: int = _WIDEST) -> str:
    """``text`` on one line of at most ``limit`` columns, with blanks and control characters made visible."""
    shown = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text.translate(_VISIBLE))
    if cell_len(shown) <= limit:
        return shown
    while cell_len(shown) > limit - 1:
        shown = shown[:-1]
    return shown + "…"


def read_steps(
    steps: Sequence[Step], token_text: Callable[[int], str], mask_token_id: int, prompt_length: int
) -> list[Line]:
    """The cells of each step.

    A draft that goes to the verifier shows its token at every mask; any other draft shows what it decided.
    """
    lines = []
    for index, step in enumerate(steps):
        following = steps[index + 1] if index + 1 < len(steps) else None
        verified_next = following is not None and following.kind == "verify" and following.start == step.start
        cells = []
        for offset, token in enumerate(step.tokens):
            mark = step.marks[offset]
            if mark:
                state = _OF_MARK.get(MARK_NAMES[mark], State.OTHER)
            elif step.before[offset] not in (mask_token_id, token):
                state = State.EDITED
            elif token != mask_token_id:
                state = State.PROMPT if step.start + offset < prompt_length else State.EARLIER
            elif step.kind == "draft" and verified_next:
                state, token = State.DRAFTED, step.draft[offset]
            else:
                state = State.MASK
            cells.append((state, MASK if state is State.MASK else token_text(token)))
        lines.append(Line(index + 1, _label(step, mask_token_id), step.start, tuple(cells)))
    return lines


def _label(step: Step, mask_token_id: int) -> str:
    decided = sum(mark != 0 for mark in step.marks)
    if step.kind != "verify":
        return f"{step.kind} +{decided}" if decided else step.kind
    masked = [token == mask_token_id for token in step.before]
    first = masked.index(True) if True in masked else 0
    span = next((length for length, still in enumerate(masked[first:]) if not still), len(masked) - first)
    accepted = sum(mark == ACCEPTED for mark in step.marks)
    return f"{step.kind} {accepted}/{span}"


def _blocks(lines: Sequence[Line]) -> list[list[Line]]:
    """Consecutive lines of the same block; all lines together if a block is a single token."""
    if all(len(line.cells) == 1 for line in lines):
        return [list(lines)]
    blocks: list[list[Line]] = []
    for line in lines:
        if not blocks or blocks[-1][0].start != line.start or len(blocks[-1][0].cells) != len(line.cells):
            blocks.append([])
        blocks[-1].append(line)
    return blocks


def _draw_block(block: Sequence[Line], number_width: int, label_width: int, width: int, color: bool) -> list[Text]:
    """A heading, then the lines of the block, split into portions if it is wider than the terminal."""
    left = number_width + label_width + 6
    symbols = 0 if color else 1
    columns = len(block[0].cells)
    for limit in range(_WIDEST, _NARROWEST - 1, -1):
        widths = [
            max(symbols + cell_len(visible(line.cells[column][1], limit)) for line in block)
            for column in range(columns)
        ]
        if left + sum(widths) + columns <= width:
            break
    drawn = []
    for portion in _portions(widths, width - left):
        start = block[0].start + portion.start
        last = block[-1].start + portion.stop - 1
        named = f"position {start}" if start == last else f"positions {start}-{last}"
        drawn.append(Text(" " * left + named, "bold"))
        for line in block:
            text = Text(f" {line.number:>{number_width}}  {line.label:<{label_width}} │ ")
            for column in portion:
                state, cell = line.cells[column]
                _append_cell(text, state, visible(cell, limit), widths[column], color)
            drawn.append(text)
    return drawn


def _portions(widths: Sequence[int], room: int) -> list[range]:
    """Ranges of columns that fit into ``room``, with at least one column each."""
    portions, begin, used = [], 0, 0
    for column, needed in enumerate(widths):
        if column > begin and used + needed + 1 > room:
            portions.append(range(begin, column))
            begin, used = column, 0
        used += needed + 1
    return [*portions, range(begin, len(widths))]


def _append_cell(text: Text, state: State, shown: str, width: int, color: bool) -> None:
    padded = shown if color else (state.symbol or " ") + shown
    text.append(padded + " " * (width - cell_len(padded)), state.style if color else "").append(" ")
