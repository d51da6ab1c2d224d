"""Studies that come with the package: a YAML file each in this folder, called by its name without ``.yaml``.

They evaluate the embedded model only, so they need no network, and what they run was written by that model.
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
    """The file of a study: ``study`` itself, or the packaged one of that name where there is no such file.

    Raises:
        StudyError: for what is neither, with the nearest name.
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
