"""Digests of everything that an answer depends on: code, weights, files, tokenizers.

A study identifies its checkpoints before it loads them, by their files (:func:`of_source`). The response cache
belongs to a loaded model, which is identified by its weights (:func:`of_weights`), wherever they came from.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from s2d2_lmeval.toy import embedded

ANSWERS = 3
"""Raised with every change after which the same request gets another answer or score (not for comments, speed or
messages). A test compares the answers of each number with recorded ones."""

HUB_ONLY = ("cache_dir", "force_download", "local_files_only", "token")
"""Model arguments on how files are fetched, not which."""

_READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".vocab", ".bpe", ".spm")
_FILES = ("draft_graph",)
_CHUNK = 1 << 22


def code_version() -> str:
    """The number of :data:`ANSWERS`, for people and files."""
    return f"answers-{ANSWERS}"


def of_plain(*values: Any) -> str:
    """A digest of plain data; equal data have equal digests, in every process."""
    as_read = json.loads(json.dumps(values, default=_plain))  # numbers as keys become text before they are sorted
    text = json.dumps(as_read, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path) or type(value).__module__ in ("datetime", "torch", "decimal"):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)  # no addresses: they differ between processes


def of_source(name: str, arguments: Mapping[str, Any]) -> str:
    """The folder or hub repository that the model argument ``name`` names: a digest of its files, or the commit.

    Where the hub cannot be reached and nothing is cached it is the name and revision as given.
    Of the model's ``arguments``, ``revision`` and how to reach the hub are read too.
    """
    source = embedded(arguments[name], drafter=name == "draft")
    place = os.path.expanduser(str(source))
    if os.path.exists(place):  # of any text; a pathlib.Path raises for one that is too long
        return f"sha256:{of_path(Path(place))}"
    from huggingface_hub import snapshot_download

    revision = arguments.get("revision") if name in ("pretrained", "tokenizer") else None
    hub = {key: arguments[key] for key in HUB_ONLY if key in arguments}
    try:
        found = snapshot_download(str(source), revision=revision, allow_patterns=["config.json"], **hub)
    except Exception:  # offline, gated, or no such repository: loading it will say which
        return f"{source}@{revision or 'main'}"
    return f"{source}@{Path(found).name}"


def with_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """Decoding options, with every named file replaced by a digest of its content."""
    named = {name: os.path.expanduser(str(options[name])) for name in _FILES if name in options}
    return {**options, **{name: f"sha256:{of_file(Path(at))}" for name, at in named.items() if os.path.isfile(at)}}


def of_path(path: Path) -> str:
    """A digest of a file, or of the files of a folder that loading it may read."""
    if not path.is_dir():
        return of_file(path) if path.is_file() else of_plain(path)
    files = sorted([*path.iterdir(), *(path / "additional_chat_templates").glob("*"), *(path / "adapter").glob("*")])
    read = [file for file in files if file.suffix in _READ and file.is_file()]
    return of_plain([(str(file.relative_to(path)), of_file(file)) for file in read])


def of_file(path: Path) -> str:
    """A digest of a file's content; of a file in the hub's cache its name there, which is one."""
    found = path.resolve()
    if found.parent.name == "blobs" and found != path:
        return found.name
    about = found.stat()
    return _digest(found, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:32]


def of_weights(models: Iterable[torch.nn.Module]) -> str:
    """A digest of everything that loaded models hold."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                # Of a model that several ranks hold, this one's part.
                tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                if not tensor.is_meta:  # weights on disk are those of the checkpoint that is named beside this
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def of_tokenizer(tokenizer: Any) -> str:
    """A digest of a tokenizer's behaviour, without chat templates, which show in the prompts."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    content = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    return of_plain(type(tokenizer).__qualname__, content)


def of_function(function: Any) -> str:
    """A digest of a function's source file."""
    file = inspect.getsourcefile(inspect.unwrap(function))
    return of_file(Path(file)) if file is not None and Path(file).is_file() else of_plain(function)
