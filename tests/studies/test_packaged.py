"""Studies that come with the package: found by name, run and reported with nothing but the package."""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.studies import packaged
from s2d2_lmeval.studies.study import read_study

ROOT = Path(__file__).resolve().parents[2]


def test_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert packaged.names() == ["demo", "demo-ddtree"]
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "demo, demo-ddtree" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", packaged.names())
def test_they_are_studies_of_the_embedded_model(name: str) -> None:
    """What such a study's model writes is run without asking, so it may be no other model."""
    path = packaged.find(name)
    assert packaged.is_packaged(path)
    study = read_study(path)
    assert study.name == name
    assert {value for given in study.models.values() for value in given.values()} == {"toy"}
    assert next(iter(study.decoding.values())) == {"decoder": "ar"}


def test_they_are_in_the_wheel() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert parser["options.package_data"]["s2d2_lmeval.studies.packaged"] == "*.yaml"


def test_a_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # a folder is no study
    assert packaged.is_packaged(packaged.find("demo"))
    Path("demo").rmdir()
    Path("demo").write_text("models: [toy]")
    assert not packaged.is_packaged(packaged.find("demo"))
    assert not packaged.is_packaged(packaged.find(Path("demo")))


@pytest.mark.parametrize("given", ["demmo", "demo.yml", "../packaged/demo.txt", "x" * 5000, "a\x00b", "\ud800", "démo"])
def test_a_name_that_is_none(given: str) -> None:
    with pytest.raises(StudyError, match=r"cannot be read as a study: .* Packaged: demo, demo-ddtree\.$") as caught:
        packaged.find(given)
    assert str(caught.value).isprintable()
    assert ("Did you mean demo?" in str(caught.value)) == (given in ("demmo", "demo.yml", "démo"))


def test_a_study_and_its_report_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    chosen = ["--task", "s2d2_toy_programs", "--decoder", "sliding", "--limit", "1"]
    assert main(["sweep", "demo", *chosen, "--model", "toy"]) == 2
    assert "allow that with --confirm_run_unsafe_code" in capsys.readouterr().err
    assert main(["sweep", "demo", *chosen]) == 0
    assert main(["report", "out/demo"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "toy, s2d2_toy_programs, sliding auto: 1 samples" in shown
    assert "figures need matplotlib: pip install matplotlib." in shown
    page = Path("out/demo/report/index.html").read_text()
    assert "figures need matplotlib" in page
    assert "<img" not in page
    assert not Path("out/demo/report/figures").exists()
    assert "| sliding auto |" in Path("out/demo/report/tables.md").read_text().replace("**", "")
