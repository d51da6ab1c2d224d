"""Documents of the packaged benchmarks: from the hub, under the names that the harness's own tasks use, or from a local
folder (``--metadata s2d2_data_dir=…``, for machines without a connection).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from s2d2_lmeval.errors import ConfigError

Splits = Mapping[str, Sequence[str]]
"""Split -> file names that may hold it, relative to the data folder; the first that exists is read."""


def load_documents(hub: tuple[str, ...], splits: Splits, folder: Any = None) -> DatasetDict:
    """The splits of a benchmark.

    Args:
        hub: arguments of ``datasets.load_dataset``: repository, and configuration if it has several.
        folder: where the files of ``splits`` are (JSON lines, ``.gz`` or not); the hub if not given.

    Raises:
        ConfigError: a file that is missing, or not JSON lines.
    """
    if folder in (None, ""):
        dataset = load_dataset(*hub)
        return DatasetDict({split: dataset[split] for split in splits})
    return DatasetDict(
        {
            split: Dataset.from_list(_rows(_found(Path(str(folder)).expanduser(), names)))
            for split, names in splits.items()
        }
    )


def _found(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        f"s2d2_data_dir={folder} holds none of: {', '.join(names)}. Put one there, or leave the option out."
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number} is not an object")
                    rows.append(row)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON lines: {error}") from None
    if not rows:
        raise ConfigError(f"{path} is empty.")
    return rows
