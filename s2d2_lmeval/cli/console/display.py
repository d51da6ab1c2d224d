"""Progress display of `sweep`: a live table on a terminal, elsewhere one line per point."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from s2d2_lmeval.cli.console import columns_that_fit, table
from s2d2_lmeval.studies.sweep import Progress, Sweep

ROWS_SHOWN = 20


class Display:
    """Watches ``sweep``."""

    def __init__(self, console: Console, sweep: Sweep) -> None:
        self.console, self.sweep = console, sweep
        sweep.watcher = self.changed
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def changed(self, progress: Progress) -> None:
        """Update the display: a point has progressed or ended."""
        if self._live is not None:
            self._live.update(self._table())
        elif progress.has_ended:
            points = self.sweep.points.values()
            left = self.sweep.seconds_left
            self.console.print(
                f"{sum(one.has_ended for one in points)}/{len(points)} {progress.state}: {progress.job.label}: "
                f"{progress.done} samples, {progress.tokens_per_second:.1f} tokens/s, "
                f"{progress.tokens_per_forward:.2f} tokens/forward" + (f"; {duration(left)} left" if left else ""),
                markup=False,
                soft_wrap=True,
            )

    def _table(self) -> Group:
        points = list(self.sweep.points.values())
        shown = window(points)
        lines: list[list[str | Text]] = [
            [
                Text(*_STATES[one.state]),
                *(one.job.decoding, one.job.task.task, f"{one.done}/{one.job.samples}"),
                "" if one.accuracy is None else f"{100 * one.accuracy:.1f}",
                f"{one.tokens_per_forward:.2f}" if one.nfe else "",
                f"{one.tokens_per_second:.1f}" if one.seconds else "",
                *(one.job.model, str(one.job.seed)),
            ]
            for one in shown
        ]
        header = ["", "decoding", "task", "samples", "accuracy", "tokens/forward", "tokens/s", "model", "seed"]
        # What does not fit is left out: a swept value that is cut says nothing.
        fits = columns_that_fit(header, [[str(cell) for cell in line] for line in lines], self.console.width)
        header, lines = header[:fits], [line[:fits] for line in lines]
        left = self.sweep.seconds_left
        done, samples = sum(one.done for one in points), sum(one.job.samples for one in points)
        line = f"{sum(one.has_ended for one in points)} of {len(points)} points, {done} of {samples} samples"
        if left is not None and done < samples:
            line += f", {duration(left)} left"
        if len(shown) < len(points):
            line += f"; {len(points) - len(shown)} points not shown"
        return Group(table(header, lines, texts=(0, 1, 2, 7), title=self.sweep.plan.study.name), Text(line))


_STATES = {"waiting": ("·", "dim"), "running": ("▶", "cyan"), "complete": ("✓", "green"), "failed": ("✗", "red")}


def window(points: list[Progress]) -> list[Progress]:
    """The points that fit on the screen, with the running one in the middle."""
    if len(points) <= ROWS_SHOWN:
        return points
    active = [place for place, one in enumerate(points) if one.state == "running"]
    ended = [place for place, one in enumerate(points) if one.has_ended]
    middle = active[0] if active else ended[-1] if ended else 0
    first = min(max(0, middle - ROWS_SHOWN // 2), len(points) - ROWS_SHOWN)
    return points[first : first + ROWS_SHOWN]


def duration(seconds: float) -> str:
    """A readable duration, in its two largest units."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute} min"
    return f"{minute} min {second} s" if minute else f"{second} s"
