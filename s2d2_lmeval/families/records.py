"""What the small files of a checkpoint, and its name, say about blocks and the mask token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from s2d2_lmeval.families.config_map import is_whole

TRAINING_FILES = ("training_args.json", "training_config.json", "train_config.json", "trainer_config.json", "args.json")
"""Files that trainers write next to the weights (never the pickled training_args.bin)."""
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files of a tokenizer that may name the mask token."""
MASK_FIELDS = ("mask_token_id", "mask_id")
BLOCK_FIELDS = ("block_length", "block_size", "bd_size")

# Variants are published as <name>-b<length>; fine-tunes carry the name on, in the middle or in a folder above.
_NAMED = re.compile(
    r"(?:^|[-_.])(?:b|bd|blk|block(?:[-_]?(?:size|length|len))?[-_=]?)(\d{1,3})(?=$|[-_.])", re.IGNORECASE
)
_PUBLISHED = (4, 8, 16, 32, 64, 128)
# The same field names the length of text chunks in trainers of autoregressive models.
_LONGEST_RECORDED = 256


def names_block_length(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names the block length."""
    return first(config, BLOCK_FIELDS) is not None


def names_mask(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names the mask token."""
    return first(config, MASK_FIELDS) is not None


def names_blocks(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names a mask token or a block length, which an autoregressive model does not have."""
    return names_mask(config) or names_block_length(config)


def names_of(config: Mapping[str, Any], source: str) -> list[str]:
    """What a checkpoint is called: its path as given and with links resolved, or its hub id; and ``_name_or_path``."""
    path = Path(source)
    own = [str(path.absolute()), str(path.resolve())] if path.exists() else [source]
    called = config.get("_name_or_path")
    return [*own, called] if isinstance(called, str) else own


def block_lengths(
    config: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], source: str
) -> Iterator[tuple[str, Any]]:
    """Where a block length is written and what it is there, the most trustworthy first: in config.json, in other files
    (``records``), in the name of the folder or hub id ``source``.
    """
    own = first(config, BLOCK_FIELDS)
    if own is not None:
        yield "config.json", own
    for name, record in records.items():
        if name not in TOKENIZER_FILES:
            for value in _recorded(record):
                yield name, value
    for named in names_of(config, source):
        for part in reversed(Path(named).parts):
            lengths = [int(digits) for digits in _NAMED.findall(part) if int(digits) in _PUBLISHED]
            if lengths:
                yield f"the name {part}", lengths[-1]
                return


def mask_of_tokenizer(records: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The id of the tokenizer's mask token, if its files say one."""
    files = [records[name] for name in TOKENIZER_FILES if name in records]
    texts = [_text(file.get("mask_token")) for file in files]
    for file in files:
        added = file.get("added_tokens_decoder")
        for number, token in added.items() if isinstance(added, Mapping) else ():
            if _text(token) in [text for text in texts if text] and str(number).isdecimal():
                return int(number)
    return None


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _recorded(record: Any, depth: int = 0) -> Iterator[int]:
    if not isinstance(record, Mapping) or depth > 3:
        return
    value = first(record, BLOCK_FIELDS)
    if is_whole(value, 1, _LONGEST_RECORDED):
        yield value
    for inner in record.values():
        yield from _recorded(inner, depth + 1)


def first(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of ``names`` that the configuration has; None without any."""
    return next((config[name] for name in names if config.get(name) is not None), None)
