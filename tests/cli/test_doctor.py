"""`doctor`: what it finds on a sound checkpoint, and on broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s2d2_lmeval.cli import main
from s2d2_lmeval.families import load_checkpoint

from .conftest import write_checkpoint


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[tuple[str, str], dict]]:
    code = main(["doctor", "--json", *arguments])
    return code, {(one["section"], one["name"]): one for one in json.loads(capsys.readouterr().out)}


def problems(found: dict[tuple[str, str], dict]) -> dict[str, str]:
    return {name: one["value"] for (_, name), one in found.items() if one["state"] == "problem"}


def test_a_sound_installation_and_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, str(checkpoint), "--load")
    assert problems(found) == {}
    assert code == 0
    assert "Qwen3ForCausalLM" in found["checkpoint", "family"]["value"]
    assert found["checkpoint", "mask token"]["value"] == "258 <|MASK|>"
    assert "parameters" in found["checkpoint", "weights"]["value"]
    default = found["decoders", "default setting"]["value"]
    assert default.startswith("decoder=s2d2, ")
    assert "confidence_threshold=0.85" in default
    assert "autoregressive" in found["decoders", "ar"]["value"]
    assert "forwards" in found["trial", "s2d2"]["value"]
    assert found["lm_eval", "lm_eval --model s2d2"]["value"].startswith("works")


def test_without_a_checkpoint_only_the_installation_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys)
    assert code == 0
    assert {section for section, _ in found} == {"versions", "devices", "attention", "lm_eval"}


def test_people_see_sections_and_a_verdict(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "decoders\n" in shown
    assert "Everything that was checked works." in shown


def test_an_unknown_family_does_not_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "unknown", model_type="gpt_neox")
    code, found = findings(capsys, str(folder))
    assert code == 1
    assert "sdar" in problems(found)["config.json"]
    assert main(["doctor", str(folder)]) == 1
    assert "1 thing will not work" in capsys.readouterr().out


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, str(tmp_path / "no" / "such" / "folder"))
    assert code == 1
    assert "no folder" in problems(found)["config.json"]


def test_missing_weights_and_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "bare")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    code, found = findings(capsys, str(folder))
    assert code == 1
    assert set(problems(found)) == {"weights", "tokenizer"}


def test_weights_that_do_not_fit_show_when_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "misfit", num_hidden_layers=3)
    assert main(["doctor", "--json", str(folder)]) == 0
    capsys.readouterr()
    code, found = findings(capsys, str(folder), "--load")
    assert code == 1
    assert "missing weights" in problems(found)["load"]


def test_an_older_package_than_asked_for_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import metadata

    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.40.0" if name == "transformers" else installed(name))
    code, found = findings(capsys)
    assert code == 1
    assert "4.40.0; needs" in problems(found)["transformers"]


@pytest.mark.parametrize(("switch", "code"), [("S2D2_LMEVAL_NO_AUTOLOAD", 0), (None, 1)])
def test_a_model_that_the_harness_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], switch: str | None, code: int
) -> None:
    monkeypatch.setattr("s2d2_lmeval._autoload.MODEL_NAME", "unregistered")
    if switch:
        monkeypatch.setenv(switch, "1")
    found_code, found = findings(capsys)
    assert found_code == code
    assert not found["lm_eval", "lm_eval --model s2d2"]["value"].startswith("works")
    assert found["lm_eval", "s2d2-lmeval eval"]["state"] == "ok"


def test_presets_are_told_by_what_is_different(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = findings(capsys, str(checkpoint))
    assert found["decoders", "preset=sdar-a"]["value"] == "the default setting"
    changes = "the default setting with block_length=16, denoising_steps=16, score_penalty_coef=0.0"
    assert found["decoders", "preset=sdar-b"]["value"] == changes


FAMILIES = Path(__file__).parents[1] / "families" / "data"


def test_a_base_of_d2f_says_what_its_decoders_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = findings(capsys, str(FAMILIES / "llada" / "checkpoint"))
    but = found["checkpoint", "but"]
    assert but["state"] == "note"
    assert "LoRA adapter" in but["value"]
    assert ("decoders", "pipelined") in found
    assert ("decoders", "dynamic") not in found


@pytest.mark.parametrize(
    ("family", "name", "said"),
    [
        ("nemotron_labs_diffusion", "blocks", "of 8 tokens (config.json); the first begins where the prompt ends"),
        ("tiny_a2d", "blocks", "of 32 tokens (as published); counted from the prompt's end, in the prompt too"),
        ("stable_diffcoder", "blocks", "of 4 tokens (as published); counted from position 0"),
        ("idlm", "window", "of 4 tokens (as published); there are no blocks"),
        ("wedlm", "window", "of 16 tokens (as published); there are no blocks"),
    ],
)
def test_what_is_said_of_blocks(family: str, name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("family=tiny_a2d", "mask_token_id=96") if family == "tiny_a2d" else ("mask_token_id=96",)
    _, found = findings(capsys, str(FAMILIES / family / "checkpoint"), "--load", "-o", *given)
    assert found["checkpoint", name]["value"] == said
    assert len({"blocks", "window"} & {name for _, name in found}) == 1
    assert "takes a tokenizer" in found["trial", "shift probe"]["value"]
    assert {"sliding", "ar"} <= {name for section, name in found if section == "trial"}


def test_an_a2d_checkpoint_that_does_not_say_what_it_denoises(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = findings(capsys, str(FAMILIES / "tiny_a2d" / "checkpoint"))
    told = problems(found)["config.json"]
    assert (
        "whether it is a bd3lm, which denoises blocks (then give block_length=…, published with 32), or an mdlm" in told
    )
    assert "family=tiny_a2d." in told


def test_a_tokenizer_that_is_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "own")
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own_code.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own_code.py").write_text("raise SystemExit('ran')")
    code, found = findings(capsys, str(folder))
    assert code == 1
    told = problems(found)["tokenizer"]
    assert "trust_remote_code=True" in told
    assert "tokenizer=" in told
    assert main(["generate", "--model", str(folder), "-p", "x"]) == 2
    assert "is code of its own" in capsys.readouterr().err


def test_options_of_a_run_are_looked_at_too(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter, a tokenizer from elsewhere, a preset; all by their names in ``--model_args``."""
    base = FAMILIES / "llada" / "checkpoint"
    model, _ = load_checkpoint(base)
    rows, columns = model.lm_head.weight.shape
    halves = {"A": torch.ones(2, columns), "B": torch.ones(rows, 2)}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {f"base_model.model.model.transformer.ff_out.lora_{half}.weight": value for half, value in halves.items()},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    code, found = findings(capsys, str(base), "--load", "-o", f"peft={adapter}", "preset=d2f-llada")
    assert set(problems(found)) == {"tokenizer"}
    assert ("checkpoint", "but") not in found
    assert found["decoders", "as asked"]["value"].startswith("s2d2, schedule fused, blocks of 32")
    assert "forwards" in found["trial", "pipelined"]["value"]
    code, found = findings(capsys, str(base), "-o", f"tokenizer={checkpoint}", "preset=sdar-a")
    assert code == 1
    assert "llada has d2f-llada" in problems(found)["as asked"]
    assert "not this model's tokenizer" in problems(found)["tokenizer"]
    assert main(["doctor", str(base), "-o", "tokeniser=x"]) == 2
    assert "Did you mean tokenizer?" in capsys.readouterr().err
