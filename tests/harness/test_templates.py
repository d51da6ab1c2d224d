"""Chat templates: the text of transformers, a sentence where one fails, and an end where it has none."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, tokenization_utils_base

import s2d2_lmeval
from s2d2_lmeval import templates
from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import CheckpointError, RequestError
from s2d2_lmeval.harness.model import S2D2LM
from s2d2_lmeval.prompts import encode

from ..fuzzing import Tries
from .conftest import CHAT_TEMPLATE, write_tokenizer

USER = {"role": "user", "content": "Q: héllo <b>&'\"\n"}
CHAT = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "So"}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{{ eos_token }}{% for m in messages %}[{{ m | tojson }}{{ m.content }}]{{ loop.index }}{% endfor %}{{ flag }}",
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
            "{% generation %}{{ m.content }}{% endgeneration %}{% set ns.n = ns.n + 1 %}{% endfor %}"
            "{{ ns.n }}{{ think }}"
        ),
    ],
)
def test_the_text_is_that_of_transformers(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    for arguments in (
        {"add_generation_prompt": True},
        {"continue_final_message": True},
        {"think": False, "flag": "on"},
    ):
        plain = tokenizer.apply_chat_template(CHAT, tokenize=False, **arguments)
        with templates.limited():
            assert tokenizer.apply_chat_template(CHAT, tokenize=False, **arguments) == plain


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 7 ** (10 ** 9) }}",
    "a long text": "{{ 'a' * 10**11 }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "much output": "{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
FAILING = {
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "raises": "{{ raise_exception('no roles here') }}",
    "divides": "{{ 1 / 0 }}",
    "types": "{{ messages + 1 }}",
    "unknown": "{{ nothing.at.all }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "syntax": "{% for %}",
    "unclosed": "{% if messages %}",
    "filter": "{{ messages | nofilter }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", ["nested loops", "a long text"])
def test_templates_without_an_end_end(tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0)
    _refuse_all(tokenizer, {name: ENDLESS[name]})


@pytest.mark.slow
def test_more_templates_without_an_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1)
    _refuse_all(tokenizer, ENDLESS)


def test_templates_that_fail_are_one_sentence(tokenizer: Any) -> None:
    _refuse_all(tokenizer, FAILING)


def _refuse_all(tokenizer: Any, bad: dict[str, str]) -> None:
    tries = Tries()

    def render() -> None:
        with templates.limited():
            tokenizer.apply_chat_template(CHAT, tokenize=False)

    for name, template in bad.items():
        tokenizer.chat_template = template
        tries.attempt(name, render, seconds=120)
    tries.check(refused_at_least=len(bad))
    tokenizer.chat_template = CHAT_TEMPLATE
    render()  # and the next one works
    assert tries.refused == tries.count


def test_the_harness_and_the_command_line_say_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "bad"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = FAILING["raises"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="chat template cannot be used"):
        S2D2LM(pretrained=str(folder), device="cpu").apply_chat_template(CHAT)
    assert main(["doctor", "--json", str(folder)]) == 1
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["chat template"]["state"] == "problem"
    assert "no roles here" in found["chat template"]["value"]


def test_without_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with templates.limited(), pytest.raises(ValueError, match="chat_template is not set"):
        tokenizer.apply_chat_template(CHAT, tokenize=False)
    with pytest.raises(CheckpointError, match="chat_template is not set"), templates.limited():
        tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_a_worker_that_was_ended_is_replaced(tokenizer: Any) -> None:
    with templates.limited():
        text = tokenizer.apply_chat_template(CHAT, tokenize=False)
        (worker,) = templates._workers.values()
        worker.kill()
        worker.wait()
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text


def test_whoever_asks_with_messages_is_under_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = s2d2_lmeval.load("toy")
    model.tokenizer.chat_template = ENDLESS["nested loops"]
    monkeypatch.setattr(templates, "SECONDS", 0)
    for ask in (lambda: model.generate([USER]), lambda: list(model.stream([USER]))):
        with pytest.raises(CheckpointError, match="chat template cannot be used"):
            ask()
    model.tokenizer.chat_template = FAILING["raises"]
    with pytest.raises(RequestError, match="refuses these messages: no roles here"):
        model.generate([USER])


def test_threads_get_their_own_texts() -> None:
    tokenizer = s2d2_lmeval.load("toy").tokenizer

    def said(number: int) -> str:
        return str(tokenizer.decode(encode(tokenizer, [{"role": "user", "content": f"abc {number}"}])))

    alone = list(map(said, range(64)))
    own = tokenization_utils_base.render_jinja_template
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(said, range(64))) == alone
    assert tokenization_utils_base.render_jinja_template is own
