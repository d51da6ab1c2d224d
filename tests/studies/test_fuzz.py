"""Studies and folders of results that are wrong in any way: a sentence, not a traceback; an end, not a hang."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2d2_lmeval.studies.planning import Plan
from s2d2_lmeval.studies.report.page import write_report
from s2d2_lmeval.studies.report.results import read_results
from s2d2_lmeval.studies.store import PointStore, encode_line, read_point
from s2d2_lmeval.studies.study import make_study, read_study

from ..fuzzing import Tries as TriesOfTenSeconds
from .small import STUDY
from .test_report import POINTS, write_study

SEARCH = {
    "trials": 3,
    "parallel": 2,
    "objectives": ["accuracy", "tokens_per_forward"],
    "decoding": {"decoder": "s2d2"},
    "space": {
        "block_length": {"choices": [8, 16]},
        "confidence_threshold": {"low": 0.5, "high": 0.99},
        "min_ssd_span_length": {"low": 1, "high": 8, "step": 1},
    },
}
WHOLE: dict[str, Any] = {
    **STUDY,
    "models": {"toy": {"pretrained": "toy", "dtype": "float32"}, "b": "toy"},
    "tasks": ["s2d2_toy_arithmetic", {"task": "s2d2_toy_instructions", "limit": 2, "metric": "accuracy,none"}],
    "decoding": {
        "ar": {"decoder": "ar"},
        "dynamic": {"decoder": "dynamic", "grid": {"confidence_threshold": [0.8, 0.9], "top_k": [0, 5]}},
    },
    "seeds": [0, 1],
    "num_fewshot": 0,
    "apply_chat_template": False,
    "system_instruction": "Be short.",
    "baselines": {"ar": "ar"},
    "search": SEARCH,
}


class Tries(TriesOfTenSeconds):
    """With time for a machine on which much else is going on."""

    def attempt(self, label: str, run: Callable[[], Any], seconds: float = 120.0) -> None:
        super().attempt(label, run, seconds)


def deep(levels: int) -> Any:
    nested: Any = 1
    for level in range(levels):
        nested = [nested] if level % 2 else {"a": nested}
    return nested


BAD: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (None, True, False, 0, -1, 1.5, -0.0, 1e308, float("nan"), float("inf"))),
    *(
        lambda value=value: value
        for value in ("", "x", "ar", "auto", "\x00", "a" * 5000, "../..", "/dev/zero", "$\\frac{")
    ),
    *(lambda value=value: value for value in ("\ud800", "[red]", "{{ x }}", "%s", "é\u2028", "1e400", "toy", "none")),
    *(lambda value=value: value for value in (10**18, 10**30, 10**4000, 1 << 20_000, -(10**400))),
    list,
    dict,
    lambda: [[]],
    lambda: [5, "a", None],
    lambda: {"a": 5},
    lambda: {5: "a", "b": {}},
    lambda: {True: 1, None: 2},
    lambda: list(range(2000)),
    lambda: deep(40),
    lambda: deep(3000),
    lambda: {"low": 2, "high": 1},
    lambda: {"low": 0, "high": 1, "log": True},
    lambda: {"choices": [[1], {}]},
    lambda: {"grid": {"top_k": list(range(200)), "top_p": [0.1] * 200, "seed": list(range(200))}},
    lambda: date(2024, 1, 1),
    lambda: {1, 2},
    lambda: b"bytes",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in plain data, but for what is nested very deeply."""
    if len(path) > 8:
        return [path]
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inside for place in places(one, (*path, key)))]


def damaged(rng: random.Random, whole: Any) -> tuple[str, Any]:
    """Plain data with one to three things wrong, and in words what."""
    value, said = copy.deepcopy(whole), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *way, key = rng.choice(places(value)[1:])
        at = value
        for step in way:
            at = at[step]
        number = rng.randrange(len(BAD) + 2)
        if number < len(BAD):
            at[key] = BAD[number]()
        elif number == len(BAD):
            del at[key]
        elif isinstance(at, dict):
            at[rng.choice(("x", "seed", "task", "", "grid", "<<"))] = at.pop(key)
        said.append(f"{'.'.join(map(str, [*way, key]))}: {number}")
        if not places(value)[1:]:
            break
    return "; ".join(said), value


