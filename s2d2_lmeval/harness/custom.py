"""``custom_generate=…`` and ``custom_model_class=…``: a user's own decoding function or model class.

A decoding function follows the published convention: ``fn(model, input_ids, max_gen_toks=…, **options)`` takes ids (1,
P) and returns the ids (1, P + new) of the prompt and the answer, alone or in a pair with statistics (``nfe`` or
``total_forward_steps``, and ``decoding_order``). It is called once per request, with the transformers model.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.decoding.options.names import nearest
from s2d2_lmeval.errors import ConfigError, RequestError, shown

BUDGET_NAMES = ("max_new_tokens", *(name for name, target in SYNONYMS.items() if target == "max_new_tokens"))
"""Names of the budget of new tokens."""
_PASSED_BY_US = frozenset(("model", "input_ids", "inputs", "attention_mask", "max_gen_toks", "tokenizer"))
_STATISTICS_SWITCHES = ("return_stats", "return_forward_stats", "return_decoding_order", "record_decoding_order")
_STOP_IDS = ("stopping_criteria_idx", "stop_token_ids")
_HARMLESS = ("do_sample", "temperature")
"""Options that nearly every task sets; a function without these parameters does not get them."""


@dataclass(frozen=True)
class CustomFunction:
    """A decoding function and what it accepts.

    ``option_names`` are its parameters, and every decoding option as well if it has ``**options``.
    """

    function: Callable[..., Any]
    name: str
    parameters: frozenset[str]
    option_names: frozenset[str]
    any_name: bool

    @classmethod
    def load(cls, spec: str | Callable[..., Any]) -> CustomFunction:
        """The function that ``spec`` names: ``path/to/file.py:function``, ``module:function``, or the function itself.

        Raises:
            ConfigError: if there is no such function, or it has no parameter for the number of new tokens.
        """
        function = spec if callable(spec) else load_object(spec)
        name = spec if isinstance(spec, str) else f"{function.__module__}:{function.__qualname__}"
        if not callable(function) or inspect.isclass(function):
            raise ConfigError(f"custom_generate={name} is not a function.")
        kinds = inspect.signature(function).parameters
        parameters = frozenset(
            key for key, value in kinds.items() if value.kind in (value.POSITIONAL_OR_KEYWORD, value.KEYWORD_ONLY)
        )
        any_name = any(value.kind is value.VAR_KEYWORD for value in kinds.values())
        if not any_name and not parameters & set(BUDGET_NAMES):
            raise ConfigError(
                f"custom_generate={name} takes no max_gen_toks, the number of new tokens; add that parameter."
            )
        first = next(iter(kinds), None)
        options = (parameters - _PASSED_BY_US - {first}) | (DecodingConfig.option_names() if any_name else frozenset())
        return cls(function, name, parameters, frozenset(options) | {"max_gen_toks"}, any_name)

    def accepts(self, name: str) -> bool:
        """Whether the function can be given ``name``."""
        return self.any_name or name in self.parameters

    def options(self, given: Mapping[str, Any], stop_token_ids: Sequence[int], tokenizer: Any) -> dict[str, Any]:
        """The function's keyword arguments: ``given`` and those of the run; ConfigError for an option that it does not
        take.
        """
        options = {name: value for name, value in given.items() if self.accepts(name) or name not in _HARMLESS}
        for name in options:
            if not self.accepts(name):
                raise ConfigError(f"{name} is not a parameter of {self.name}, which decodes in this run.")
        for name in _STATISTICS_SWITCHES:
            if name in self.parameters:
                options.setdefault(name, True)
        named = [name for name in _STOP_IDS if name in self.parameters]
        if named and not any(name in options for name in _STOP_IDS):
            options[named[0]] = list(stop_token_ids)
        if "tokenizer" in self.parameters:
            options.setdefault("tokenizer", tokenizer)
        return options

    def __call__(
        self, model: Any, prompt: Sequence[int], budget: int, options: Mapping[str, Any]
    ) -> tuple[list[int], dict[str, Any]]:
        """Run the function on one prompt.

        Returns:
            the new token ids (at most ``budget``) and the function's statistics, under our names.

        Raises:
            RequestError: if its answer does not follow the convention.
        """
        budget_name = next((name for name in BUDGET_NAMES if name in self.parameters), "max_gen_toks")
        device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else model.device
        input_ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)
        with torch.inference_mode():
            answer = self.function(model, input_ids, **{**options, budget_name: budget})
        if hasattr(answer, "output_ids"):
            answer = (answer.output_ids, getattr(answer, "stats", {}))
        ids, extras = (answer[0], answer[1:]) if isinstance(answer, tuple) else (answer, ())
        tokens = self._row(ids)
        if tokens[: len(prompt)] != list(prompt):
            raise RequestError(
                f"{self.name} did not return the prompt followed by the new tokens: "
                f"got {len(tokens)} ids for a prompt of {len(prompt)}."
            )
        return tokens[len(prompt) :][:budget], _statistics(extras)

    def _row(self, ids: Any) -> list[int]:
        rows = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        if isinstance(rows, (list, tuple)) and len(rows) == 1 and isinstance(rows[0], (list, tuple)):
            rows = rows[0]
        if not isinstance(rows, (list, tuple)) or not all(isinstance(token, int) for token in rows):
            raise RequestError(f"{self.name} returned {type(ids).__name__} in place of token ids (1, P + new).")
        return list(rows)


def _statistics(extras: Sequence[Any]) -> dict[str, Any]:
    """The numbers of a published function's statistics, with the count of forwards as ``nfe``."""
    merged: dict[str, Any] = {}
    for extra in extras:
        if isinstance(extra, Mapping):
            merged.update(extra)
        elif isinstance(extra, list):
            merged["decoding_order"] = extra
    if "nfe" not in merged and "total_forward_steps" in merged:
        merged["nfe"] = merged.pop("total_forward_steps")
    return merged


def load_object(spec: str) -> Any:
    """``path/to/file.py:name`` or ``module:name``. The file's folder becomes importable, for the modules next to it.

    Raises:
        ConfigError: if there is no such file, module or name, or importing it fails.
    """
    source, _, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    if not source or not name:
        raise ConfigError(f"{shown(spec)} does not say what to take: write path/to/file.py:name or module:name.")
    module = _module_of_file(Path(source).expanduser()) if source.endswith(".py") else _import(source, source)
    if not hasattr(module, name):
        raise ConfigError(
            f"{source} has no {name}.{nearest(name, [key for key in vars(module) if not key.startswith('_')])}"
        )
    return getattr(module, name)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{path} is not a file (looked in {Path.cwd()}).")
    path = path.resolve()
    packaged = importlib.util.find_spec("s2d2_lmeval.custom_generate")
    if packaged and path.parent in [Path(folder).resolve() for folder in packaged.submodule_search_locations or ()]:
        return _import(f"s2d2_lmeval.custom_generate.{path.stem}", str(path))
    content = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()
    name = f"_s2d2_custom_{path.stem}_{content[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{path} cannot be imported: {error!r}") from error
    return module


def _import(name: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            raise ConfigError(f"there is no module {source}; for a file, write its path with .py.") from None
        raise ConfigError(f"{source} cannot be imported: {error!r}") from error
    except Exception as error:
        raise ConfigError(f"{source} cannot be imported: {error!r}") from error
