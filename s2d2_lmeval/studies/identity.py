"""What a result belongs to: the code that decoded and the weights that it decoded with."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2d2_lmeval import __version__

_DECODES = ("families", "runtime", "decoding", "harness", "model.py")
_OF_A_CHECKPOINT = (".json", ".safetensors", ".jinja", ".model")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


@functools.cache
def code_version() -> str:
    """The package's version and a digest of every source file that can change what is decoded or how fast."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for name in _DECODES:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def model_identity(arguments: Mapping[str, Any]) -> str:
    """The checkpoint that model arguments name: for a folder a digest of its files (of large ones a sample spread over
    the file), for a hub id the commit.

    Where the hub cannot be reached and nothing is cached it is the name and revision as given.
    """
    source, revision = str(arguments["pretrained"]), arguments.get("revision")
    if source == "toy":
        from s2d2_lmeval.toy import checkpoint_path

        source = str(checkpoint_path())
    folder = Path(source).expanduser()
    if folder.is_dir():
        return f"sha256:{_digest_of(folder)}"
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(source, revision=revision, allow_patterns=["config.json"])
    except Exception:  # offline, gated, or no such model: loading it will say which
        return f"{source}@{revision or 'main'}"
    return f"{source}@{Path(found).name}"


def _digest_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(
        path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja", ".model")
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\0".encode())
        with path.open("rb") as file:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
            else:
                for number in range(_SAMPLES):
                    file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
