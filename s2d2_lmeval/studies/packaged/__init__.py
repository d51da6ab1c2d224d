"""Packaged studies: one YAML file each in this folder, named without ``.yaml``.

They evaluate only the embedded model, so they need no network, and only run code written by that model.
"""

from __future__ import annotations

import os
from pathlib import Path

from s2d2_lmeval.errors import StudyError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """All packaged studies."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find(study: str | Path) -> Path:
    """The file of a study: ``study`` itself or, if there is no such file, the packaged study of that name.

    Raises:
        StudyError: if there is neither, with the closest name.
    """
    from s2d2_lmeval.harness.arguments import nearest

    path, known = Path(study), names()
    if not os.path.isfile(path) and str(study) in known:
        return _FOLDER / f"{study}.yaml"
    if not os.path.exists(path):
        raise StudyError(
            f"{str(study)[:200]!r} cannot be read as a study: there is no such file, and no packaged study of that "
            f"name.{nearest(str(study)[:80], known)} Packaged: {', '.join(known)}."
        )
    return path


def is_packaged(path: Path) -> bool:
    """Whether a study file is one of these."""
    return path.parent == _FOLDER