def mangled(rng: random.Random, text: bytes) -> bytes:
    """A file with bytes cut out, doubled, replaced or put in."""
    data = bytearray(text)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((0, 1, 3, 40)))
        some = (
            b"\x00",
            b"\xff",
            b"[" * 3000,
            b'{"a":' * 3000,
            b"9" * 6000,
            b"&a [*a]",
            b"!!python/x ",
            b": ",
            b"\n",
            b"",
        )
        data[at:end] = rng.choice((*some, bytes(data[at:end]) * 2))
    return bytes(data)


def plan(raw: Any, folder: Path) -> None:
    made = make_study(raw)
    assert len(made.points()) <= 10_000
    Plan(made, folder / "nowhere")


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_studies(count: int, tmp_path: Path) -> None:
    rng, tries = random.Random(11), Tries()
    plan(WHOLE, tmp_path)
    for _ in range(count):
        said, raw = damaged(rng, WHOLE)
        tries.attempt(said, lambda raw=raw: plan(raw, tmp_path))
    tries.check(refused_at_least=count // 2)


@pytest.mark.parametrize("count", [200, pytest.param(1500, marks=pytest.mark.slow)])
def test_study_files(count: int, tmp_path: Path) -> None:
    rng, tries, path = random.Random(12), Tries(), tmp_path / "x.yaml"
    whole = yaml.safe_dump(WHOLE).encode()
    for number in range(count):
        path.write_bytes(data := mangled(rng, whole))
        tries.attempt(f"{number}: {data[:60]!r}", lambda: read_study(path))
    tries.check(refused_at_least=count // 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("results"), {name: POINTS[name] for name in ("ar", "s2d2")})


def read_all(folder: Path) -> None:
    for path in (folder / "points").iterdir():
        with PointStore(path) as store:
            store.record.is_complete({})
        read_point(path).is_complete()
    read_results(folder)


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_files_of_results(results: Path, count: int) -> None:
    """``study.json`` and point files with bytes changed."""
    rng, tries = random.Random(13), Tries()
    kept = {path: path.read_bytes() for path in (results / "study.json", *(results / "points").iterdir())}
    for number in range(count):
        path = rng.choice(list(kept))
        path.write_bytes(data := mangled(rng, kept[path]))
        tries.attempt(f"{number} {path.name}: {len(data)} bytes", lambda: read_all(results))
        path.write_bytes(kept[path])
    tries.check(refused_at_least=count // 10)


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_lines_of_results(results: Path, count: int) -> None:
    """Lines that hold something else, with the right checksum, and a ``study.json`` that does."""
    rng, tries = random.Random(14), Tries()
    manifest = json.loads((results / "study.json").read_text())
    paths = sorted((results / "points").iterdir())
    kept = {path: path.read_bytes() for path in paths}
    for number in range(count):
        path = rng.choice([*paths, results / "study.json"])
        if path.suffix == ".json":
            said, wrong = damaged(rng, manifest)
            content = dumped(wrong)
        else:
            lines = kept[path].split(b"\n")
            at = rng.choice((0, 1, 2, len(lines) - 2))
            whole = {key: value for key, value in json.loads(lines[at]).items() if key != "check"}
            said, wrong = damaged(rng, whole)
            try:
                lines[at] = encode_line(wrong).rstrip(b"\n")
            except (ValueError, TypeError, RecursionError):
                lines[at] = dumped(wrong)
            content = b"\n".join(lines)
        path.write_bytes(content)
        tries.attempt(f"{number} {path.name}: {said}", lambda: read_all(results))
        path.write_bytes(kept.get(path, dumped(manifest)))
    tries.check(refused_at_least=count // 10)


def dumped(value: Any) -> bytes:
    """As JSON, as far as that goes."""
    try:
        return json.dumps(value, default=str).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError):
        return b"[" * 50_000


NAMES = ["$\\frac{", "a/b", "<b>", "x" * 190, "é\u2028", "{{ x }}", "%s\\", "&amp;", "con", "..", "_^_", "[red]"]


@pytest.mark.parametrize("names", [NAMES[:1], *(pytest.param([name], marks=pytest.mark.slow) for name in NAMES[1:])])
def test_reports_of_any_names(tmp_path: Path, names: list[str]) -> None:
    tries, points = (
        Tries(),
        {f"{name}{place}": {**POINTS["s2d2"], "task": name} for place, name in enumerate(names * 2)},
    )
    write_study(tmp_path, points)
    tries.attempt(str(names), lambda: write_report(tmp_path))
    tries.check(refused_at_least=0)
    assert tries.answered == 1
