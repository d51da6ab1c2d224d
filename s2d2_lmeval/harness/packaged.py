"""Where the packaged tasks are, and how they reach the harness."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from s2d2_lmeval.errors import S2D2Error


def include_path() -> Path:
    """Folder of the packaged task YAML files.

    :raises S2D2Error: when the package is imported from a checkout that is not installed.
    """
    spec = find_spec("s2d2_lmeval.task_configs")
    if spec is None or not spec.submodule_search_locations:
        raise S2D2Error(
            "The packaged tasks are not installed (s2d2_lmeval.task_configs). In a checkout, run: pip install -e ."
        )
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def register() -> None:
    """Make model ``s2d2`` and its filter known to the harness in this process, whatever its release and the
    environment.
    """
    # Both must have been imported before anything is registered: see _autoload.
    import lm_eval.filters
    import lm_eval.models  # noqa: F401

    from s2d2_lmeval._autoload import register_filter, register_model

    register_model()
    register_filter()
