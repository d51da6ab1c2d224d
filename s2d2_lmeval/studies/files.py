"""Reading of files that may be handwritten or damaged: the result is plain data or one error message."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from s2d2_lmeval.errors import StudyError, first_line, shown
from s2d2_lmeval.harness.upstream import redacted

MANIFEST = "study.json"
SEARCH = "search.db"
"""Optuna's record of a search."""

LARGEST_STUDY = 1 << 18
LARGEST_MANIFEST = 1 << 28
MOST_NODES = 100_000
LARGEST_NUMBER = 1 << 63
DEEPEST = 50

_UNREADABLE = (OSError, ValueError, RecursionError, OverflowError, MemoryError, yaml.YAMLError)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; duplicate keys and anything except plain data are refused.

    Raises:
        StudyError: if it cannot be read, with the reason.
    """
    try:
        loader = yaml.SafeLoader(_text(path, LARGEST_STUDY))
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, set())
        content = loader.construct_document(node)
        refuse_exotic(content)
    except _UNREADABLE as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]
        raise StudyError(f"{path} cannot be read as a study: {reason}") from None
    return content


def _text(path: Path, most: int) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
    if path.stat().st_size > most:
        raise ValueError(f"it has more than {most} bytes")
    return path.read_text(encoding="utf-8")


def _size(node: Any, known: dict[int, int], above: set[int]) -> int:
    """The number of nodes, with aliases counted at each occurrence."""
    if id(node) in above:
        raise ValueError("it contains itself")
    if id(node) in known:
        return known[id(node)]
    above.add(id(node))
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
        children = [one for pair in node.value for one in pair]
    size = 1 + sum(_size(child, known, above) for child in children)
    if size > MOST_NODES:
        raise ValueError(f"it comes to more than {MOST_NODES} values")
    above.discard(id(node))
    known[id(node)] = size
    return size


def _refuse_twice(node: yaml.MappingNode) -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in seen and key.tag != "tag:yaml.org,2002:merge":
            raise ValueError(
                f"{shown(key.value)} is there twice (line {key.start_mark.line + 1}), and only one would count"
            )
        seen.add(name)


def refuse_exotic(content: Any) -> None:
    """Refuse everything except text, numbers of a usual size, booleans, lists and mappings.

    Raises:
        ValueError: with the offending value.
    """
    left = [(content, 0)]
    while left:
        value, depth = left.pop()
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        if isinstance(value, Mapping):
            left += [(one, depth + 1) for one in (*value.keys(), *value.values())]
        elif isinstance(value, (list, tuple)):
            left += [(one, depth + 1) for one in value]
        elif isinstance(value, str):
            if any((ord(letter) < 32 and letter not in "\n\r\t") or 0xD800 <= ord(letter) < 0xE000 for letter in value):
                raise ValueError(f"{shown(repr(value))} contains characters that are none")
        elif isinstance(value, int):
            if abs(value) >= LARGEST_NUMBER:
                raise ValueError("it holds a number of more than 18 digits")
        elif value is not None and not isinstance(value, float):
            raise ValueError(f"{shown(str(value))} is read as a {type(value).__name__}; put it in quotes")


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _AboutPoint(_Checked):
    model: str
    task: str
    decoding: str
    options: dict[str, Any]
    seed: int
    repeat: int = 0


class _Manifest(_Checked):
    code: str
    models: dict[str, Any]
    points: dict[Annotated[str, Field(pattern="^[0-9a-f]{16}$")], _AboutPoint]
    name: str = ""
    baselines: dict[str, str | None] = {}
    metrics: dict[str, str | None] = {}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of a results folder's ``study.json``; None without one.

    Raises:
        StudyError: if it cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(_text(path, LARGEST_MANIFEST))
        refuse_exotic(manifest)
        _Manifest.model_validate(manifest)
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(
            f"{path} cannot be read ({first_line(error)}). Move it away and run the sweep again: the results under "
            f"{folder / 'points'} are found by their names."
        ) from None
    return dict(redacted(manifest))
