"""The house: imports run one way, no files import each other in a circle, no folder or function outgrows a reader."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from s2d2_lmeval.registry import DECODERS, ESTIMATORS, POLICIES, STRATEGIES

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("s2d2_lmeval", "custom_generate", "task_configs")
OUTSIDE = ("recipes", "benchmarks")
"""In the repository, not in the wheel."""

STOREYS = (
    ("errors",),
    ("registry", "ranks"),
    ("toy", "tasks"),
    ("families",),
    ("runtime",),
    ("decoding",),
    ("model", "lockstep", "picture", "prompts", "streaming", "templates", "_autoload", ""),
    ("harness",),
    ("studies", "custom_generate", "task_configs"),
    ("auto", "training", "serve"),
    ("cli",),
    ("__main__",),
)
"""Rooms from the ground up; a file imports from its own storey and those below."""

LONGEST_FILE, LONGEST_FUNCTION, MOST_FILES = 400, 60, 14


def files() -> dict[str, Path]:
    """Module name -> file, of everything that is installed."""
    found = {}
    for folder in FOLDERS:
        for path in (REPOSITORY / folder).rglob("*.py"):
            parts = list(path.relative_to(REPOSITORY).with_suffix("").parts)
            parts = parts if parts[0] == "s2d2_lmeval" else ["s2d2_lmeval", *parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def imported(module: str) -> set[str]:
    """What a file imports, wherever in it, for types too."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= names & FILES.keys() if names <= FILES.keys() else (names & FILES.keys()) | {source}
    return found - {module}


IMPORTS = {module: imported(module) for module in FILES}
GRAPH = {module: names & FILES.keys() for module, names in IMPORTS.items()}


def reachable(start: str) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        for module in GRAPH[left.pop()] - seen:
            seen.add(module)
            left.append(module)
    return seen


def storey(module: str) -> int:
    room = [*module.split("."), ""][1]
    return next(height for height, rooms in enumerate(STOREYS) if room in rooms)


def test_no_circles() -> None:
    assert not [module for module in GRAPH if module in reachable(module)]


def test_no_import_runs_up() -> None:
    # "toy" names the embedded checkpoint wherever a path is taken, so the ground floor is open to all.
    up = [(one, other) for one in GRAPH for other in GRAPH[one] if storey(other) > storey(one)]
    assert not up


def test_decoding_knows_no_family_by_name() -> None:
    of_a_family = {
        module
        for module, path in FILES.items()
        if module.startswith("s2d2_lmeval.families.") and "Family(" in path.read_text(encoding="utf-8")
    } - {"s2d2_lmeval.families.facts"}
    of_decoding = [module for module in GRAPH if module.startswith("s2d2_lmeval.decoding")]
    assert len(of_decoding) > 40
    assert len(of_a_family) > 4
    assert not [(module, other) for module in of_decoding for other in GRAPH[module] & of_a_family]


def test_nothing_installed_imports_what_is_not() -> None:
    outside = {*OUTSIDE, "tests"}
    assert not [(module, name) for module in FILES for name in IMPORTS[module] if name.split(".")[0] in outside]


def test_everything_installed_serves_something_that_users_start_or_import() -> None:
    """What only training or a measurement of the docs needs belongs in a folder outside the wheel."""
    rooms = ("cli", "custom_generate", "task_configs", "auto", "__main__", "")
    starts = [module for module in FILES if [*module.split("."), ""][1] in rooms]
    starts += [f"s2d2_lmeval.harness.{name}" for name in ("model", "filters")]
    starts += [module for registry in (DECODERS, POLICIES, ESTIMATORS, STRATEGIES) for module in registry.modules]
    served = set(starts).union(*map(reachable, starts))
    # Programs are judged in processes of their own, which start files by path.
    unstarted = {module for module in FILES.keys() - served if ".sandbox.jail." not in module}
    assert not [module for module in unstarted if FILES[module].name != "__init__.py"]


@pytest.mark.parametrize("folder", [*FOLDERS, *OUTSIDE])
def test_files_can_be_read_at_once(folder: str) -> None:
    long = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / folder).rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > LONGEST_FILE
    }
    assert not long


def test_folders_and_functions_can_be_read_at_once() -> None:
    full = Counter(path.parent for path in FILES.values() if path.name != "__init__.py")
    assert not [folder for folder, count in full.items() if count > MOST_FILES]
    long = [
        (module, node.name)
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long


def test_a_circle_and_a_climb_would_be_found() -> None:
    """The graph is not empty, and sees imports inside functions and for types."""

    def arrows() -> Iterator[tuple[str, str]]:
        return ((one, other) for one in GRAPH for other in GRAPH[one])

    assert sum(1 for _ in arrows()) > 400
    assert "s2d2_lmeval.decoding.engine" in reachable("s2d2_lmeval.cli.bench")
    assert "s2d2_lmeval.families" in GRAPH["s2d2_lmeval.decoding.decoder"], "which it names for types only"
