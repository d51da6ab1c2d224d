"""`generate`: text, statistics, JSON and the picture, on a tiny random model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import s2d2_lmeval
from s2d2_lmeval.cli import main
from s2d2_lmeval.cli.console import printable

from .conftest import STOP

ALWAYS = "do_verify_policy=mask_span_length"


def run(checkpoint: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(checkpoint), "--device", "cpu", *arguments])


def answer(capsys: pytest.CaptureFixture[str], checkpoint: Path, *arguments: str) -> dict:
    assert run(checkpoint, "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_a_streamed_answer_is_the_answer(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", "w1 w2 w3", "--option", "block_length=4", "--max_new_tokens", "21")
    assert run(checkpoint, *arguments) == 0
    whole = capsys.readouterr().out
    assert run(checkpoint, "--stream", *arguments) == 0
    streamed = capsys.readouterr().out
    assert streamed.partition("new tokens")[0].strip() == whole.partition("new tokens")[0].strip()
    assert run(checkpoint, "--stream", "--json", *arguments) == 2
    assert "--stream and --json" in capsys.readouterr().err


def test_a_conversation_remembers_and_can_be_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["3 + 4 =", "", "and then?", "too long " * 600, "again"])

    def typed(shown: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    asked: list[list[int]] = []
    plain = s2d2_lmeval.BlockDiffusionModel.stream

    def stream(self: s2d2_lmeval.BlockDiffusionModel, prompt: list[int], *options: object) -> Iterator[str]:
        asked.append(prompt)
        if len(asked) == 4:
            raise KeyboardInterrupt
        yield from plain(self, prompt, *options)

    monkeypatch.setattr(s2d2_lmeval.BlockDiffusionModel, "stream", stream)
    arguments = ["generate", "--model", "toy", "--device", "cpu", "--max_new_tokens", "12", "--system", "Be brief."]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    tokenizer = s2d2_lmeval.load("toy", device="cpu").tokenizer
    texts = [tokenizer.decode(ids) for ids in asked]
    first = shown.splitlines()[0]
    assert first
    assert all("Be brief." in text for text in texts)
    assert first in texts[1]  # the answer is part of the next turn
    assert "the context holds" in shown
    assert "too long" not in texts[3]  # what could not be answered was not said
    assert shown.rstrip().endswith("…")
    assert main(["generate", "--model", "toy", "--json"]) == 2
    assert "--json and --trace show one answer" in capsys.readouterr().err


def test_json_holds_what_python_answers(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, checkpoint, "-p", "hello", "--no-chat", "-n", "12", "--seed", "3", "-o", "block_length=8")
    model = s2d2_lmeval.load(checkpoint, device="cpu")
    options = {"max_new_tokens": 12, "seed": 3, "block_length": 8}
    (expected,) = model.generate([told["prompt_token_ids"]], options)
    assert told["token_ids"] == expected.token_ids
    assert told["decoding_order"] == expected.decoding_order
    assert told["finish_reason"] == expected.finish_reason
    assert {**told["stats"], "seconds": 0} == {**expected.stats, "seconds": 0}
    assert told["decoding"]["block_length"] == 8
    assert told["decoding"]["stop_token_ids"] == [STOP]
    assert told["promise"]
    assert "steps" not in told


def test_a_preset_and_what_is_given_beside_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, checkpoint, "-p", "hi", "--no-chat", "-n", "4", "-o", "preset=sdar-b", "temperature=0.5")
    decoding = told["decoding"]
    assert (decoding["preset"], decoding["block_length"], decoding["temperature"]) == ("sdar-b", 16, 0.5)
    assert run(checkpoint, "-p", "hi", "-o", "preset=fast-a") == 2
    assert "sdar has sdar-a, sdar-b" in capsys.readouterr().err


def test_steps_come_with_trace(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, checkpoint, "-p", "hello", "-n", "8", "--trace", "-o", ALWAYS)
    assert {step["kind"] for step in told["steps"]} == {"draft", "verify"}


def test_the_chat_template_is_used_where_there_is_one(
    checkpoint: Path, templateless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = answer(capsys, checkpoint, "-p", "hi", "-n", "2", "--system", "be brief")
    plain = answer(capsys, checkpoint, "-p", "hi", "-n", "2", "--no-chat")
    without = answer(capsys, templateless, "-p", "hi", "-n", "2")
    assert len(plain["prompt_token_ids"]) == len(without["prompt_token_ids"]) == 2
    assert len(chat["prompt_token_ids"]) > 20
    assert run(templateless, "-p", "hi", "--chat") == 2
    assert run(checkpoint, "-p", "hi", "--no-chat", "--system", "x") == 2
    assert "chat template" in capsys.readouterr().err


def test_the_prompt_may_come_from_stdin(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert len(answer(capsys, checkpoint, "-p", "-", "-n", "2", "--no-chat")["prompt_token_ids"]) == 5


@pytest.mark.parametrize("decoder", ["ar", "dynamic", "s2d2"])
def test_people_see_text_statistics_and_picture(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], decoder: str
) -> None:
    verifying = ["-o", ALWAYS] if decoder == "s2d2" else []
    assert run(checkpoint, "-p", "hello [bold]", "-n", "9", "--decoder", decoder, "--trace", *verifying) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown  # not a terminal
    assert "tokens per forward" in shown
    assert "promise" in shown
    assert " 1  draft" in shown
    assert ("verify" in shown) == (decoder == "s2d2")


def test_what_a_model_writes_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\tc\nd\x07é") == "a\\x1b[2Jb\tc\nd\\x07é"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decoder", "ar", "-o", "decoder=dynamic"], "give one"),
        (["-o", "block_lenght=4"], "block_length"),
        (["-o", "decoder"], "name=value"),
        (["-n", "4000"], "4000"),
        (["--decoder", "ar", "-o", "min_ssd_span_length=2"], "s2d2"),
        (["-o", "custom_generate=somewhere.py:function"], "somewhere.py"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(checkpoint, "-p", "hello", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err.strip().splitlines()[-1]
    assert captured.out == ""
