"""Checks of `doctor` on this installation and machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec

from s2d2_lmeval.cli.console import size
from s2d2_lmeval.errors import S2D2Error

OK, NOTE, PROBLEM = "ok", "note", "problem"
_PACKAGES = ("torch", "transformers", "lm_eval", "tokenizers", "safetensors", "accelerate", "datasets")


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state``: ``ok``; ``note``, worth knowing; ``problem``, something will not work."""

    section: str
    name: str
    value: str
    state: str = OK


def looked_at(section: str, name: str, found: Iterator[Finding]) -> Iterator[Finding]:
    """The ``found`` value, or why looking it up failed."""
    try:
        yield from found
    except S2D2Error as error:
        yield Finding(section, name, str(error), PROBLEM)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Python, this package, and its dependencies, against its requirements."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from s2d2_lmeval import __version__

    finding = partial(Finding, "versions")
    yield finding("python", f"{platform.python_version()} on {platform.platform()}")
    if _version("s2d2-lmeval") is None:
        wanted = []
        yield finding("s2d2-lmeval", f"{__version__}, not installed: pip install -e .", PROBLEM)
    else:
        wanted = [Requirement(text) for text in metadata.requires("s2d2-lmeval") or ()]
        yield finding("s2d2-lmeval", __version__)
    ranges = {canonicalize_name(one.name): one for one in wanted if one.marker is None or one.marker.evaluate()}
    for name in _PACKAGES:
        version, requirement = _version(name), ranges.get(canonicalize_name(name))
        if version is None:
            yield finding(name, "not installed", PROBLEM)
        elif requirement is not None and not requirement.specifier.contains(version, prereleases=True):
            yield finding(name, f"{version}; needs {requirement.specifier}", PROBLEM)
        else:
            yield finding(name, version)


def devices() -> Iterator[Finding]:
    """GPUs with their memory, the CPU with its threads and memory."""
    import torch

    finding = partial(Finding, "devices")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = map(size, torch.cuda.mem_get_info(index))
        bf16 = "" if about.major >= 8 else ", no bfloat16 arithmetic"
        memory = f"{about.name}, {total} ({free} free)"
        yield finding(f"cuda:{index}", f"{memory}, capability {about.major}.{about.minor}{bf16}")
    if not torch.cuda.is_available():
        build = "this torch has no CUDA" if torch.version.cuda is None else "torch sees none"
        yield finding("cuda", f"none ({build}); decoding runs on the CPU", NOTE)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = f"{usable} of {os.cpu_count()} cores usable, torch uses {torch.get_num_threads()} threads"
    there = host_memory()
    yield finding("cpu", f"{threads}, {size(there)} memory" if there else threads)


def host_memory() -> int:
    """Bytes of memory of this machine; 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def attention() -> Iterator[Finding]:
    """Attention back ends: which are installed, which are used."""
    from s2d2_lmeval.runtime.attention import BACKENDS, choose_backend

    finding = partial(Finding, "attention")
    yield finding("auto means", choose_backend("auto"))
    yield finding("sdpa", "PyTorch's own; present")
    used = "present" if "flash" in BACKENDS else "installed; this release does not use it"
    for name, module, package in (
        ("flash-attn 2", "flash_attn", "flash_attn"),
        ("flash-attn 3", "flash_attn_interface", "flash_attn_3"),
        ("flash-attn 3 (forward only)", "fa3_fwd_interface", "fa3_fwd"),
    ):
        if find_spec(module) is None:
            yield finding(name, "not installed (optional)")
        else:
            yield finding(name, f"{_version(package) or 'of unknown version'}, {used}")
    version = _version("triton")
    yield finding("triton", f"{version}, present" if version else "not installed (optional; kernels on CUDA)")


def registration() -> Iterator[Finding]:
    """Whether `lm_eval --model s2d2` finds the model, and how."""
    import lm_eval.filters
    import lm_eval.models  # noqa: F401
    from lm_eval.api import registry

    from s2d2_lmeval._autoload import FILTER_NAME, MODEL_NAME

    finding = partial(Finding, "lm_eval", "lm_eval --model s2d2")
    if hasattr(registry, "load_plugins"):
        known = bool(metadata.entry_points(group="lm_eval.models", name=MODEL_NAME))
        how = "the harness's own plugins (entry point lm_eval.models)"
    else:
        known = MODEL_NAME in registry.model_registry and FILTER_NAME in registry.filter_registry
        how = "the bridge in `import torch` (entry point torch.backends); not with --seed None"
    if known:
        yield finding(f"works, through {how}")
    elif os.environ.get("S2D2_LMEVAL_NO_AUTOLOAD"):
        yield finding("disabled by S2D2_LMEVAL_NO_AUTOLOAD", NOTE)
    elif os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield finding("disabled by TORCH_DEVICE_BACKEND_AUTOLOAD=0", NOTE)
    else:
        yield finding("unknown to the harness: pip install s2d2-lmeval in this Python environment", PROBLEM)
    yield Finding("lm_eval", "s2d2-lmeval eval", "works (registers by itself)")
    yield from looked_at("lm_eval", "packaged tasks", _tasks())


def _tasks() -> Iterator[Finding]:
    from s2d2_lmeval.harness.upstream import include_path

    folder = include_path()
    files = [path for path in folder.rglob("*.yaml") if not path.name.startswith("_")]
    yield Finding("lm_eval", "packaged tasks", f"{len(files)} files in {folder}", OK if files else NOTE)
