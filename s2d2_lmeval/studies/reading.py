"""Files that people wrote or that were damaged, read so that whatever they hold is an answer or a sentence."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness.arguments import nearest

LARGEST_STUDY = 1 << 18
LARGEST_MANIFEST = 1 << 28
MOST_NODES = 100_000
LARGEST_NUMBER = 1 << 63
DEEPEST = 50

_UNREADABLE = (OSError, ValueError, RecursionError, OverflowError, MemoryError, yaml.YAMLError)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; a key that is given twice is refused, and so is anything but plain data.

    :raises StudyError: saying what cannot be read.
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
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shown(str(error), 300)
        raise StudyError(f"{path} cannot be read as a study: {reason}") from None
    return content


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    :raises ValueError: for anything that is none, however it is broken.
    """
    try:
        return json.loads(_text(path, LARGEST_MANIFEST))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except OSError as error:
        raise ValueError(str(error)) from None


def _text(path: Path, most: int) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
    if path.stat().st_size > most:
        raise ValueError(f"it has more than {most} bytes")
    return path.read_text(encoding="utf-8")


def _size(node: Any, known: dict[int, int], above: set[int]) -> int:
    """How many nodes there are, repeated ones (aliases) counted wherever they stand."""
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
    """Refuse everything but text, numbers of a usual size, true and false, lists and mappings.

    :raises ValueError: naming what is none of them.
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


def shown(value: Any, most: int = 80) -> str:
    """A value in a message, at most ``most`` characters of it."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


# What a key of a study may hold


def mapping(value: Any, where: str, hint: str) -> dict[str, Any]:
    """``value`` as a mapping of names; numbers are taken as names.

    :raises StudyError: for anything else.
    """
    if not isinstance(value, Mapping):
        raise StudyError(f"{where}: {shown(value)} should be a mapping. {hint}")
    for key in value:
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise StudyError(f"{where}: the name {shown(key)} should be in quotes.")
    named = {str(key): one for key, one in value.items()}
    if len(named) < len(value):
        raise StudyError(f"{where}: two names are the same.")
    return named


def known(given: Iterable[Any], names: Iterable[str], where: str) -> None:
    """Refuse keys that are none of ``names``.

    :raises StudyError: naming the nearest.
    """
    names = list(names)
    for key in given:
        if key not in names:
            raise StudyError(
                f"{shown(key)} is no key of {where}.{nearest(str(key)[:80], names)} Known: {', '.join(names)}."
            )


def whole(value: Any, where: str, least: int, most: int, what: str = "a whole number") -> int:
    """``value`` as a number from ``least`` to ``most``.

    :raises StudyError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise StudyError(f"{where}: {shown(value)} should be {what} from {least} to {most}.")
    return value


def text(value: Any, where: str, hint: str = "It should be text.") -> str:
    """``value`` as text that is not empty.

    :raises StudyError: for anything else.
    """
    if not isinstance(value, str) or not value:
        raise StudyError(f"{where}: {shown(value)} is not right. {hint}")
    return value


def name(value: Any, where: str) -> str:
    """``value`` as a name for people and files: a line of at most 200 characters.

    :raises StudyError: for anything else.
    """
    if not text(value, where).isprintable() or len(value) > 200:
        raise StudyError(f"{where}: {shown(value)} should be one line of at most 200 characters.")
    return str(value)
