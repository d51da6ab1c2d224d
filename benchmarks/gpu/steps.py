"""The steps of ``make gpu`` in their order, and the process that runs one: ``python -m benchmarks.gpu.steps NAME``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

LIMITS = {
    "machine": 40,
    "equal": 70,
    "tests": 90,
    "speed-8b": 140,
    "speed-1.7b": 50,
    "profile": 40,
    "kernels": 35,
    "rounding": 45,
}
"""Step -> seconds."""


def tests(out: Path, rehearse: bool) -> None:
    """The tests for a GPU; when rehearsing they are only collected."""
    from benchmarks.gpu.setting import Setting

    setting = Setting("tests", out, rehearse)
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        setting.say(f"skipped: {' and '.join(missing)} not installed")
        return
    import pytest

    outcome = _Outcome()
    folders = [f"tests/{name}" for name in ("decoding", "families", "runtime")]
    few = ["--collect-only"] if rehearse else ["--maxfail", "8", "-o", "faulthandler_timeout=80"]
    code = pytest.main(
        ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", *few, *folders], plugins=[outcome]
    )
    setting.note(code=int(code), **outcome.counts, failures=outcome.failures)
    setting.say(", ".join(f"{count} {name}" for name, count in outcome.counts.items()))
    if code:
        sys.exit(f"pytest: {code}")


class _Outcome:
    """Counts the outcomes of tests."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.failures: dict[str, str] = {}

    def pytest_collection_finish(self, session: object) -> None:
        self.counts["collected"] = len(getattr(session, "items", ()))

    def pytest_runtest_logreport(self, report: object) -> None:
        outcome, when = getattr(report, "outcome", ""), getattr(report, "when", "")
        if when == "call" or outcome != "passed":
            self.counts[outcome] = self.counts.get(outcome, 0) + 1
        if outcome == "failed":
            self.failures[getattr(report, "nodeid", "")] = str(getattr(report, "longrepr", ""))[-800:]


def run(name: str, out: Path, rehearse: bool) -> int:
    """Run a step in this process; 1 if a part of it failed."""
    if name == "tests":
        tests(out, rehearse)
        return 0
    from benchmarks.gpu import equal, kernels, machine, speed
    from benchmarks.gpu.setting import Setting

    work: dict[str, Callable[[Setting], None]] = {
        "machine": machine.run,
        "equal": equal.run,
        "speed-8b": speed.of_8b,
        "speed-1.7b": speed.of_1_7b,
        "profile": speed.profiled,
        "kernels": kernels.run,
        "rounding": equal.rounding,
    }
    setting = Setting(name, out, rehearse)
    work[name](setting)
    setting.note(failed=setting.failed)
    return int(bool(setting.failed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=LIMITS)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    sys.exit(run(given.name, given.out, given.rehearse))
