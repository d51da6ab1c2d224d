"""Writes the task grids of ``task_configs/*/sweep``: a YAML per point.

``lm_eval --tasks s2d2_gsm8k_sweep`` runs a whole grid in one process. After a change here:
``python -m benchmarks.task_sweeps``; a test compares the files with what this would write.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BENCHMARKS = {
    **{name: name for name in ("gsm8k", "humaneval", "ifeval", "math500", "mbpp")},
    "humaneval_plus": "humaneval",
    "mbpp_plus": "mbpp",
}
"""Benchmark -> folder of its tasks."""

CONFIDENCE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
SPANS = (1, 2, 4, 8)
SCORES = (-1.0, 0.0, 1.0, 2.0)
HYSTERESIS = ((0.0, -1.0), (1.0, -5.0), (2.0, -2.0))

_SCORED = {"token_acceptance_estimator": "soft_entropy_negexp", "score_penalty_coef": 1.0}


@dataclass(frozen=True)
class GridPoint:
    """The name of a point after its task's, the axes that it belongs to, and its decoding options."""

    name: str
    axes: tuple[str, ...]
    options: Mapping[str, Any]


def grid() -> Iterator[GridPoint]:
    """Confidence thresholds for whatever decoder a run uses; routing policies for ``s2d2``."""
    for threshold in CONFIDENCE:
        yield GridPoint(f"confidence_{threshold:g}", ("confidence",), {"confidence_threshold": threshold})
    s2d2 = {"decoder": "s2d2"}
    for span in SPANS:
        options = {**s2d2, "do_verify_policy": "mask_span_length", "min_ssd_span_length": span}
        yield GridPoint(f"routing_span_{span}", ("routing", "routing_span"), options)
    for score in SCORES:
        policy = {"do_verify_policy": "score_threshold", "do_verify_score_threshold": score}
        scored = {"do_verify_score_type": "difference_static", **_SCORED}
        yield GridPoint(f"routing_score_{score:g}", ("routing", "routing_score"), {**s2d2, **policy, **scored})
    for on, off in HYSTERESIS:
        policy = {
            "do_verify_policy": "score_hysteresis",
            "hysteresis_threshold_on": on,
            "hysteresis_threshold_off": off,
        }
        scored = {"do_verify_score_type": "difference_dynamic", **_SCORED}
        name = f"routing_hysteresis_{on:g}_{off:g}"
        yield GridPoint(name, ("routing", "routing_hysteresis"), {**s2d2, **policy, **scored})


def files(configs: Path) -> dict[Path, str]:
    """Path and content of every point, for the tasks under ``configs``."""
    written = {}
    for benchmark in BENCHMARKS:
        base = f"s2d2_{benchmark}"
        folder = configs / BENCHMARKS[benchmark]
        task = read_task(folder / f"{base}.yaml")
        generation = {**read_task(folder / task["include"]), **task}["generation_kwargs"]
        for point in grid():
            task = {
                "include": f"../{base}.yaml",
                "task": f"{base}_{point.name}",
                "tag": [f"{base}_sweep", *(f"{base}_{axis}" for axis in point.axes)],
                # `include:` merges shallowly, so the base's arguments are repeated.
                "generation_kwargs": {**generation, **point.options},
            }
            text = yaml.safe_dump(task, sort_keys=False, default_flow_style=False)
            written[folder / "sweep" / f"{task['task']}.yaml"] = f"# written by benchmarks.task_sweeps\n{text}"
    return written


def read_task(path: Path) -> dict[str, Any]:
    """A task YAML, its ``!function`` tags as text."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return dict(yaml.load(path.read_text(encoding="utf-8"), Loader))


def main() -> int:
    """Write everything anew into the checkout that this file is part of."""
    configs = Path(__file__).resolve().parents[1] / "task_configs"
    wanted = files(configs)
    for folder in {path.parent for path in wanted}:
        folder.mkdir(exist_ok=True)
        for path in set(folder.glob("*.yaml")) - set(wanted):
            path.unlink()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    print(f"{len(wanted)} files under {configs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
