"""What happens when other libraries are imported: registration with lm_eval and with transformers.

``lm_eval --model s2d2`` works on lm_eval 0.4.10 to 0.4.13 too, which do not discover installed model classes.

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

And the command ``lm_eval`` indexes tasks before it imports torch: there the packaged ones need ``--include_path``.

``s2d2-lmeval eval …`` takes the same arguments as ``lm_eval …``, registers directly and works in both cases.
``S2D2_LMEVAL_NO_AUTOLOAD=1`` disables this module.

The auto classes of transformers know the families (:mod:`s2d2_lmeval.auto`) only where somebody says
``import s2d2_lmeval``: to other programs of the environment, ``trust_remote_code=True`` still means remote code.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

MODEL_NAME, MODEL_CLASS = "s2d2", "s2d2_lmeval.harness.model:S2D2LM"
FILTER_NAME, FILTER_CLASS = "s2d2_stats", "s2d2_lmeval.harness.filters:StatsFilter"

_PACKAGE = "s2d2_lmeval"
_TASKS = "lm_eval.tasks"
_AUTO_CLASSES = "transformers.models.auto.configuration_auto"

# Module -> what it must have filled before a name of ours is added: `get_model` imports `lm_eval.models` only while the
# registry is empty, so an early name would hide every built-in model.
_TARGETS = {
    "lm_eval.models": ("model_registry", MODEL_NAME, MODEL_CLASS),
    "lm_eval.filters": ("filter_registry", FILTER_NAME, FILTER_CLASS),
}


def register() -> None:
    """Name the model class and the filter in the harness's registries, unless the harness finds them by itself, and
    make its task index find the packaged tasks.
    """
    for module in (*_TARGETS, _TASKS):
        _register(module)


def install() -> None:
    """Register now if the harness is loaded, or as soon as it is; called by ``import torch``, idempotent, never
    raises.
    """
    if getattr(sys.modules.get(_PACKAGE), "imported_by_torch", False):
        # So that ``import s2d2_lmeval`` is a first import, which says that the package is wanted.
        del sys.modules[_PACKAGE]
    _register_when_imported((*_TARGETS, _TASKS))


def install_auto_classes() -> None:
    """Likewise for the auto classes of transformers; called by ``import s2d2_lmeval``."""
    _register_when_imported((_AUTO_CLASSES,))


def _register_when_imported(modules: Iterable[str]) -> None:
    if os.environ.get("S2D2_LMEVAL_NO_AUTOLOAD", "0").lower() not in ("", "0", "false", "no"):
        return
    waiting = {module for module in modules if module not in sys.modules}
    for module in modules:
        if module not in waiting:
            _never_raising(module)
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _PostImportFinder)), None)
    if finder is not None:
        finder.waiting |= waiting
    elif waiting:
        sys.meta_path.insert(0, _PostImportFinder(waiting))


def _register(module: str) -> None:
    if module == _AUTO_CLASSES:
        _register_at_first_use(sys.modules[module].AutoConfig)
        return
    if module == _TASKS:
        _add_packaged_tasks(import_module(_TASKS).TaskManager)
        return
    from lm_eval.api import registry

    registry_name, name, target = _TARGETS[module]
    if not hasattr(registry, "load_plugins") and name not in (known := getattr(registry, registry_name)):
        # A string, not an EntryPoint: these releases can replace only a string by the class when its decorator runs.
        known.register(name, target=target)


def _register_at_first_use(auto: Any) -> None:
    """Every auto class begins with ``AutoConfig.from_pretrained``; its first call adds the families.

    Now would be too early: transformers may still be in the middle of its own imports.
    """
    plain = auto.__dict__["from_pretrained"]

    @wraps(plain.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        auto.from_pretrained = plain
        _never_raising(_AUTO_CLASSES, lambda _: import_module(f"{_PACKAGE}.auto").register())
        return plain.__get__(None, cls)(*args, **kwargs)

    auto.from_pretrained = classmethod(from_pretrained)


def _add_packaged_tasks(manager: Any) -> None:
    """Every index with the harness's own tasks has the packaged ones too; an ``include_path`` comes after them."""
    plain = manager.__init__
    if hasattr(plain, "__wrapped__"):
        return
    parameters = signature(plain)

    @wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = parameters.bind(self, *args, **kwargs)
        asked = given.arguments.get("include_path") or []
        folders = [asked] if isinstance(asked, (str, Path)) else list(asked)
        packaged = find_spec(f"{_PACKAGE}.task_configs")
        ours = [] if packaged is None else [str(place) for place in packaged.submodule_search_locations or ()]
        if given.arguments.get("include_defaults", True) and not {Path(one).resolve() for one in folders} & {
            Path(one).resolve() for one in ours
        }:
            given.arguments["include_path"] = ours + folders
        plain(*given.args, **given.kwargs)

    manager.__init__ = __init__


def _never_raising(module: str, register: Callable[[str], None] | None = None) -> None:
    try:
        (register or _register)(module)
    except Exception as error:
        with contextlib.suppress(Exception):
            warnings.warn(
                f"s2d2-lmeval could not register itself with {module.partition('.')[0]} ({error!r}); use "
                "`s2d2-lmeval eval` or `s2d2_lmeval.load` instead.",
                stacklevel=2,
            )


class _PostImportFinder:
    """A meta-path finder that lets the other finders find the awaited modules, and runs a callback afterwards."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        self.waiting.discard(fullname)  # before the search below, which comes through here again
        if not self.waiting:
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
