"""``study.json``: what a folder of results is of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness.secrets import redacted
from s2d2_lmeval.studies.reading import read_json, refuse_exotic, shown

MANIFEST = "study.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder of results is of; None for a folder without.

    :raises StudyError: when it cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
        _check_manifest(manifest)
    except ValueError as error:
        raise StudyError(
            f"{path} cannot be read ({shown(str(error), 200)}). Move it away and run the sweep again: the results "
            f"under {folder / 'points'} are found by their names."
        ) from None
    return dict(redacted(manifest))


_OF_A_POINT = {"model": str, "task": str, "decoding": str, "options": dict, "seed": int}


def _check_manifest(manifest: Any) -> None:
    kinds = {"code": str, "models": dict, "points": dict}
    if not isinstance(manifest, dict) or any(not isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise ValueError("keys are missing")
    refuse_exotic(manifest)
    for digest, about in manifest["points"].items():
        if not re.fullmatch("[0-9a-f]{16}", digest) or not isinstance(about, dict):
            raise ValueError("the list of points is damaged")
        if any(not isinstance(about.get(key), kind) for key, kind in _OF_A_POINT.items()):
            raise ValueError("a point is described in part")
    for key, kind in {"name": str, "baselines": dict, "metrics": dict}.items():
        if not isinstance(manifest.get(key, kind()), kind):
            raise ValueError(f"{key} is damaged")
    for value in (*manifest.get("baselines", {}).values(), *manifest.get("metrics", {}).values()):
        if not isinstance(value, (str, type(None))):
            raise ValueError("baselines or metrics are damaged")
