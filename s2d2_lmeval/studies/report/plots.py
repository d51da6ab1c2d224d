"""Figures of a study, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from math import ceil, isnan
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.decoding.generation import RESAMPLED
from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.studies.report.results import Row
from s2d2_lmeval.studies.report.statistics import pareto

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C8C00")
_AR = "#555555"
STYLE = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",  # the reader's fonts: outlines would triple the page
    "svg.hashsalt": "s2d2-lmeval",
    "text.parse_math": False,  # a name may hold a dollar sign
}
MOST_HISTOGRAMS = 6
WIDEST_HISTOGRAM = 1 << 12
LONGEST_ORDER = 1 << 14
ORDER_WIDTH = 32
"""Positions in a line of the decoding-order picture."""

SPEEDS = {"tokens_per_second": "new tokens per second", "tokens_per_forward": "new tokens per forward"}

NEEDED = "figures need matplotlib: pip install matplotlib."


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _styled(draw: Callable[..., Figure | None]) -> Callable[..., Figure | None]:
    """A function that draws, in the style of all figures."""

    @wraps(draw)
    def styled(*of: Any) -> Figure | None:
        if not can_draw():
            raise StudyError(NEEDED)
        import matplotlib

        matplotlib.use("Agg", force=False)
        with matplotlib.rc_context(STYLE):
            return draw(*of)

    return styled


def _panels(count: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` panels, up to three beside each other, of ``width`` and ``height`` inches."""
    from matplotlib import pyplot

    columns = min(3, count)
    lines = ceil(count / columns)
    size = (max(options.pop("least"), width * columns), height * lines + options.pop("margin", 0))
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    """Decoder -> colour; ar is grey."""
    others = [decoder for decoder in dict.fromkeys(row.decoder for row in rows) if decoder != "ar"]
    return {"ar": _AR, **{decoder: _COLORS[place % len(_COLORS)] for place, decoder in enumerate(others)}}


