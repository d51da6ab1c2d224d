"""What PyPI, the site, a container, a shell and a notebook are given."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import s2d2_lmeval

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}


def test_links_of_the_long_description_are_absolute_and_lead_somewhere() -> None:
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    targets = re.findall(r"\]\(([^)]+)\)", setup.description())
    assert all(target.startswith(("https://", "#")) for target in targets)
    within = [re.match(r"https://github\.com/[\w-]+/[\w-]+/(blob|raw)/HEAD/([^#]+)", target) for target in targets]
    paths = [(match[1], match[2]) for match in within if match]
    assert len(paths) > 20
    assert [path for _, path in paths if not (ROOT / path).exists()] == []
    assert {kind for kind, path in paths if path.endswith(".png")} == {"raw"}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == s2d2_lmeval.__version__
    assert f"\nurl = {citation['repository-code']}\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


def test_the_container_has_what_its_commands_name() -> None:
    """No docker builds it here: its files, extras and programs exist, and an ordinary user runs it."""
    steps = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    words = [shlex.split(line, posix=False) for line in steps.replace("\\\n", " ").splitlines() if line]
    assert [rest for first, *rest in words if first == "USER"] == [["evaluator"]]
    assert ["s2d2-lmeval"] in [yaml.safe_load(" ".join(rest)) for first, *rest in words if first == "ENTRYPOINT"]
    extras = re.search(r"\.whl\)\[([\w,]+)\]", steps)
    assert extras is not None
    assert all(f"\n{extra} =\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8") for extra in extras[1].split(","))
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"]
    assert [name for name in kept if not (ROOT / name).exists()] == []
    assert {"setup.py", "setup.cfg", "README.md", "LICENSE", "constraints.txt", "s2d2_lmeval"} <= set(kept)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("s2d2-lmeval comp", {"compare"}), ("s2d2-lmeval generate --max_new", {"--max_new_tokens"})],
)
def test_a_shell_is_told_what_could_come_next(typed: str, offered: set[str], tmp_path: Path) -> None:
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "COMP_TYPE": "9"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered"), "_ARGCOMPLETE_IFS": "\n"}
    subprocess.run([sys.executable, "-m", "s2d2_lmeval"], env={**OFFLINE, **asked}, check=False)
    assert {line.strip() for line in (tmp_path / "offered").read_text().splitlines()} == offered


def test_the_site_is_built_without_network_and_its_links_hold(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-f", "site/mkdocs.yml", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=OFFLINE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    assert 'id="s2d2_lmeval.BlockDiffusionModel.generate"' in reference
    assert not re.search(r":(class|func|meth|mod):<code>", reference)
    assert "confidence_threshold" in (tmp_path / "search" / "search_index.json").read_text(encoding="utf-8")
    pages = "".join(page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html"))
    assert not re.search(r'<(script|img|link rel="stylesheet")[^>]*(src|href)="?https?://', pages)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_shows_in_the_repository() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    stored = nbformat.read(ROOT / "docs" / "first-steps.ipynb", as_version=4)
    ran = nbclient.NotebookClient(nbformat.from_dict(stored), timeout=600, kernel_name="python3").execute()
    assert "<span" in ran.cells[6].outputs[0].data["text/html"]
    assert [shown(cell) for cell in ran.cells] == [shown(cell) for cell in stored.cells]
    assert len(ran.cells[6].outputs) == 1, "rich shows it a second time"


def shown(cell: Any) -> list[str]:
    """What a cell prints, and the text of what it returns; not its progress bars."""
    outputs = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
    printed = "".join(output.get("text", "") for output in outputs)
    return [printed, *(output["data"]["text/plain"] for output in outputs if "data" in output)]
