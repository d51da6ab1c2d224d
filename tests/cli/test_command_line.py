"""The command itself: what it lists, how fast, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from s2d2_lmeval import __version__
from s2d2_lmeval.cli import COMMANDS, build_parser, main
from s2d2_lmeval.cli.values import as_in_the_harness, parse_options, parse_value
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.harness.upstream import include_path


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"eval"}))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert "usage: s2d2-lmeval" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from s2d2_lmeval.cli import build_parser\n"
        "build_parser().format_help()\n"
        "heavy = ['torch', 'transformers', 'lm_eval', 'datasets', 'numpy', 'rich', 'yaml']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_version_as_a_module() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "s2d2_lmeval", "--version"], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == f"s2d2-lmeval {__version__}"


def test_print_include_path_prints_the_folder_of_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--print-include-path"])
    assert left.value.code == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == include_path()
    assert list(folder.rglob("*.yaml"))


def test_a_refusal_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", "--model", str(tmp_path / "nowhere"), "--prompt", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("s2d2-lmeval: ")
    assert captured.err.count("\n") == 1
    assert "nowhere" in captured.err


@pytest.mark.parametrize("arguments", [[], ["evaluate"], ["generate"], ["generate", "--prompt", "x"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2


def test_an_interruption_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("s2d2_lmeval.cli.doctor.run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "s2d2-lmeval: interrupted\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("0.9", 0.9),
        ("-1e-3", -0.001),
        ("True", True),
        ("false", False),
        ("none", None),
        ("[1, 2]", [1, 2]),
        ("s2d2", "s2d2"),
        ("a=b", "a=b"),
        ("", ""),
        ("(", "("),
    ],
)
def test_values_are_read_by_what_they_look_like(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_options_are_pairs_and_come_once() -> None:
    assert parse_options(["decoder=ar", " top_p = 0.5 "]) == {"decoder": "ar", "top_p": 0.5}
    with pytest.raises(ConfigError, match="name=value"):
        parse_options(["decoder"])
    with pytest.raises(ConfigError, match="twice"):
        parse_options(["top_k=1", "top_k=2"])


def test_both_spellings_of_a_long_option_are_the_same() -> None:
    for confirm in ("--confirm_run_unsafe_code", "--confirm-run-unsafe-code"):
        for batch in ("--batch_size=4", "--batch-size=4"):
            args = build_parser().parse_args(["sweep", "s.yaml", confirm, batch])
            assert (args.confirm_run_unsafe_code, args.batch_size) == (True, 4)
    args = build_parser().parse_args(
        ["generate", "--model", "a-b_c", "--prompt=--x-y", "--max-new-tokens", "3", "--no_chat"]
    )
    assert (args.model, args.prompt, args.max_new_tokens, args.chat) == ("a-b_c", "--x-y", 3, False)
    # `eval` hands its arguments to the harness, whose names have underscores.
    given = ["--model-args", "pretrained=a-b", "--batch-size=auto-x", "-x-y", "a--b-c", "--"]
    assert list(map(as_in_the_harness, given)) == [
        "--model_args",
        "pretrained=a-b",
        "--batch_size=auto-x",
        *given[3:],
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--threads", "0"], "--threads: '0' is not a whole number from 1"),
        (["sweep", "s.yaml", "--threads", "0"], "--threads: '0'"),
        (["sweep", "s.yaml", "--model", ""], "--model: it is empty"),
        (["generate", "--model", "", "--prompt", "x"], "--model/-m: it is empty"),
        (["demo", "--rows", "1e9"], "--rows: '1e9' is not a whole number"),
        (["bench", "--scripted-acceptance", "nan"], "'nan' is not a number from 0 to 1"),
    ],
)
def test_empty_and_neutral_looking_values_are_not_ignored(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err
