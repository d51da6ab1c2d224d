"""What `doctor` reports: findings, and those about this installation and machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

OK, NOTE, PROBLEM = "ok", "note", "problem"
_PACKAGES = ("torch", "transformers", "lm_eval", "tokenizers", "safetensors", "accelerate", "datasets")


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state``: ``ok``; ``note``, worth knowing; ``problem``, something will not work."""

    section: str
    name: str
    value: str
    state: str = OK


def versions() -> Iterator[Finding]:
    """Python, this package, and the packages it stands on, against what it asks for."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from s2d2_lmeval import __version__

    yield Finding("versions", "python", f"{platform.python_version()} on {platform.platform()}")
    try:
        wanted = [Requirement(text) for text in metadata.requires("s2d2-lmeval") or ()]
        yield Finding("versions", "s2d2-lmeval", __version__)
    except metadata.PackageNotFoundError:
        wanted = []
        yield Finding("versions", "s2d2-lmeval", f"{__version__}, not installed: pip install -e .", PROBLEM)
    ranges = {canonicalize_name(one.name): one for one in wanted if one.marker is None or one.marker.evaluate()}
    for name in _PACKAGES:
        requirement = ranges.get(canonicalize_name(name))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("versions", name, "not installed", PROBLEM)
            continue
        if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
            yield Finding("versions", name, f"{version}; needs {requirement.specifier}", PROBLEM)
        else:
            yield Finding("versions", name, version)


def devices() -> Iterator[Finding]:
    """GPUs with their memory, the CPU with its threads and memory."""
    import torch

    from s2d2_lmeval.cli.console import size

    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "" if about.major >= 8 else ", no bfloat16 arithmetic"
        yield Finding(
            "devices",
            f"cuda:{index}",
            f"{about.name}, {size(total)} ({size(free)} free), capability {about.major}.{about.minor}{bf16}",
        )
    if not torch.cuda.is_available():
        build = "this torch has no CUDA" if torch.version.cuda is None else "torch sees none"
        yield Finding("devices", "cuda", f"none ({build}); decoding runs on the CPU", NOTE)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "devices",
        "cpu",
        f"{usable} of {os.cpu_count()} cores usable, torch uses {torch.get_num_threads()} threads, "
        f"{size(host_memory())} memory",
    )


def host_memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def attention() -> Iterator[Finding]:
    """Attention back ends: which there are, which are used."""
    from s2d2_lmeval.runtime.attention import BACKENDS, choose_backend

    yield Finding("attention", "auto means", choose_backend("auto"))
    yield Finding("attention", "sdpa", "PyTorch's own; present")
    for name, module, package in (
        ("flash-attn 2", "flash_attn", "flash_attn"),
        ("flash-attn 3", "flash_attn_interface", "flash_attn_3"),
    ):
        if find_spec(module) is None:
            yield Finding("attention", name, "not installed (optional)")
            continue
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        used = "present" if "flash" in BACKENDS else "present; this release does not use it"
        yield Finding("attention", name, f"{version}, {used}")


def registration() -> Iterator[Finding]:
    """Whether `lm_eval --model s2d2` finds the model, and by what."""
    import lm_eval.filters
    import lm_eval.models  # noqa: F401
    from lm_eval.api import registry

    from s2d2_lmeval._autoload import FILTER_NAME, MODEL_NAME

    section, command = "lm_eval", "lm_eval --model s2d2"
    if hasattr(registry, "load_plugins"):
        points = metadata.entry_points(group="lm_eval.models", name=MODEL_NAME)
        known, how = bool(points), "the harness's own plugins (entry point lm_eval.models)"
    else:
        known = MODEL_NAME in registry.model_registry and FILTER_NAME in registry.filter_registry
        how = "the bridge in `import torch` (entry point torch.backends); not with --seed None"
    if known:
        yield Finding(section, command, f"works, through {how}")
    elif os.environ.get("S2D2_LMEVAL_NO_AUTOLOAD"):
        yield Finding(section, command, "switched off by S2D2_LMEVAL_NO_AUTOLOAD", NOTE)
    elif os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield Finding(section, command, "switched off by TORCH_DEVICE_BACKEND_AUTOLOAD=0", NOTE)
    else:
        yield Finding(section, command, "unknown to the harness: pip install s2d2-lmeval, into this Python", PROBLEM)
    yield Finding(section, "s2d2-lmeval eval", "works (registers by itself)")
    yield from _tasks(section)


def _tasks(section: str) -> Iterator[Finding]:
    from s2d2_lmeval.errors import S2D2Error
    from s2d2_lmeval.harness.packaged import include_path

    try:
        folder = include_path()
    except S2D2Error as error:
        yield Finding(section, "packaged tasks", str(error), PROBLEM)
        return
    files = [path for path in folder.rglob("*.yaml") if not path.name.startswith("_")]
    yield Finding(section, "packaged tasks", f"{len(files)} files in {folder}", OK if files else NOTE)