@_styled
def accuracy_and_speed(tasks: dict[str, list[Row]], speed: str) -> Figure:
    """Accuracy (with its interval) over speed: a panel per task, a colour per decoder, the front as a line."""
    from matplotlib.lines import Line2D

    figure, axes = _panels(len(tasks), 3.9, 3.3, least=5.2, margin=0.5)
    rows = [row for several in tasks.values() for row in several]
    colors, drawn = _colors(rows), {row.decoder for row in rows}
    for axis, (task, several) in zip(axes, tasks.items(), strict=True):
        _scatter(axis, several, speed, colors)
        axis.set(title=task, xlabel=SPEEDS[speed], ylabel=f"{several[0].metric.partition(',')[0]} (%)")
    handles = [
        Line2D([], [], marker=_marker(decoder), linestyle="", color=color, label=decoder)
        for decoder, color in colors.items()
        if decoder in drawn
    ]
    handles.append(Line2D([], [], color="#999999", linestyle="--", linewidth=1, label="front"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(8, len(handles)), frameon=False)
    return figure


def _marker(decoder: str) -> str:
    return "s" if decoder == "ar" else "o"


def _scatter(axis: Any, rows: Sequence[Row], speed: str, colors: dict[str, str]) -> None:
    places = [(getattr(row, speed), 100 * row.accuracy, row) for row in rows]
    for x, y, row in places:
        color = colors[row.decoder]
        if not isnan(row.low):
            axis.plot([x, x], [100 * row.low, 100 * row.high], color=color, alpha=0.35, linewidth=1.2)
        dot: dict[str, Any] = {"markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.6}
        axis.plot(x, y, _marker(row.decoder), color=color, **dot)
    by_forwards = speed == "tokens_per_forward"
    on_front = pareto([(x, y) for x, y, _ in places]) if by_forwards else [row.on_front for row in rows]
    front = sorted((one for one, on in zip(places, on_front, strict=True) if on), key=lambda one: one[0])
    axis.plot([one[0] for one in front], [one[1] for one in front], "--", color="#999999", linewidth=1, zorder=1)
    axis.margins(x=0.18, y=0.12)
    _label(axis, [*front, *(one for one in places if one[2].decoder == "ar")])


def _label(axis: Any, points: Sequence[tuple[float, float, Row]]) -> None:
    """Names beside the points that matter, alternately above and below; none over another, and each only once."""
    from matplotlib.patheffects import withStroke

    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    written: dict[str, tuple[float, float]] = {}
    for place, (x, y, row) in enumerate(points):
        above = place % 2 == 0
        at = (x - left) / (right - left), (y - bottom) / (top - bottom) + (0.05 if above else -0.05)
        crowded = any(abs(at[0] - one[0]) < 0.24 and abs(at[1] - one[1]) < 0.05 for one in written.values())
        if row.decoding in written or crowded:
            continue
        written[row.decoding] = at
        text: dict[str, Any] = {"ha": "center", "fontsize": 7, "color": "#333333"}
        outline = [withStroke(linewidth=2, foreground="white")]
        offset = (0, 7 if above else -13)
        axis.annotate(short(row.decoding), (x, y), offset, textcoords="offset points", path_effects=outline, **text)


def short(name: str) -> str:
    """A name from a grid without the option names: what was varied is in the tables."""
    return " ".join(word.rpartition("=")[2] for word in name.split(" "))


@_styled
def acceptance_histogram(rows: Sequence[Row]) -> Figure | None:
    """How many drafted tokens a verification accepts; None where nothing was verified."""
    verified = [row for row in rows if row.acceptance_lengths and max(row.acceptance_lengths) < WIDEST_HISTOGRAM]
    if not verified:
        return None
    verified = sorted(verified, key=lambda row: not row.on_front)[:MOST_HISTOGRAMS]
    figure, axes = _panels(len(verified), 3.1, 2.2, least=3.6, sharex=True, sharey=True)
    colors = _colors(rows)
    for axis, row in zip(axes, verified, strict=True):
        total = sum(row.acceptance_lengths.values())
        lengths = range(max(row.acceptance_lengths) + 1)
        shares = [100 * row.acceptance_lengths.get(length, 0) / total for length in lengths]
        mean = sum(length * share for length, share in zip(lengths, shares, strict=True)) / 100
        axis.bar(lengths, shares, color=colors[row.decoder], width=0.8)
        axis.axvline(mean, color="#333333", linewidth=1, linestyle=":")
        left = mean > 0.6 * lengths[-1]
        text: dict[str, Any] = {
            "fontsize": 7,
            "va": "top",
            "ha": "right" if left else "left",
            "textcoords": "offset points",
        }
        axis.annotate(f"mean {mean:.2f}", (mean, 1), (-4 if left else 4, -2), ("data", "axes fraction"), **text)
        axis.set_title(short(row.decoding), fontsize=8)
        axis.grid(axis="x", visible=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("drafted tokens accepted by a verification", fontsize=9)
    figure.supylabel("% of verifications", fontsize=9)
    return figure


@_styled
def decoding_order(rows: Sequence[Row]) -> Figure | None:
    """In which step each place of one document was decided: a panel per configuration, read like a page.

    None where no configuration has a document of which the order was kept.
    """
    import numpy as np
    from matplotlib import pyplot

    found = with_order(rows)
    if found is None:
        return None
    document, chosen = found
    last = max(step for _, order in chosen for _, step, _ in order) + 1
    heights = [_lines(order) for _, order in chosen]
    size = (8.4, sum(0.25 * height + 0.42 for height in heights) + 0.5)
    options = {"figsize": size, "height_ratios": heights, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(chosen), 1, **options)
    for axis, (row, order), height in zip(axes.flat, chosen, heights, strict=True):
        picture = np.full((height, ORDER_WIDTH), np.nan)
        first = min(position for position, _, _ in order)
        for position, step, _ in order:
            picture[divmod(position - first, ORDER_WIDTH)] = step + 1
        axis.pcolormesh(picture, cmap="viridis", vmin=1, vmax=last, edgecolors="white", linewidth=0.8)
        _number(axis, order, first, last)
        axis.set_title(f"{row.decoding}: {len(order)} places, {int(np.nanmax(picture))} steps", fontsize=8)
        axis.grid(visible=False)
        axis.set(xticks=[], yticks=[], ylim=(height, 0), xlim=(0, ORDER_WIDTH))
        axis.spines[:].set_visible(False)
    figure.supxlabel(
        f"document {document}, read like a page; number and colour: the step that decided the place; "
        "underlined: the verifier overruled the draft",
        fontsize=8,
    )
    return figure


def _lines(order: Sequence[Sequence[int]]) -> int:
    positions = [position for position, _, _ in order]
    return ceil((max(positions) - min(positions) + 1) / ORDER_WIDTH)


def _number(axis: Any, order: Sequence[Sequence[int]], first: int, last: int) -> None:
    """The step in every place."""
    for position, step, mark in order:
        line, column = divmod(position - first, ORDER_WIDTH)
        color = "white" if step + 1 < 0.6 * last else "#222222"
        axis.text(column + 0.5, line + 0.52, str(step + 1), ha="center", va="center", fontsize=6, color=color)
        if mark == RESAMPLED:
            axis.plot([column + 0.2, column + 0.8], [line + 0.86] * 2, color=color, linewidth=1.3)


def with_order(rows: Sequence[Row]) -> tuple[str, list[tuple[Row, list[list[int]]]]] | None:
    """The first document of which most have the order, and up to four configurations: one per decoder, the front
    first.
    """
    chosen: dict[str, tuple[Row, dict[str, list[list[int]]]]] = {}
    for row in sorted(rows, key=lambda row: not row.on_front):
        orders = {d: order for d, order in row.orders if order and _lines(order) * ORDER_WIDTH <= LONGEST_ORDER}
        if orders and row.decoder not in chosen and len(chosen) < 4:
            chosen[row.decoder] = row, orders
    documents = sorted(document for _, orders in chosen.values() for document in orders)
    if not documents:
        return None
    document = max(documents, key=documents.count)
    return document, [(row, orders[document]) for row, orders in chosen.values() if document in orders]
