"""The test files nearest to the uncommitted change: changed ones, and those that import a changed module by its name.

python tests/nearest.py          # one path a line, those that import most of the change first
"""

from __future__ import annotations

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MOST = 5
"""Test files; more take longer than half a minute."""


def changed() -> list[Path]:
    """Python files that differ from the last commit, or are new."""
    commands = (["git", "diff", "--name-only", "HEAD"], ["git", "ls-files", "--others", "--exclude-standard"])
    names = [
        name
        for command in commands
        for name in subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    ]
    return [path for name in names if (path := REPOSITORY / name).suffix == ".py" and path.exists()]


def module_of(path: Path) -> str:
    """The dotted name that tests import a file by."""
    parts = list(path.relative_to(REPOSITORY).with_suffix("").parts)
    parts = ["s2d2_lmeval", *parts] if parts[0] in ("custom_generate", "task_configs") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(text: str, module: str) -> bool:
    package, _, name = module.rpartition(".")
    return module in text or f"from {package} import {name}" in text


def nearest(files: list[Path]) -> list[Path]:
    """Test files, the nearest first; always the one that draws the house."""
    found = {path: 100 for path in files if path.name.startswith("test_")}
    names = [module_of(path) for path in files if not path.name.startswith("test_")]
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        mentions = sum(_imports(text, name) for name in names)
        if mentions:
            found[path] = found.get(path, 0) + mentions
    ordered = sorted(found, key=lambda path: -found[path])[:MOST]
    return list(dict.fromkeys([*ordered, REPOSITORY / "tests" / "test_house.py"]))


if __name__ == "__main__":
    print("\n".join(str(path.relative_to(REPOSITORY)) for path in nearest(changed())))
