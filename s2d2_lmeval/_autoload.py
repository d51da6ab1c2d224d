"""Makes ``lm_eval --model s2d2`` work on lm_eval 0.4.10 to 0.4.13, which do not discover installed model classes.

Later releases of the harness read the ``lm_eval.models`` and ``lm_eval.filters`` entry points of ``setup.cfg``; there
this module does nothing. On the releases before, the one hook that every run passes is ``import torch``, which calls
each entry point of the group ``torch.backends`` when it has finished. :func:`install` is such an entry point. It puts
a finder on ``sys.meta_path`` that waits for ``lm_eval.models`` and ``lm_eval.filters`` to be imported and then adds
two names to the harness's registries. It imports neither torch nor lm_eval, and it never raises: an exception here
would break ``import torch``.

It does not run under:

* ``lm_eval --seed None``, or any seed list without a torch seed: the harness then looks the model up before torch is
  imported.
* ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, by which torch skips every such entry point.

``s2d2-lmeval eval …`` takes the same arguments as ``lm_eval …``, registers directly and works in both cases.
``S2D2_LMEVAL_NO_AUTOLOAD=1`` disables this module.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

MODEL_NAME, MODEL_CLASS = "s2d2", "s2d2_lmeval.harness.model:S2D2LM"
FILTER_NAME, FILTER_CLASS = "s2d2_stats", "s2d2_lmeval.harness.filters:StatsFilter"


# Module -> what it must have filled before a name of ours is added: `get_model` imports `lm_eval.models` only while the
# registry is empty, so an early name would hide every built-in model.
_TARGETS = {
    "lm_eval.models": ("model_registry", MODEL_NAME, MODEL_CLASS),
    "lm_eval.filters": ("filter_registry", FILTER_NAME, FILTER_CLASS),
}


def register() -> None:
    """Name the model class and the filter in the harness's registries, unless the harness finds them by itself."""
    for module in _TARGETS:
        _register(module)


def install() -> None:
    """Register now if the harness is loaded, or as soon as it is; called by ``import torch``, idempotent, never
    raises.
    """
    if os.environ.get("S2D2_LMEVAL_NO_AUTOLOAD", "0").lower() not in ("", "0", "false", "no"):
        return
    waiting = set()
    for module in _TARGETS:
        if module in sys.modules:
            _never_raising(module)
        else:
            waiting.add(module)
    if waiting and not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder(waiting))


def _register(module: str) -> None:
    from lm_eval.api import registry

    registry_name, name, target = _TARGETS[module]
    if not hasattr(registry, "load_plugins") and name not in (known := getattr(registry, registry_name)):
        # A string, not an EntryPoint: these releases can replace only a string by the class when its decorator runs.
        known.register(name, target=target)


def _never_raising(module: str) -> None:
    try:
        _register(module)
    except Exception as error:
        with contextlib.suppress(Exception):
            warnings.warn(
                f"s2d2-lmeval could not register itself with lm_eval ({error!r}); run `s2d2-lmeval eval` instead.",
                stacklevel=2,
            )


class _PostImportFinder:
    """A meta-path finder that lets the other finders find the awaited modules, and runs a callback afterwards."""

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        self._waiting.discard(fullname)  # before the search below, which comes through here again
        if not self._waiting:
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
            if spec is not None and spec.loader is not None:
                _register_after(spec.loader, fullname)
        except Exception:
            return None  # the import goes on without us, and fails by itself if it must
        return spec


def _register_after(loader: Any, name: str) -> None:
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        execute(module)
        _never_raising(name)

    loader.exec_module = exec_module
