"""Facts in which a checkpoint and its tokenizer, its name or its type disagree, as the harness and doctor hear them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.cli.checkpoints import open_model
from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.harness.model import S2D2LM

from .conftest import BYTES, SPECIAL

MASK = BYTES + SPECIAL.index("<|MASK|>")


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny checkpoint under a name of its own, with these changes of config.json (None: without it)."""

    def make(name: str = "copy", file: str = "config.json", **changes: Any) -> Path:
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(checkpoint, folder)
        config = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return folder

    return make


def doctor(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["doctor", "--json", str(folder), *(["--option", *options] if options else [])])
    return code, {one["name"]: one for one in json.loads(capsys.readouterr().out) if one["section"] == "checkpoint"}


@pytest.mark.parametrize("mask", [5, MASK - 1])
def test_a_mask_that_is_not_the_tokenizers(
    changed: Callable[..., Path], mask: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(mask_token_id=mask)
    with pytest.raises(CheckpointError, match=f"mask token {mask} is .*mask_token_id={MASK}"):
        S2D2LM(pretrained=str(folder), device="cpu")
    code, found = doctor(capsys, folder)
    assert code == 1
    assert found["mask token"]["state"] == "problem"
    with pytest.raises(CheckpointError, match="mask_token_id"):
        open_model(str(folder), {})
    with caplog.at_level(logging.WARNING, "lm_eval.s2d2"):
        S2D2LM(pretrained=str(folder), device="cpu", mask_token_id=mask)
    assert "as asked, but" in caplog.text
    assert S2D2LM(pretrained=str(folder), device="cpu", mask_token_id=MASK).engine.facts.mask_token_id == MASK
    assert doctor(capsys, folder, f"mask_token_id={MASK}")[0] == 0


def test_a_word_as_mask_where_the_tokenizer_has_none(changed: Callable[..., Path]) -> None:
    folder = changed(mask_token_id=5)
    text = (folder / "tokenizer.json").read_text().replace("<|MASK|>", "<|other|>")
    (folder / "tokenizer.json").write_text(text)
    changed(file="tokenizer_config.json", mask_token=None)
    with pytest.raises(CheckpointError, match="mask token 5 is '&'"):
        S2D2LM(pretrained=str(folder), device="cpu")
    changed(mask_token_id=MASK)  # a special token without a telling name may be it
    assert S2D2LM(pretrained=str(folder), device="cpu").engine.facts.mask_token_id == MASK


def test_an_assumed_block_length_is_in_the_header_and_in_doctor(
    changed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from dataclasses import replace

    from s2d2_lmeval.families import FAMILIES

    known = replace(FAMILIES["sdar"], published_mask_ids={BYTES + len(SPECIAL): MASK})
    monkeypatch.setitem(FAMILIES._parts, ("sdar", ""), known)
    folder = changed(block_size=None)
    with caplog.at_level(logging.INFO, "lm_eval.s2d2"), pytest.warns(UserWarning, match="assumed"):
        S2D2LM(pretrained=str(folder), device="cpu")
    assert "blocks of 4 are assumed" in caplog.text
    _, found = doctor(capsys, folder)
    assert found["blocks"]["state"] == found["but"]["state"] == "note"
    assert "of 4 tokens (assumed)" in found["blocks"]["value"]
    _, found = doctor(capsys, changed("x-b16", block_size=None))
    assert "of 16 tokens (the name x-b16)" in found["blocks"]["value"]
    assert "but" not in found


def test_the_family_as_a_model_argument(changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = changed(model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    with pytest.raises(CheckpointError, match="family="):
        S2D2LM(pretrained=str(folder), device="cpu")
    model = S2D2LM(pretrained=str(folder), device="cpu", family="sdar")
    assert (model.engine.facts.family, model.decoding.decoder) == ("sdar", "s2d2")
    code, found = doctor(capsys, folder, "family=sdar")
    assert (code, found["family"]["value"].split(",")[0]) == (0, "sdar")
    plain = S2D2LM(pretrained=str(folder), device="cpu", family="qwen3")
    assert (plain.engine.facts.family, plain.decoding.decoder) == ("qwen3", "ar")


def test_studies_know_the_family(changed: Callable[..., Path]) -> None:
    from s2d2_lmeval.studies.planning import _facts

    folder = str(changed(model_type="qwen3", architectures=["Qwen3ForCausalLM"]))
    assert _facts({"pretrained": folder}) is None
    assert _facts({"pretrained": folder, "family": "sdar"}).family == "sdar"


def test_a_loaded_model_keeps_its_family(changed: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = str(changed(model_type="qwen3", architectures=["Qwen3ForCausalLM"]))
    native = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = S2D2LM(pretrained=folder, device="cpu", family="sdar").tokenizer
    model = S2D2LM(pretrained=native, tokenizer=tokenizer, family="sdar", device="cpu")
    assert model.engine.facts.family == "sdar"
