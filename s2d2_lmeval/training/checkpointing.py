"""Files of a training run: written whole or not at all, and read again by the run that goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from s2d2_lmeval.errors import TrainingError, first_line

STATE, LOG = "state.safetensors", "log.jsonl"
_ABOUT = "about"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in a sentence that ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise TrainingError(f"{path} cannot be written ({reason}); what was saved before is whole.") from None


def replaced(path: Path, content: bytes) -> None:
    """Write a file in one move: a reader finds all of it, or what was there before."""
    beside = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Keep what a run needs to go on from here."""
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    replaced(folder / STATE, save(held, metadata={_ABOUT: json.dumps(about)}))


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What was kept last; None if nothing was.

    Raises:
        TrainingError: a file that cannot be read.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            return tensors, json.loads(file.metadata()[_ABOUT])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} cannot be read ({first_line(error)}); remove it to begin anew.") from None


def read_log(folder: Path, up_to: int) -> list[dict[str, Any]]:
    """The records of the log up to a step; later ones are taken out of it."""
    path = folder / LOG
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= up_to]
    if kept != lines:
        replaced(path, "".join(kept).encode())
    return [json.loads(line) for line in kept]


def log(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a record to the log."""
    with writing(folder / LOG), (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
