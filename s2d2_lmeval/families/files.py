"""The files of a checkpoint: found in a folder or on the hub, and checked before anything large is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from s2d2_lmeval.errors import CheckpointError, first_line, shown
from s2d2_lmeval.toy import embedded

ModelT = TypeVar("ModelT")

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"[\w.-]{1,200}")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Integers, truth values and complex numbers are not weights, but transformers casts them without a word.
_NO_WEIGHTS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64")
_LARGEST_TEXT = 64 << 20
_PICKLED = (
    "Pickled weights can run code when they are read and are not loaded here: convert them with "
    "safetensors.torch.save_file."
)
# What cached_file takes of the keyword arguments of from_pretrained.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def resolve(source: str | Path) -> str:
    """A path that exists or a hub id; ``"toy"`` is the embedded checkpoint."""
    source = embedded(source)
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{source!r} is not the path of a folder ({first_line(error)}).") from None
    if is_folder:
        return str(path)
    if exists:
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
    if revision not in (None, "main") and Path(source).is_dir():
        raise CheckpointError(f"{source} is a folder, which has no revision {shown(revision)}; leave revision out.")
    found = read_json(source, "config.json", revision=revision, **hub)
    if found is not None:
        return found
    if not Path(source).is_dir():
        raise CheckpointError(
            f"{source} is neither a folder nor a model with a config.json on the hub (or, offline, in its cache)."
        )
    adapter, hint = read_json(source, "adapter_config.json"), ""
    if adapter is not None:
        base = adapter.get("base_model_name_or_path") or "its base model"
        hint = f" It holds a LoRA adapter: load {base}, and give this folder as adapter=… (in --model_args: peft=…)."
    raise CheckpointError(f"{source} holds no config.json.{hint}")


def read_json(source: str, name: str, **hub: Any) -> dict[str, Any] | None:
    """A JSON object out of a checkpoint, or None where it has no file of that name."""
    path = find(source, name, hub)
    if path is None:
        return None
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again.")
    return found


def read_text(path: Path) -> str:
    """The text of a file, which is one: no device, no pipe, and no larger than what such files are.

    Raises:
        OSError: a file that cannot be read.
        ValueError: what is not a text file.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as stream:
        data = stream.read(_LARGEST_TEXT + 1)
    if len(data) > _LARGEST_TEXT:
        raise ValueError(f"it is larger than {_LARGEST_TEXT >> 20} MiB")
    return data.decode("utf-8")


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError: for everything that cannot be read, nesting and integers without end included; its message is for
            people.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def weight_files(source: str, variant: str | None = None, **hub: Any) -> list[Path]:
    """The safetensors files of a checkpoint, downloaded.

    Raises:
        CheckpointError: no safetensors files, or an index that names a missing shard.
    """
    part = f".{variant}" if variant else ""
    single = find(source, f"model{part}.safetensors", hub)
    if single is not None:
        return [single]
    index = find(source, f"model.safetensors.index{part}.json", hub)
    if index is not None:
        return _shards(source, index, hub)
    folder = Path(source) / str(hub.get("subfolder") or "")
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))] if folder.is_dir() else []
    if pickles:
        raise CheckpointError(f"{folder} holds {pickles[0]} but no safetensors file. {_PICKLED}")
    raise CheckpointError(f"{source} holds no model.safetensors and no model.safetensors.index.json.")


class Stored(NamedTuple):
    """What a safetensors header says of a weight."""

    dtype: str
    shape: tuple[int, ...]


def stored_weights(files: Iterable[Path], *, quantized: bool = False) -> dict[str, Stored]:
    """What the headers of safetensors files say that they hold, by name.

    Raises:
        CheckpointError: a truncated file, or weights that are not floating point numbers unless they are
            ``quantized``.
    """
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (not a mapping)
                here = {name: Stored(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file: its header cannot be read ({first_line(error)}); "
                "fetch it again."
            ) from None
        odd = next((name for name, weight in here.items() if weight.dtype in _NO_WEIGHTS and not quantized), None)
        if odd is not None:
            raise CheckpointError(
                f"{file} holds {odd} as {here[odd].dtype}, which is not a floating point type. Quantized weights need "
                "the quantization_config that they were made with in config.json."
            )
        found |= here
    return found


def adapter_file(source: str, **hub: Any) -> Path:
    """The safetensors file of an adapter, downloaded.

    Raises:
        CheckpointError: no such file.
    """
    found = find(source, "adapter_model.safetensors", hub)
    if found is None:
        raise CheckpointError(f"{source} holds no adapter_model.safetensors. {_PICKLED}")
    return found


def find(source: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """The file of that name of a folder or hub id, downloaded; None if there is none."""
    folder = Path(source) / str(hub.get("subfolder") or "")
    if Path(source).is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **_of_hub(hub))
    except OSError as error:
        raise CheckpointError(
            f"{source} is neither a folder nor a model on the hub that can be read: {first_line(error)}"
        ) from None
    return Path(found) if found else None


def _of_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in HUB_OPTIONS and value is not None}


def _shards(source: str, index: Path, hub: Mapping[str, Any]) -> list[Path]:
    found = read_json(str(index.parent), index.name)
    weight_map = (found or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; fetch it again.")
    strange = [name for name in weight_map.values() if not isinstance(name, str) or not _SHARD.fullmatch(name)]
    if strange:
        raise CheckpointError(
            f"{index} says weight_map={strange[0]!r} where the name of a file belongs; fetch it again."
        )
    names = sorted(set(weight_map.values()))
    if not Path(source).is_dir():
        try:
            files, _ = get_checkpoint_shard_files(source, str(index), **_of_hub(hub))
        except OSError as error:
            raise CheckpointError(f"{source} lacks a file that {index.name} names: {first_line(error)}") from None
        return [Path(file) for file in files]
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(missing)} file(s) that are not there, such as {missing[0]}; fetch them."
        )
    return [index.parent / name for name in names]


def skeleton(source: str, layers: int, stored: int, build: Callable[[], ModelT]) -> ModelT:
    """The model that a config.json describes, without memory for its weights; it is built after a look at their number.

    Raises:
        CheckpointError: more layers than stored weights, or no model at all.
    """
    if layers > stored:
        raise CheckpointError(f"{source}: config.json says {layers} layers, but there are {stored} weights.")
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:
        raise CheckpointError(f"{source}: config.json describes no model ({first_line(error)}).") from None


def misfit(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> str:
    """The first weight that has another shape than expected, and its shapes; empty where all fit."""
    for name in sorted(found.keys() | expected.keys()):
        has, needs = (list(shapes[name]) if name in shapes else "no such weight" for shapes in (found, expected))
        if has != needs:
            return f"{name} has {has}, needs {needs}"
    return ""
