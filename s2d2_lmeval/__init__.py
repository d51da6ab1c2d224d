"""Block-diffusion language models, decoded fast and measured honestly, as an lm-evaluation-harness plugin.

The package imports neither torch nor lm_eval before something of it is used: ``import torch`` itself imports it (see
:mod:`s2d2_lmeval._autoload`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "load": "s2d2_lmeval.model",
    "BlockDiffusionModel": "s2d2_lmeval.model",
    "DecodingConfig": "s2d2_lmeval.decoding.options.config",
    "Generation": "s2d2_lmeval.decoding.generation",
    "register_decoder": "s2d2_lmeval.registry",
}

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.generation import Generation
    from s2d2_lmeval.decoding.options.config import DecodingConfig
    from s2d2_lmeval.model import BlockDiffusionModel, load
    from s2d2_lmeval.registry import register_decoder

__all__ = ["BlockDiffusionModel", "DecodingConfig", "Generation", "load", "register_decoder"]

imported_by_torch = getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False)
"""Whether ``import torch``, not somebody who uses it, imported the package."""

if not imported_by_torch:
    import_module("s2d2_lmeval._autoload").install_auto_classes()


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
