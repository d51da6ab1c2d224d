"""Running small studies in this process, with one loaded model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d2_lmeval.studies.planning import Plan
from s2d2_lmeval.studies.search import search
from s2d2_lmeval.studies.study import make_study
from s2d2_lmeval.studies.sweep import LocalBackend, Sweep

from .small import STUDY

RunStudy = Callable[..., Sweep]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads gain nothing on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def study() -> dict[str, Any]:
    return copy.deepcopy(STUDY)


@pytest.fixture(scope="session")
def backend() -> LocalBackend:
    """One loaded model for all tests."""
    return LocalBackend()


@pytest.fixture
def run_study(backend: LocalBackend) -> RunStudy:
    def run(study: Mapping[str, Any], folder: Path, **options: Any) -> Sweep:
        sweep = Sweep(Plan(make_study(study), folder, **options), backend, search)
        sweep.run()
        return sweep

    return run
