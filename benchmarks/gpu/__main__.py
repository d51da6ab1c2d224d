"""Runs the steps one after the other, each in a process of its own, and prints a table last."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import LIMITS

ROOT = Path(__file__).resolve().parents[2]

SHORTEST = 15
"""Seconds below which a step is not worth starting."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of results (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything (default: %(default)s)")
    parser.add_argument("--steps", default=",".join(LIMITS), help="which, in which order (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in tiny shapes")
    args = parser.parse_args(arguments)
    unknown = set(args.steps.split(",")) - LIMITS.keys()
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}.")
    args.out.mkdir(parents=True, exist_ok=True)
    ends, rows = time.monotonic() + 60 * args.minutes, []
    for name in args.steps.split(","):
        limit = min(LIMITS[name], ends - time.monotonic())
        row = _run(name, limit, args) if limit >= SHORTEST else {"step": name, "state": "no time left", "seconds": 0}
        rows.append(row)
        (args.out / "steps.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"{row['step']}: {row['state']} after {row['seconds']:.0f} s", flush=True)
    print(_table(rows, args.out))
    return int(any(row["state"] != "done" for row in rows))


def _run(name: str, limit: float, args: argparse.Namespace) -> dict[str, Any]:
    """A step in a process of its own, and everything that it started."""
    command = [sys.executable, "-m", "benchmarks.gpu.steps", name, "--out", str(args.out.resolve())]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    environment = {**os.environ, **offline, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    (args.out / f"{name}.json").unlink(missing_ok=True)
    started = time.monotonic()
    with (args.out / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, *(["--rehearse"] if args.rehearse else [])],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
            state = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            state = f"cut off at {limit:.0f} s"
    return {"step": name, "state": state, "seconds": time.monotonic() - started}


def _table(rows: Sequence[dict[str, Any]], out: Path) -> str:
    """A line per step, then all measured speeds."""
    lines = [f"{'step':<12}{'state':<18}{'s':>5}  found"]
    speeds = []
    for row in rows:
        found = _found(out / f"{row['step']}.json")
        said = found.get("summary") or _last_line(out / f"{row['step']}.log")
        lines.append(f"{row['step']:<12}{row['state']:<18}{row['seconds']:>5.0f}  {said}")
        lines += [f"{'':<37}failed: {name}" for name in found.get("failed", ())]
        if row["step"].startswith("speed"):
            speeds += [(row["step"].removeprefix("speed-"), found["floor_milliseconds"], one) for one in found["rows"]]
    if speeds:
        lines += ["", f"{'shape':<7}{'decoder':<40}{'batch':>5}{'tokens/s':>10}{'ms/forward':>12}{'over floor':>12}"]
        lines[-1] += f"{'ms outside':>12}"
    lines += [_speed(*one) for one in speeds]
    return "\n".join(["", *lines, "", f"Results are in {out}."])


def _speed(shape: str, floor: float, one: dict[str, Any]) -> str:
    start = f"{shape:<7}{one['name']:<40}{one['batch']:>5}{one['tokens_per_second']:>10.1f}"
    if one.get("milliseconds") is None:
        return start
    outside = one["milliseconds"] * one["outside"] / max(1 - one["outside"], 1e-9)
    return f"{start}{one['milliseconds']:>12.2f}{one['milliseconds'] / floor:>12.2f}{outside:>12.2f}"


def _found(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"rows": [], "floor_milliseconds": 1.0}
    return {"rows": [], "floor_milliseconds": 1.0, **found}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()] or [""]
    return lines[-1][:120]


if __name__ == "__main__":
    sys.exit(main())
