"""The Makefile, the CI entry and the pages under docs/ say what is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from s2d2_lmeval.cli import COMMANDS, main
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.registry import DECODERS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def dry_run(*arguments: str) -> str:
    """The commands that make would run in a checkout without a .venv."""
    answer = subprocess.run(
        ["make", "-n", "VENV=/nonexistent/venv", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return answer.stdout


@needs_make
@pytest.mark.parametrize("target", ["demo", "test", "lint", "test-slow", "toy"])
def test_every_target_starts_from_nothing(target: str) -> None:
    commands = dry_run(target, "PYTHON=python3.12")
    assert "python3.12 -m venv /nonexistent/venv" in commands
    assert "pip install -c constraints.txt -e '.[dev]'" in commands


@needs_make
def test_make_test_is_lint_types_and_the_fast_tests_without_network() -> None:
    commands = dry_run("test", "JOBS=2")
    for expected in (
        "ruff check .",
        "ruff format --check .",
        "/mypy",
        '-m "not slow and not gpu and not browser"',
        "-n 2",
    ):
        assert expected in commands
    assert "HF_HUB_OFFLINE=1" in commands
    assert "OMP_NUM_THREADS=1" in commands


@needs_make
def test_torch_comes_from_the_index_that_is_asked_for() -> None:
    assert "--extra-index-url https://example.org/whl" in dry_run("install", "TORCH_INDEX=https://example.org/whl")
    assert "index-url" not in dry_run("install", "TORCH_INDEX=")


@needs_make
def test_help_is_the_default_and_names_the_targets() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in shown for target in ("demo", "test", "lint", "test-slow", "toy", "docs", "clean"))


def test_continuous_integration_runs_the_tests_and_the_wheel() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test test-wheel"
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_page_of_options_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "--markdown"]) == 0
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == capsys.readouterr().out, "run `make docs`"


def test_the_schema_of_studies_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["sweep", "--schema"])
    assert left.value.code == 0
    written = (ROOT / "s2d2_lmeval" / "studies" / "study.schema.json").read_text(encoding="utf-8")
    assert written == capsys.readouterr().out, "run `make docs`"


def test_every_option_and_decoder_is_documented() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert [name for name in sorted(DecodingConfig.option_names()) if f"`{name}`" not in page] == []
    how = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert [name for name in DECODERS if f"`{name}`" not in how] == []


def test_every_other_model_argument_is_documented() -> None:
    from s2d2_lmeval.harness import arguments

    page = (ROOT / "docs" / "model-args.md").read_text(encoding="utf-8")
    names = {*arguments.OF_HARNESS, *arguments.OF_LOADING} - {"device"}
    names |= {"pretrained", "revision", "dtype", "peft", "custom_generate", "custom_model_class", "log_decoding_order"}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]
    assert missing == []
    anchored = [target.partition("#") for target in targets if "#" in target]
    headings = {name: _anchors((page.parent / name) if name else page) for name, _, _ in anchored if name[-3:] != ".py"}
    assert [(name, anchor) for name, _, anchor in anchored if name in headings and anchor not in headings[name]] == []


def _anchors(page: Path) -> set[str]:
    """The links that a page's headings can be reached by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_files_that_the_architecture_names_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", page))
    assert len(named) > 30
    roots = (ROOT, ROOT / "s2d2_lmeval", ROOT / "s2d2_lmeval" / "decoding")
    assert [name for name in sorted(named) if not any((root / name).exists() for root in roots)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    """`s2d2-lmeval X`, `make X`, and the options that go with them."""
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?<!--entrypoint hf )s2d2-lmeval ([a-z]+(?:-[a-z]+)*)\b", text)) <= {*COMMANDS, "and", "is"}
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z0-9-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_python_examples_in_the_pages_run() -> None:
    """All of them in one process, with the embedded model in place of downloads."""
    examples = [
        re.sub(r'"(JetLM|Qwen|z-lab)/[^"]+"', '"toy"', example)
        for page in PAGES
        for example in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert len(examples) >= 4
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(examples)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
