"""The files of a checkpoint: found in a folder or on the hub, and checked before anything large is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from s2d2_lmeval.errors import CheckpointError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What cached_file takes of the keyword arguments of from_pretrained.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def resolve(source: str | Path) -> str:
    """A path that exists or a hub id; ``"toy"`` is the embedded checkpoint."""
    if str(source) == "toy":
        from s2d2_lmeval.toy import checkpoint_path

        return str(checkpoint_path())
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise CheckpointError(f"{source} is a file; a checkpoint is a folder with config.json and *.safetensors.")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise CheckpointError(f"there is no folder {source}.")
    return source


def read_config(source: str | Path, revision: str | None = None, **hub: Any) -> dict[str, Any]:
    """config.json of a folder or hub id, as it is written.

    Raises:
        CheckpointError: no such folder or hub id, no config.json in it, or not a JSON object.
    """
    source = resolve(source)
    found = read_json(source, "config.json", revision=revision, **hub)
    if found is not None:
        return found
    if Path(source).is_dir():
        raise CheckpointError(f"{source} holds no config.json.{_base_of_adapter(source)}")
    raise CheckpointError(
        f"{source} is neither a folder nor a model with a config.json on the hub (or, offline, in its cache)."
    )


def _base_of_adapter(source: str) -> str:
    """What to load in place of a folder that holds an adapter; nothing if it holds none."""
    config = read_json(source, "adapter_config.json")
    if config is None:
        return ""
    base = config.get("base_model_name_or_path") or "its base model"
    return f" It holds a LoRA adapter: load {base}, and give this folder as adapter=… (in --model_args: peft=…)."


def read_json(source: str, name: str, **hub: Any) -> dict[str, Any] | None:
    """A JSON object out of a checkpoint, or None where it has no file of that name."""
    path = _find(source, name, hub)
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again.")
    return found


def weight_files(source: str, variant: str | None = None, **hub: Any) -> list[Path]:
    """The safetensors files of a checkpoint, downloaded and complete.

    Raises:
        CheckpointError: no safetensors files, an index that names a missing shard, or a truncated file.
    """
    part = f".{variant}" if variant else ""
    single = _find(source, f"model{part}.safetensors", hub)
    index = None if single else _find(source, f"model.safetensors.index{part}.json", hub)
    if single is not None:
        files = [single]
    elif index is not None:
        files = _shards(source, index, hub)
    else:
        raise CheckpointError(_without_safetensors(source, str(hub.get("subfolder") or "")))
    for file in files:
        _check_complete(file)
    return files


def adapter_file(source: str, **hub: Any) -> Path:
    """The safetensors file of an adapter, downloaded and complete.

    Raises:
        CheckpointError: no such file, or a truncated one.
    """
    found = _find(source, "adapter_model.safetensors", hub)
    if found is None:
        raise CheckpointError(
            f"{source} holds no adapter_model.safetensors. Pickled weights can run code when they are read and are not "
            "loaded here: convert adapter_model.bin with safetensors.torch.save_file."
        )
    _check_complete(found)
    return found


def _find(source: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    folder = Path(source) / str(hub.get("subfolder") or "")
    if Path(source).is_dir():
        return folder / name if (folder / name).is_file() else None
    options = {key: value for key, value in hub.items() if key in HUB_OPTIONS and value is not None}
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
    except OSError as error:
        raise CheckpointError(
            f"{source} is neither a folder nor a model on the hub that can be read: {_first_line(error)}"
        ) from None
    return Path(found) if found else None


def _shards(source: str, index: Path, hub: Mapping[str, Any]) -> list[Path]:
    found = read_json(str(index.parent), index.name)
    weight_map = (found or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; fetch it again.")
    names = sorted(set(weight_map.values()))
    if not Path(source).is_dir():
        options = {key: value for key, value in hub.items() if key in HUB_OPTIONS and value is not None}
        try:
            files, _ = get_checkpoint_shard_files(source, str(index), **options)
        except OSError as error:
            raise CheckpointError(f"{source} lacks a file that {index.name} names: {_first_line(error)}") from None
        return [Path(file) for file in files]
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(missing)} file(s) that are not there, such as {missing[0]}; fetch them."
        )
    return [index.parent / name for name in names]


def _without_safetensors(source: str, subfolder: str) -> str:
    folder = Path(source) / subfolder
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))] if folder.is_dir() else []
    if pickles:
        return (
            f"{folder} holds {pickles[0]} but no safetensors file. Pickled weights can run code when they are read and "
            "are not loaded here: convert them with safetensors.torch.save_file."
        )
    return f"{source} holds no model.safetensors and no model.safetensors.index.json."


def _check_complete(file: Path) -> None:
    """Compares the size of a safetensors file to the one its header promises."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file} is truncated or not a safetensors file ({size} bytes); fetch it again.")
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{file} is not a safetensors file: its header cannot be read.") from None
    if size != 8 + length + end:
        raise CheckpointError(f"{file} is truncated: {size} bytes of {8 + length + end}; fetch it again.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
