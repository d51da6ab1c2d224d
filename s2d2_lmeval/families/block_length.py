"""The block length that a checkpoint was trained for: what it records, what its name says, and what is only assumed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

FIELDS = ("block_length", "block_size", "bd_size")
TRAINING_FILES = ("training_args.json", "training_config.json", "train_config.json", "trainer_config.json", "args.json")
"""What trainers write beside the weights (never the pickled training_args.bin)."""

# Variants are published as <name>-b<length>; fine-tunes carry the name on, in the middle or in a folder above.
_NAMED = re.compile(
    r"(?:^|[-_.])(?:b|bd|blk|block(?:[-_]?(?:size|length|len))?[-_=]?)(\d{1,3})(?=$|[-_.])", re.IGNORECASE
)
_PUBLISHED = (4, 8, 16, 32, 64, 128)
# The same field names the length of text chunks in trainers of autoregressive models.
_LONGEST_RECORDED = 256


def sources(
    config: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], source: str
) -> Iterator[tuple[str, Any]]:
    """Where a block length is written and what it is there, the most trustworthy first.

    Args:
        config: config.json.
        records: other files by name: generation_config.json and :data:`TRAINING_FILES`.
        source: folder or hub id.
    """
    own = first(config, FIELDS)
    if own is not None:
        yield "config.json", own
    for name, record in records.items():
        for value in _recorded(record):
            yield name, value
    names: list[Any] = [*_paths(source), config.get("_name_or_path")]
    for name in names:
        for part in reversed(Path(name).parts) if isinstance(name, str) else ():
            lengths = [int(digits) for digits in _NAMED.findall(part) if int(digits) in _PUBLISHED]
            if lengths:
                yield f"the name {part}", lengths[-1]
                return


def _paths(source: str) -> list[str]:
    path = Path(source)
    return [str(path.absolute()), str(path.resolve())] if path.exists() else [source]


def _recorded(record: Any, depth: int = 0) -> Iterator[int]:
    if not isinstance(record, Mapping) or depth > 3:
        return
    value = first(record, FIELDS)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LONGEST_RECORDED:
        yield value
    for inner in record.values():
        yield from _recorded(inner, depth + 1)


def first(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of ``names`` that the configuration has; None without any."""
    return next((config[name] for name in names if config.get(name) is not None), None)
