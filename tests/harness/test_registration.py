"""The bridge into releases of the harness that do not discover plugins, and the package around it."""

from __future__ import annotations

import configparser
import importlib
import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from s2d2_lmeval import _autoload

ROOT = Path(__file__).parents[2]

REGISTRY = """
import sys
from s2d2_lmeval import _autoload
assert not {"torch", "lm_eval"} & set(sys.modules)
_autoload.install(); _autoload.install()
assert sum(type(finder).__name__ == "_PostImportFinder" for finder in sys.meta_path) <= 1
import lm_eval.models, lm_eval.filters, lm_eval.tasks, transformers.models.auto.configuration_auto
from lm_eval.api import registry
print("s2d2" in registry.model_registry, "hf" in registry.model_registry, "s2d2_stats" in registry.filter_registry,
      any(type(finder).__name__ == "_PostImportFinder" for finder in sys.meta_path))
"""


def run(code: str, **variables: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_are_added_beside_the_built_in_ones() -> None:
    assert run(REGISTRY) == "True True True False"


def test_the_packaged_tasks_are_found_beside_the_harness_s_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: s2d2_gsm8k\ntag: mine\n")
    code = f"""
import torch
from lm_eval.tasks import TaskManager
from s2d2_lmeval.harness.upstream import include_path
plain, alone = TaskManager(), TaskManager(include_defaults=False, include_path={str(tmp_path)!r})
print({{"s2d2_gsm8k", "s2d2_toy_arithmetic", "gsm8k"}} <= set(plain.all_tasks), len(alone.all_subtasks))
print("mine" in TaskManager(include_path=[{str(tmp_path)!r}]).all_tags)
print(TaskManager(include_path=str(include_path())).all_tasks == plain.all_tasks)
"""
    assert run(code).split() == ["True", "1", "True", "True"]


def test_opting_out() -> None:
    code = REGISTRY.split("import lm_eval.models")[0] + "print('PostImport' in str(sys.meta_path))"
    assert run(code, S2D2_LMEVAL_NO_AUTOLOAD="1") == "False"


def test_a_harness_that_discovers_plugins_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api import registry

    added: list[str] = []
    monkeypatch.setattr(registry.Registry, "register", lambda self, name, **kwargs: added.append(name))
    monkeypatch.setattr(registry, "load_plugins", lambda *args: None, raising=False)
    _autoload.register()
    assert not added


def test_a_failure_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> None:
        raise RuntimeError("registry changed")

    monkeypatch.setattr(_autoload, "_register", broken)
    monkeypatch.setitem(sys.modules, "lm_eval.models", importlib.import_module("lm_eval.models"))
    with pytest.warns(UserWarning, match=r"registry changed.*s2d2-lmeval eval"):
        _autoload.install()

    def strict(*args: object, **kwargs: object) -> None:
        raise RuntimeError("warnings are errors")

    monkeypatch.setattr("warnings.warn", strict)
    _autoload.install()


OTHER_EXTRAS = "s2d2-lmeval[docs,serve,sweep]"
"""Of which ``dev`` is made, among others."""


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip()]


def test_every_package_is_listed() -> None:
    files = (ROOT / "s2d2_lmeval").rglob("__init__.py")
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    found |= {f"s2d2_lmeval.{name}" for name in ("custom_generate", "task_configs")}
    assert set(lines(setup_cfg()["options"]["packages"])) == found


def test_the_source_distribution_carries_what_the_wheel_leaves_out() -> None:
    words = [line.split() for line in lines((ROOT / "MANIFEST.in").read_text())]
    grafted = {word for first, *rest in words if first == "graft" for word in rest}
    assert {"benchmarks", "docs", "recipes", "studies", "tests"} <= grafted
    assert not [name for name in grafted if not (ROOT / name).is_dir()]


def test_entry_points_name_what_exists() -> None:
    for entry in metadata.distribution("s2d2-lmeval").entry_points:
        module, _, name = entry.value.partition(":")
        if entry.group != "console_scripts":
            assert hasattr(importlib.import_module(module), name)
    declared = lines(setup_cfg()["options.entry_points"]["lm_eval.models"])
    assert declared == [f"{_autoload.MODEL_NAME} = {_autoload.MODEL_CLASS}"]
    declared = lines(setup_cfg()["options.entry_points"]["lm_eval.filters"])
    assert declared == [f"{_autoload.FILTER_NAME} = {_autoload.FILTER_CLASS}"]


def test_the_class_is_where_its_name_says() -> None:
    # A placeholder is replaced by the class only if the class says the same of itself.
    from s2d2_lmeval.harness.model import S2D2LM

    assert f"{S2D2LM.__module__}:{S2D2LM.__name__}" == _autoload.MODEL_CLASS


def test_constraints_satisfy_the_ranges() -> None:
    pins = [Requirement(line) for line in lines((ROOT / "constraints.txt").read_text()) if not line.startswith("#")]
    pinned: dict[str, list[str]] = {}
    for pin in pins:  # a package may be pinned once per range of Python versions
        versions = [specifier.version for specifier in pin.specifier]
        pinned.setdefault(pin.name.lower().replace("_", "-"), []).extend(versions)
    parser = setup_cfg()
    extras = parser["options.extras_require"]
    required = [*lines(parser["options"]["install_requires"]), *lines(extras["dev"])]
    required += [
        line
        for extra in Requirement(required.pop(required.index(OTHER_EXTRAS))).extras
        for line in lines(extras[extra])
    ]
    for requirement in map(Requirement, (line for line in required if not line.startswith("#"))):
        versions = pinned.get(requirement.name.lower().replace("_", "-"))
        assert versions, f"{requirement.name} is not pinned"
        assert all(requirement.specifier.contains(version) for version in versions), requirement
